"""Points: the runs of one recipe, over all its seeds, as one record of means with intervals."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paretune.errors import DataError, StoreError
from paretune.meters.cost import MEASURED, Cost
from paretune.meters.reading import spread
from paretune.pareto import intervals, records
from paretune.pareto.records import Record

# what must be equal for two scores to be comparable
_SAME = ("task", "task_fingerprint", "metric")
_ENERGIES = ("train_energy_j", "energy_per_inference_j", "net_energy_per_inference_j")


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """One recipe on one backbone: its runs, their mean in the shape of a record, and the results by test example where kept.

    The summary's score is the mean over seeds, its interval that of `intervals.score_interval`, or of `intervals.over_seeds` without results by
    example; `score_interval` says which. A cost is the mean over seeds with
    the t-interval of that mean; where the runs share one measurement, or there is one run, it is the run's own interval.
    """

    runs: tuple[Record, ...]
    summary: Record
    results: tuple[tuple[float, ...], ...] | None  # (seeds, test examples)

    @property
    def recipe(self) -> str:
        """The recipe's canonical text."""
        return self.summary["recipe"]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its runs, in order."""
        return tuple(run["seed"] for run in self.runs)

    def value(self, name: str) -> float | None:
        """The mean of a quantity over the runs, None where any of them lacks it."""
        return records.value(self.summary, name)

    def interval(self, name: str) -> tuple[float, float] | None:
        """The 95 % interval of that mean, None where none is known."""
        return records.interval(self.summary, name)

    def reason(self, name: str) -> str:
        """Why there is no value; empty where there is one."""
        return records.reason(self.summary, name)


def group(runs: Sequence[Record], folders: Mapping[str, Path]) -> list[Point]:
    """One point for each recipe and backbone, in the order of their first runs; a run given twice counts once.

    Args:
        runs: the records; `per_example` is a list of scores by test example, or the name of a file with it in the run's folder.
        folders: the folder of each run by its id, where there is one.

    Raises:
        DataError: where the runs are of different tasks, data or metrics.
        StoreError: where a file of results is damaged.
    """
    for field in _SAME:
        found = list(dict.fromkeys(str(run[field]) for run in runs))
        if len(found) > 1:
            raise DataError(f"runs with different {field} cannot stand on one frontier, they are {' and '.join(found[:3])}; draw one for each")
    groups: dict[tuple[str, str], dict[str, Record]] = {}
    for run in runs:
        groups.setdefault((run["backbone"], run["recipe_id"]), {})[run["id"]] = run
    return [_point(sorted(members.values(), key=lambda run: run["seed"]), folders) for members in groups.values()]


def mean_cost(runs: Sequence[Record]) -> Cost:
    """The mean cost of runs of one recipe: None, with the first reason, where any run lacks a value."""
    costs = [Cost.from_json({k: v for k, v in run["cost"].items() if k != "inferences_per_charge"}) for run in runs]
    if len(costs) == 1:
        return costs[0]
    fields: dict[str, Any] = {"meter": costs[0].meter, "protocol": " and ".join(dict.fromkeys(c.protocol for c in costs))}
    reasons = {name: why for cost in reversed(costs) for name, why in cost.reasons.items()}
    meters = list(dict.fromkeys(str(cost.meter.get("name")) for cost in costs))
    if len(meters) > 1:
        reasons |= dict.fromkeys(_ENERGIES, f"its runs were measured with different meters ({', '.join(meters)}); measure them alike")
    pairs = {}
    for name in MEASURED:
        values = [getattr(cost, name) for cost in costs]
        if None in values or (len(meters) > 1 and name in _ENERGIES):
            continue
        same = len(set(values)) == 1  # runs that share one measurement share its interval
        fields[name] = values[0] if same else statistics.fmean(values)
        around = costs[0].intervals.get(name) if same else spread(values)
        if around:
            pairs[name] = list(around)
    return Cost(**fields, reasons=reasons, intervals=pairs)


def _point(runs: list[Record], folders: Mapping[str, Path]) -> Point:
    results = [_results(run, folders) for run in runs]
    whole = None if None in results or len({len(row) for row in results}) != 1 else tuple(results)
    score = statistics.fmean(run["score"] for run in runs)
    validation = [run["validation_score"] for run in runs if run.get("validation_score") is not None]
    interval, how = (intervals.score_interval(whole), intervals.how(whole)) if whole else _recorded(runs)
    low, high = interval or (None, None)
    summary = {
        **{key: runs[0].get(key) for key in ("recipe", "resolved", "recipe_id", "backbone", "task", "metric", "loads_with")},
        "validation_score": statistics.fmean(validation) if len(validation) == len(runs) else None,
        "score": score,
        "score_low": low,
        "score_high": high,
        "score_interval": how,
        "cost": mean_cost(runs).to_json(),
    }
    return Point(tuple(runs), summary, whole)


def _results(run: Record, folders: Mapping[str, Path]) -> tuple[float, ...] | None:
    """Scores by test example, or None where there are none, or their mean is not the score (as with F1)."""
    kept = run.get("per_example")
    if isinstance(kept, str):
        path = folders[run["id"]] / kept if run["id"] in folders else None
        if not path or not path.is_file():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{path.name} of run {run['id']} is damaged ({error}); run its recipe again") from error
    if not kept or abs(statistics.fmean(kept) - run["score"]) > 1e-6:
        return None
    return tuple(map(float, kept))


def _recorded(runs: list[Record]) -> tuple[intervals.Interval | None, str]:
    """The interval without results by example, and how it was made: the run's own, or the runs' own together with the spread over seeds."""
    own = [records.interval(run, "score") for run in runs]
    if len(runs) > 1:
        return intervals.over_seeds([run["score"] for run in runs], own)
    return own[0], runs[0].get("score_interval") or ("as recorded with each run" if own[0] else "none: none was recorded")
