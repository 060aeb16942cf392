"""Front: the runs of one task as points, the ones no other beats, and the best under a budget."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paretune.errors import BudgetError
from paretune.meters.battery import Battery, charge
from paretune.meters.cost import Cost
from paretune.meters.reading import Reading, missing
from paretune.pareto import budgets, dominance, intervals, points, records
from paretune.pareto import ledger as ledgers
from paretune.pareto.budgets import Budget
from paretune.pareto.ledger import Ledger
from paretune.pareto.points import Point
from paretune.pareto.records import Record
from paretune.units import quantity, read

CHARGE = "inferences_per_charge"
_FULL = re.compile(r"full(\(.*?\))?( \+ schedule\(.*?\))?")


class Front:
    """Runs of one task, grouped by recipe.

    Args:
        runs: records of run.json (plain dicts), or `store.Run`s; `under` gives back what was given.
        battery: the battery that inferences are counted on, "15 Wh"; without one they are not counted.
        rate: inferences a second, "1/s" or a number; None for saturated (one after the other).
        folder: the folder that holds `runs/`, where plain records name files beside them.

    Raises:
        DataError: where the runs are of different tasks, data or metrics, or there are none.
        BudgetError: for a battery or a rate that cannot be read.
    """

    def __init__(
        self, runs: Sequence[Any], battery: str | Battery | None = None, *, rate: str | float | None = None, folder: str | Path | None = None
    ) -> None:
        if not runs:
            raise BudgetError("a frontier needs at least one run; none was given")
        self.records: list[Record] = [run if isinstance(run, dict) else run.record for run in runs]
        self._given = {record["id"]: run for record, run in zip(self.records, runs, strict=True)}
        self.metric: str = self.records[0]["metric"]
        self.battery = Battery.parse(battery) if isinstance(battery, str) else battery
        # "15Wh" is written as people write it, "15 Wh"
        self.battery_label = re.sub(r"(?<=\d)(?=[A-Za-z])", " ", battery) if isinstance(battery, str) else ""
        if isinstance(battery, Battery):
            self.battery_label = f"{battery.capacity_j / 3600:.3g} Wh"
        self.asked_rate_per_s = read(rate, "rate") if isinstance(rate, str) else rate
        folders = {id: Path(folder) / "runs" / id for id in self._given} if folder else {}
        folders |= {id: run.folder for id, run in self._given.items() if not isinstance(run, dict)}
        grouped = points.group(self.records, folders)
        # without idle power a rate means nothing, and only the saturated case can be drawn
        self.rate_per_s = self.asked_rate_per_s if any(_idles(point) for point in grouped) else None
        self._points = [self._with_charge(point) for point in grouped]

    def points(self, x: str, y: str = "score") -> list[Point]:
        """The points that have both quantities, in the order of x."""
        known = [p for p in self._points if p.value(quantity(x).name) is not None and p.value(quantity(y).name) is not None]
        return sorted(known, key=lambda p: p.value(x))

    def frontier(self, x: str, y: str = "score", *more: str) -> list[Point]:
        """The points that no other one beats in these quantities, in the order of x."""
        known = self.points(x, y)
        mask = dominance.non_dominated(records.losses([p.summary for p in known], (x, y, *more)))
        return [p for p, stands in zip(known, mask, strict=True) if stands]

    def knee(self, x: str, y: str = "score") -> Point:
        """The frontier's point furthest from the line between its ends: past it, each step costs more for less."""
        known = self.points(x, y)
        return known[dominance.knee(records.losses([p.summary for p in known], (x, y)))]

    def hypervolume(self, worst: dict[str, float]) -> float:
        """The volume the points cover up to a worst corner, {"latency_p50_ms": 50, "score": 0.5}, in the product of the units."""
        losses = records.losses([p.summary for p in self._points], tuple(worst))
        corner = [-budgets.up(bound, records.named(name, self.metric)) for name, bound in worst.items()]
        return dominance.hypervolume(losses, np.array(corner))

    def under(self, **limits: float) -> Any:
        """The best run that fits, `under(latency_p50_ms=20, stored_mb=30)`: of the best point, the run best on validation.

        Raises:
            BudgetError: for a name that is no quantity, or where nothing fits (it names the nearest).
        """
        return self.run(self.best(budgets.of(limits, self.metric)))

    def under_text(self, text: str) -> Any:
        """The best run that fits a budget written as "latency_p50_ms=20, stored_mb=30"."""
        return self.run(self.best(budgets.parse(text, self.metric)))

    def best(self, budget: Budget) -> Point:
        """The best point that fits the budget by its means over seeds; see `budgets.best` for how it is chosen."""
        return self._points[budgets.best([p.summary for p in self._points], budget)]

    def run(self, point: Point) -> Any:
        """Of a point's runs, the one with the best validation score (else score), as it was given."""
        name = budgets.chosen_on(point.runs)
        score = records.named("score", self.metric)
        return self._given[max(point.runs, key=lambda run: budgets.up(run[name], score))["id"]]

    @property
    def all(self) -> list[Point]:
        """Every point, in the order of the runs."""
        return list(self._points)

    @property
    def reference(self) -> Point | None:
        """The point of full fine-tuning with nothing after it, if it was run."""
        full = [p for p in self._points if _FULL.fullmatch(p.recipe)]
        return min(full, key=lambda p: len(p.recipe), default=None)

    @property
    def ledger(self) -> Ledger:
        """What the whole search cost, shared phases counted once."""
        return ledgers.of(self.records)

    def difference(self, point: Point, other: Point) -> tuple[float, float, float] | None:
        """The score of point minus that of other with its paired 95 % interval; None where results by test example were not kept."""
        if point.results is None or other.results is None or len(point.results[0]) != len(other.results[0]):
            return None
        return intervals.difference(point.results, other.results)

    def inferences(self, cost: Cost) -> Reading:
        """How many inferences of that cost the battery buys at the rate, or why that is not known."""
        if self.battery is None:
            return missing("", "no battery was given; give one, as in 15Wh")
        return charge(self.battery, cost, rate_per_s=self.rate_per_s).inferences

    def report(self, folder: str | Path, budgets_given: Sequence[str] = ()) -> list[Path]:
        """Writes frontier.png, frontier.html and runs.csv into the folder, with the best run under each budget; returns their paths."""
        from paretune.reports import page, plot, table

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        limits = [budgets.parse(text, self.metric) for text in budgets_given]
        return [
            plot.save(self, folder / "frontier.png"),
            page.save(self, folder / "frontier.html", budgets=limits),
            table.save(self, folder / "runs.csv"),
        ]

    def _with_charge(self, point: Point) -> Point:
        cost = points.mean_cost(point.runs)
        count = self.inferences(cost)
        data = cost.to_json() | {CHARGE: count.value}
        if count.value is None:
            data["reasons"][CHARGE] = count.reason
        elif count.interval[0] < count.interval[1]:
            data["intervals"][CHARGE] = list(count.interval)
        return dataclasses.replace(point, summary={**point.summary, "cost": data})


def _idles(point: Point) -> bool:
    """Is the idle power known, or stated by somebody, and with it what an inference at a rate costs?"""
    cost = point.summary["cost"]
    return cost["meter"].get("idle_w") is not None and not cost["meter"].get("assumed") and cost["net_energy_per_inference_j"] is not None
