"""What a trial is going to spend, from what the trials before it spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from paretune.searches.journal import SPENDABLE, Entry, Spent

MARGIN = 1.25  # a trial may take so many times its forecast; on a shared machine one in ten takes longer, and is cut
FEW = 3  # trials on as many rows that say more than those on other rows


@dataclasses.dataclass(frozen=True)
class Forecast:
    """From the finished trials: training grows with the rows, everything else (opening, scoring, saving, measuring) does not.

        spent(rows) = (spent - trained) + trained · rows / rows before

    `first` forecasts where there are none yet.
    """

    entries: Sequence[Entry]
    first: Callable[[int], Spent]

    def of(self, recipe: str, rows: int) -> Spent:
        """Of a recipe that was tried: its own figures; of another, what three in four of the others stay below, of those on as many rows where there are a few."""
        done = [e for e in self.entries if e.state == "complete" and e.kind in ("trial", "confirm")]
        own = [e for e in done if e.recipe == recipe]
        alike = [e for e in done if e.rows == rows]
        scaled = [_scaled(e, rows) for e in own or (alike if len(alike) >= FEW else done)]
        return _over(scaled, 1.0 if own else 0.75) if scaled else self.first(rows)

    def tail(self) -> Spent:
        """What a trial spends apart from training, at most as far as is known: it cannot be cut there."""
        done = [_scaled(e, 0) for e in self.entries if e.state == "complete" and e.kind in ("trial", "confirm")]
        return _over(done, 1.0) if done else self.first(0)


def _scaled(entry: Entry, rows: int) -> Spent:
    found: Spent = {}
    for name in SPENDABLE:
        spent = entry.spent.get(name) or 0.0
        trained = min(spent, entry.cost.get(name) or spent)  # phases that another trial did cost this one nothing
        found[name] = spent - trained + trained * rows / max(1, entry.rows)
    return found


def _over(spent: Sequence[Spent], share: float) -> Spent:
    return {name: float(np.quantile([s[name] or 0.0 for s in spent], share)) for name in SPENDABLE}


def times(spent: Mapping[str, float | None], factor: float) -> Spent:
    """So many times as much."""
    return {name: (value or 0.0) * factor for name, value in spent.items()}


def plus(one: Mapping[str, float | None], other: Mapping[str, float | None]) -> Spent:
    """Both together."""
    return {name: (one.get(name) or 0.0) + (other.get(name) or 0.0) for name in SPENDABLE}
