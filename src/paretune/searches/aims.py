"""What a search aims at: a better score for less of some costs, within limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from paretune.errors import BudgetError
from paretune.pareto import budgets, dominance, records
from paretune.pareto.budgets import Budget
from paretune.searches import halving
from paretune.searches.journal import SPENDABLE, Entry

DEFAULT = "latency_p50_ms"  # what a score is set against where no limit names another cost
FAR = 1e6  # how far a limit is missed by what has no value, in shares of the limit


@dataclasses.dataclass(frozen=True)
class Aims:
    """The score and the costs of a frontier, and the limits that a chosen model keeps.

    `metric` says which way a score is better, `validation` how many rows it is over.
    """

    metric: str
    costs: tuple[str, ...]
    under: Budget | None = None
    validation: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives, the score first."""
        return ("score", *self.costs)

    @property
    def better(self) -> list[str]:
        """Of each objective, which way is better."""
        return [records.named(name, self.metric).better for name in self.names]

    @property
    def bounds(self) -> list[float]:
        """Of each objective its limit, infinite where it has none."""
        known = {limit.quantity.name: limit.bound for limit in self.under.limits} if self.under else {}
        return [known.get(name, math.inf) for name in self.names]

    def values(self, entry: Entry) -> list[float | None]:
        """The objectives of a trial."""
        return [records.value(entry.record, name) for name in self.names]

    def limits(self, entry: Entry) -> dict[str, float]:
        """By how much a trial misses each limit, in shares of the limit; 0 where it keeps it."""
        return {limit.quantity.name: min(FAR, limit.excess(entry.record) / limit.bound) for limit in self.under.limits} if self.under else {}

    def keeps(self, entry: Entry) -> bool:
        """Does it keep every limit?"""
        return not any(self.limits(entry).values())

    def losses(self, entries: Sequence[Entry]) -> np.ndarray:
        """(entries, objectives), lower is better."""
        return records.losses([e.record for e in entries], self.names)

    def order(self, entries: Sequence[Entry]) -> list[Entry]:
        """From best to worst."""
        found = halving.order(self.losses(entries), [sum(self.limits(e).values()) for e in entries]) if entries else []
        return [entries[i] for i in found]

    def front(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those that no other one beats, out of those that keep all limits (of all, where none does), the best score first."""
        kept = [e for e in entries if self.keeps(e)] or list(entries)
        if not kept:
            return []
        losses = self.losses(kept)
        standing = np.flatnonzero(dominance.non_dominated(losses))
        return [kept[i] for i in sorted(standing, key=lambda i: tuple(losses[i]))]

    def hopeless(self, entries: Sequence[Entry], rows: int) -> list[str]:
        """Recipes that even at their best would be beaten, with all rows, by one that was tried with all of them."""
        if self.better[0] == "lower":  # scores such as perplexity have no known spread by chance
            return []
        tops = self.losses([e for e in entries if e.rows == rows])
        noise = 1 / np.sqrt(max(1, self.validation))  # two standard errors of a share, where they are largest
        found = []
        for entry in {e.recipe: e for e in entries if e.rows < rows}.values():
            scores = {e.rows: e.score for e in entries if e.recipe == entry.recipe and e.score is not None}
            best = self.losses([entry])[0]
            best[0] = -halving.hope(scores, rows, noise=noise)
            if halving.beaten(best, tops):
                found.append(entry.recipe)
        return found


def spendable(text: str) -> dict[str, float]:
    """A search's budget, "train_s=3600, train_energy_j=20000": what all of it may spend, opening, scoring and measuring included.

    Raises:
        BudgetError: for a quantity that a search does not spend.
    """
    limits = budgets.parse(text).limits
    wrong = next((limit.quantity.name for limit in limits if limit.quantity.name not in SPENDABLE), None)
    if wrong:
        raise BudgetError(f"a search spends {', '.join(SPENDABLE)}, and {wrong} is a cost of a model: state it in --under")
    return {limit.quantity.name: limit.bound for limit in limits}
