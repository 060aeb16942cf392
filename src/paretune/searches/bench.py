"""Where a recipe is tried: on this machine, as a run in a results folder. `Bench` is what the searcher asks of such a place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from paretune import flow, runs, store
from paretune.errors import ParetuneError, StoreError
from paretune.meters import clock, energy
from paretune.meters.cost import MEASURED, Cost
from paretune.meters.protocol import PROTOCOLS
from paretune.options import Options
from paretune.pareto.ledger import SUMS
from paretune.phases import Plan
from paretune.planning import allotment
from paretune.searches import journal
from paretune.searches.journal import Spent
from paretune.searches.space import Space
from paretune.store import Run
from paretune.tasks import Task

TRAINED = ("train_s", "train_cpu_s", "train_energy_j", "train_peak_mb", "trainable_parameters", "head_parameters", "stored_mb")  # known unmeasured
ENDLESS_S = 1e9  # a time budget that cuts nothing
MEASURE_S = 40.0  # measuring one small model on two slow cores; an estimate


class Cut(Exception):  # noqa: N818 - no error: the work was stopped where it stood
    """Raised by a watcher: the trial has no more to spend than it has `spent`."""

    def __init__(self, reason: str, spent: Spent) -> None:
        super().__init__(reason)
        self.spent = spent


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a trial: fields of an Entry."""

    state: str  # complete, failed or cut
    spent: Spent
    reason: str = ""
    run: str = ""
    metric: str = ""
    score: float | None = None  # on validation
    cost: dict[str, Any] = dataclasses.field(default_factory=dict)
    phases: list[dict[str, Any]] = dataclasses.field(default_factory=list)


Watch = Callable[[Spent], None]


class Bench(Protocol):
    """A place to try recipes. Whatever it does between two answers is told as spent with the later one."""

    measure_s: float  # how long measuring a recipe takes, where its trials leave it out; an estimate

    def key(self, recipe: str, rows: int) -> str:
        """The id of its run: equal for recipes that come to the same. Incompatible where it is none."""

    def timing(self, recipe: str) -> tuple[Spent, Callable[[int], Spent]]:
        """What timing a recipe on a few batches spent, and its forecast for a number of rows."""

    def work(self, recipe: str, rows: int, *, seed: int, watch: Watch) -> Outcome:
        """Trains, shrinks, scores, measures. `watch` is told what was spent, and may raise Cut."""

    def measure(self, ids: Sequence[str], *, watch: Watch) -> Spent:
        """Measures finished runs together, interleaved."""


