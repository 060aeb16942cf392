"""What a record says of a quantity: its value, its interval, or the reason there is none.

A record is the plain dict of a run.json; the mean of several runs (`front.Point`) is kept in the same shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from paretune.units import Quantity, quantity

Record = dict[str, Any]
TOP = ("score", "validation_score")  # everything else is a cost


def named(name: str, metric: str = "") -> Quantity:
    """The quantity of that name; a score takes its label and its better direction from the metric (perplexity is better low).

    Raises:
        BudgetError: for a name that is no quantity.
    """
    from paretune.tasks import metrics  # scikit-learn, a second to import

    found = quantity(name)
    return dataclasses.replace(found, label=metric, better=metrics.better(metric)) if name == "score" and metric else found


def value(record: Record, name: str) -> float | None:
    """The value of a quantity, in the unit its name carries; None where it was not measured."""
    return record.get(name) if name in TOP else record["cost"].get(name)


def reason(record: Record, name: str) -> str:
    """Why the record has no value for that quantity; empty where it has one."""
    if value(record, name) is not None:
        return ""
    return record["cost"].get("reasons", {}).get(name) or "it was not measured"


def interval(record: Record, name: str) -> tuple[float, float] | None:
    """The 95 % interval of a quantity, None where none is known."""
    if name == "score":
        low, high = record.get("score_low"), record.get("score_high")
    else:
        low, high = record["cost"].get("intervals", {}).get(name) or (None, None)
    return None if low is None or high is None else (low, high)


def losses(records: Sequence[Record], names: Sequence[str]) -> np.ndarray:
    """What dominance works on: (records, quantities), lower is better in every column; NaN where a value is missing.

    Raises:
        BudgetError: for a name that is no quantity.
    """
    metric = records[0].get("metric", "") if records else ""
    signs = [-1.0 if named(name, metric).better == "higher" else 1.0 for name in names]
    rows = [[np.nan if (v := value(record, name)) is None else sign * v for name, sign in zip(names, signs, strict=True)] for record in records]
    return np.array(rows, dtype=float).reshape(len(records), len(names))
