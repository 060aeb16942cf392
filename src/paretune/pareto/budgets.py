"""Budgets: "latency_p50_ms=20, stored_mb=30" as limits, what fits them, and what comes nearest where nothing does.

A limit is a ceiling for what is better low (latency, bytes, joules) and a floor for what is better high (score, throughput).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from paretune.errors import BudgetError
from paretune.pareto.records import Record, named, reason, value
from paretune.units import Quantity, quantity, show

_EXAMPLE = "as in latency_p50_ms=20, stored_mb=30"


@dataclasses.dataclass(frozen=True)
class Limit:
    """One quantity and the worst value it may have, in the quantity's unit."""

    quantity: Quantity
    bound: float

    def __str__(self) -> str:
        sign = "<=" if self.quantity.better == "lower" else ">="
        return f"{self.quantity.name} {sign} {self.bound:.10g}"

    def excess(self, record: Record) -> float:
        """How far the record is on the wrong side of the bound, in the quantity's unit: 0 where it fits, infinite where it has no value."""
        got = value(record, self.quantity.name)
        if got is None:
            return math.inf
        return max(0.0, got - self.bound if self.quantity.better == "lower" else self.bound - got)

    def complaint(self, record: Record) -> str:
        """Why the record does not keep this limit, empty where it does."""
        got, unit = value(record, self.quantity.name), self.quantity.unit
        if got is None:
            return f"{self.quantity.name} is not known: {reason(record, self.quantity.name)}"
        excess = self.excess(record)
        if not excess:
            return ""
        side = "over" if self.quantity.better == "lower" else "under"
        return f"{self.quantity.name} is {_show(got, unit)}, {_show(excess, unit)} {side} the limit of {_show(self.bound, unit)}"


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits that must all be kept; the first one also breaks ties between equal scores."""

    limits: tuple[Limit, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.limits))

    @property
    def text(self) -> str:
        """The spelling `parse` reads."""
        return ", ".join(f"{limit.quantity.name}={limit.bound:.10g}" for limit in self.limits)


def parse(text: str, metric: str = "") -> Budget:
    """The budget a text states, "latency_p50_ms=20, stored_mb=30"; a number may bear the quantity's own unit.

    `metric` says which way a score is better; unnamed, higher.

    Raises:
        BudgetError: for an empty text, a name that is no quantity, a name given twice or a value that is no positive number.
    """
    limits: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, number = (piece.strip() for piece in part.partition("="))
        if not sign:
            raise BudgetError(f"{part!r} is no limit; write a quantity, = and a number, {_EXAMPLE}")
        if quantity(name).name in limits:
            raise BudgetError(f"{text!r}: {name} is given twice; keep one of the two limits")
        limits[name] = _number(number, quantity(name))
    return of(limits, metric)


def of(limits: Mapping[str, float], metric: str = "") -> Budget:
    """The budget of limits by name, {"latency_p50_ms": 20}; `metric` as in `parse`.

    Raises:
        BudgetError: for no limit at all, a name that is no quantity, or a value that is no positive number.
    """
    if not limits:
        raise BudgetError(f"a budget needs at least one limit, {_EXAMPLE}")
    return Budget(tuple(Limit(named(name, metric), _number(bound, quantity(name))) for name, bound in limits.items()))


def fits(record: Record, budget: Budget) -> bool:
    """Does the record keep every limit? A quantity that is None never does; `misses` says why not."""
    return not misses(record, budget)


def misses(record: Record, budget: Budget) -> list[str]:
    """One sentence for each limit the record does not keep."""
    return [complaint for limit in budget.limits if (complaint := limit.complaint(record))]


def best(records: Sequence[Record], budget: Budget) -> int:
    """The index of the best record that fits: the best score, then the better value of the first limit's quantity.

    The choice is made on the validation score where every record that fits has one, so that the test score reported for it
    stays honest; else on the score itself.

    Raises:
        BudgetError: where nothing fits, with the nearest record and by how much it misses.
    """
    fitting = [i for i, record in enumerate(records) if fits(record, budget)]
    if not fitting:
        raise BudgetError(_nothing(records, budget))
    name = chosen_on([records[i] for i in fitting])
    first = budget.limits[0].quantity

    def rank(i: int) -> tuple[float, float]:
        return up(value(records[i], name), named("score", records[i].get("metric", ""))), up(value(records[i], first.name), first)

    return max(fitting, key=rank)


def up(number: float, of_quantity: Quantity) -> float:
    """The number, turned around where lower is better: the larger, the better."""
    return number if of_quantity.better == "higher" else -number


def chosen_on(records: Sequence[Record]) -> str:
    """The score by which these records are ranked: `validation_score` if all have one, else `score`."""
    return "validation_score" if all(r.get("validation_score") is not None for r in records) else "score"


def _nothing(records: Sequence[Record], budget: Budget) -> str:
    if not records:
        return f"nothing fits {budget}: there are no runs yet"
    nearest = min(records, key=lambda record: _distance(record, budget))
    return f"nothing fits {budget}; nearest is {nearest['recipe']}, whose {' and '.join(misses(nearest, budget))}. Loosen the budget or add recipes"


def _distance(record: Record, budget: Budget) -> tuple[int, float]:
    """How many limits have no value, then the sum of the relative excesses."""
    excesses = [limit.excess(record) / limit.bound for limit in budget.limits]
    return sum(map(math.isinf, excesses)), sum(e for e in excesses if math.isfinite(e))


def _number(given: float | str, of_quantity: Quantity) -> float:
    text = str(given).strip().removesuffix(of_quantity.unit).strip() if of_quantity.unit else str(given)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        unit = f" of {of_quantity.unit}" if of_quantity.unit else ""
        raise BudgetError(f"{of_quantity.name} needs a positive number{unit}, not {str(given)!r}; {_EXAMPLE}")
    return number


def _show(number: float, unit: str) -> str:
    return show(number, unit, digits=4) if unit or number >= 1 else f"{number:.4f}"