class Live:
    """This machine.

    Args:
        space: of the draws that are tried.
        backbones: by the name that draws have for it, where it lies here; the first is that of draws which name none.
        costs: what the search looks at; where all of it is known without, the inference of trials is not measured.
    """

    def __init__(self, task: Task, *, space: Space, backbones: Mapping[str, str], out: Path, options: Options, costs: Sequence[str]) -> None:
        self.task, self.space, self.backbones, self.out, self.options, self.costs = task, space, backbones, out, options, costs
        self.measured = not set(costs) <= set(TRAINED)
        metering = options.metering
        window_s = PROTOCOLS[metering.protocol].window_s
        self.meter = energy.find(metering.power, metering.profile, device=options.compute.device, window_s=window_s)
        self.measure_s = 0.0 if self.measured else MEASURE_S
        self._like: dict[str, str] = {}  # of models that are made alike a measured run; filled when it is first asked
        self._mark = self.meter.now()  # until when all that was spent is told; a trial is charged what led to it, too

    def key(self, recipe: str, rows: int) -> str:
        """The id of its run."""
        return self._plan(recipe, rows, 0)[1].id

    def timing(self, recipe: str) -> tuple[Spent, Callable[[int], Spent]]:
        """Five batches of each training phase."""
        found = allotment.allot([self._plan(recipe, len(self.task.train), 0)[1]], ENDLESS_S)
        spent = self._told()
        wall = spent["train_s"] or 1.0

        def forecast(rows: int) -> Spent:
            seconds = found.fixed_s + rows * found.seconds_per_example
            return {name: None if value is None else seconds * value / wall for name, value in spent.items()}

        return spent, forecast

    def work(self, recipe: str, rows: int, *, seed: int, watch: Watch) -> Outcome:
        """A run in the results folder, as `run` makes it."""
        text, plan = self._plan(recipe, rows, seed)
        plan = dataclasses.replace(plan, options=self._watched(watch))
        try:
            watch(self._since())
            made = runs.make(plan, text)
            watch(self._since())
            if self.measured and not runs.is_measured(made):
                made = self._measured(made, plan)
        except Cut as cut:
            return Outcome("cut", self._told(), str(cut), phases=_done(plan))
        except StoreError:
            raise
        except (ParetuneError, RuntimeError, MemoryError) as error:
            return Outcome("failed", self._told(), " ".join(str(error).split()), phases=_done(plan))
        score = made.record["validation_score"]
        if score is None:
            return Outcome("failed", self._told(), "the task has no validation rows to choose by", phases=_done(plan))
        return Outcome("complete", self._told(), "", made.id, made.record["metric"], score, made.cost.to_json(), _done(plan))

    def measure(self, ids: Sequence[str], *, watch: Watch) -> Spent:
        """The runs of these ids, interleaved; a recipe's runs share one measurement."""
        self._measure([Run.read(self.out / "runs" / id) for id in ids], self.task, self._watched(watch))
        return self._told()

    def _measured(self, made: Run, plan: Plan) -> Run:
        """The run with its costs: those of a measured run that is made alike, where there is one here; a model's work does not depend on what it learned."""
        if not self._like:
            protocol = self.options.metering.protocol
            known = [run for run in store.finished(self.out) if runs.is_measured(run) and run.cost.protocol == protocol]
            self._like = {_work(run): run.id for run in known}
        work = _work(made)
        if work in self._like:
            return _measured_as(made, Run.read(self.out / "runs" / self._like[work]))
        (made,) = self._measure([made], plan.task, plan.options, peaks="peak_memory_mb" in self.costs)
        self._like[work] = made.id
        return made

    def _measure(self, made: list[Run], task: Task, options: Options, *, peaks: bool = True) -> list[Run]:
        report = options.report or (lambda info: None)
        return runs.measure(made, task, options=options, peaks=peaks, progress=lambda what, i, n: report({"measuring": what, "done": i, "of": n}))

    def _plan(self, draw: str, rows: int, seed: int) -> tuple[str, Plan]:
        name, recipe = self.space.parted(draw)
        backbone = self.backbones[name or next(iter(self.backbones))]
        training = dataclasses.replace(self.options.training, max_train=rows, time_budget_s=None)
        options = dataclasses.replace(self.options, training=training)
        return flow.plan_frontier(self.task, backbone=backbone, recipes=[recipe], seeds=seed + 1, out=self.out, options=options)[-1]

    def _watched(self, watch: Watch) -> Options:
        told = self.options.report

        def report(info: dict[str, Any]) -> None:
            watch(self._since())
            if told:
                told(info)

        return dataclasses.replace(self.options, report=report)

    def _told(self) -> Spent:
        """What was spent since this was asked last; from now on the next trial counts."""
        before, self._mark = self._mark, self.meter.now()
        return self._between(before, self._mark)

    def _since(self) -> Spent:
        return self._between(self._mark, self.meter.now())

    def _between(self, start: clock.Moment, end: clock.Moment) -> Spent:
        return dict(zip(journal.SPENDABLE, (end.wall_s - start.wall_s, end.cpu_s - start.cpu_s, self.meter.between(start, end).value), strict=True))


def _done(plan: Plan) -> list[dict[str, Any]]:
    """What the ledger counts of the phases of a plan that are finished; of a trial that was cut, those before."""
    kept = ("id", "spelling", "examples", *SUMS)
    files = [plan.folder(k) / "phase.json" for k in range(1, 1 + len(plan.recipe.phases))]
    return [{name: phase.get(name) for name in kept} for file in files if file.is_file() for phase in [store.read_json(file)]]


def _work(run: Run) -> str:
    """A name for what a measurement of the run does: a model of some structure, on some examples, on a processor."""
    examples, where = store.read_json(run.folder / "sample.json"), run.record["environment"]["device"]
    return store.identity({"structure": store.structure(run.model), "task": run.record["task"], "examples": examples, "device": where})


def _measured_as(made: Run, other: Run) -> Run:
    """The run with what was measured of the inference of another one that is made alike."""
    shared = [name for name in MEASURED if name not in TRAINED]
    own, theirs = made.record["cost"], other.record["cost"]
    cost = {**own, **{name: theirs[name] for name in shared}, "meter": theirs["meter"], "protocol": theirs["protocol"]}
    for part in ("reasons", "intervals"):
        cost[part] = {k: v for k, v in own[part].items() if k not in shared} | {k: v for k, v in theirs[part].items() if k in shared}
    record = {**made.record, "cost": Cost.from_json(cost).to_json(), "cost_measured_on": other.record.get("cost_measured_on", other.id)}
    store.write_json(made.folder / "run.json", record)
    return Run(made.folder, record)
