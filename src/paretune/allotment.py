"""How many training examples a time budget allows on this machine: every training phase, teacher and readout is timed on a few batches first."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from paretune import backbones, batches, phases, probe, store, surgery, teachers, training
from paretune.errors import BudgetError
from paretune.methods.modifiers.schedule import Schedule
from paretune.options import Options
from paretune.phases import Plan
from paretune.probe import Pace
from paretune.recipe import is_training
from paretune.roles import Adapter, Modifier, Readout, Transform
from paretune.tasks import Task

LEAST = 64  # training examples below which no frontier is worth drawing
PER_RUN_S = 14.0  # opening, saving and measuring one run of a small model on 2 slow cores; an estimate
RESERVE = 0.88  # of the budget is planned for; the rest is for what a shared machine does meanwhile


@dataclasses.dataclass(frozen=True)
class Allotment:
    """What a time budget buys."""

    max_train: int
    seconds_per_example: float  # of all training phases and readouts together, all epochs and teachers
    fixed_s: float  # this timing, validation, scoring and measuring
    budget_s: float

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.budget_s:.0f} s allow {self.max_train:,} training examples: {1e3 * self.seconds_per_example:.0f} ms each over all trainings, "
            f"about {self.fixed_s:.0f} s for this timing, validation, scoring and measuring (estimates, from five timed batches per training)"
        )


def remembered(out: Path, plans: Sequence[tuple[str, Plan]], *, options: Options) -> int:
    """The number of training examples for a frontier's time budget; timed once per results folder, so that it can be resumed."""
    asked = {"budget_s": options.training.time_budget_s, "runs": [plan.id for _, plan in plans]}
    file = out / "allotment.json"
    if file.is_file() and (known := store.read_json(file))["asked"] == asked:
        return int(known["max_train"])
    found = allot([plan for _, plan in plans], float(options.training.time_budget_s or 0.0), report=options.report)
    if options.report:
        options.report({"said": found.describe()})
    out.mkdir(parents=True, exist_ok=True)
    store.write_json(file, {"asked": asked, **dataclasses.asdict(found)})
    return found.max_train


def allot(plans: Sequence[Plan], budget_s: float, *, report: Callable[[dict[str, Any]], None] | None = None) -> Allotment:
    """The number of training examples with which all plans are done in time.

    Shared phases count once. Each training phase is timed on five batches, from short to long, at the pace it would choose;
    the passes of its teachers and those that fit a readout are counted, too.

    Raises:
        BudgetError: when not even a few examples would be done in time.
    """
    task, begun = plans[0].task, time.perf_counter()
    each, fixed = 0.0, PER_RUN_S * len(plans)
    learning = {plan.identity(k + 1): (plan, k) for plan in plans for k, phase in enumerate(plan.recipe.phases) if not isinstance(phase[0], Transform)}
    passes = {}
    for i, (identity, (plan, k)) in enumerate(learning.items()):
        epochs, seconds, passes[identity] = _timed(plan, k)
        each += seconds
        fixed += passes[identity] * epochs * training.watched_of(task)
        if report:
            report({"measuring": "training speed", "done": i + 1, "of": len(learning)})
    for plan in plans:  # each is scored, as fast as what it learned last
        last = [passes[known] for k in range(len(plan.recipe.phases)) if (known := plan.identity(k + 1)) in passes]
        fixed += (last[-1] if last else 0.0) * (len(task.validation) + len(task.test))
    fixed += time.perf_counter() - begun
    allowed = int((budget_s * RESERVE - fixed) / each) if each else len(task.train)
    if allowed < LEAST:
        needed = (fixed + LEAST * each) / RESERVE
        raise BudgetError(
            f"a budget of {budget_s:.0f} s is too short for these {len(plans)} runs: {needed:.0f} s are needed; give more time, or fewer --recipe"
        )
    return Allotment(min(allowed, len(task.train)), each, fixed, budget_s)


def _timed(plan: Plan, k: int) -> tuple[float, float, float]:
    """(epochs, seconds per training example in all of them, seconds of a forward pass) of the training or readout at index k."""
    phase = plan.recipe.phases[k]
    model = _before(plan, k)
    if isinstance(phase[0], Readout):
        phases.shrink(model, phase[0], _little(plan.task))
        forward = _forward_s(model, plan.task, given=_batches(plan.task, model, 32))
        return 0.0, forward if phase[0].reads_every_row else 0.0, forward
    schedule = next(m for m in phase if isinstance(m, Schedule))
    adapters, _ = phases.decided(model, [m for m in phase if isinstance(m, Adapter)], task=plan.task)
    surgery.attach(model, adapters, head=schedule.head)
    plain = _batches(plan.task, model, schedule.batch)
    pace = probe.choose(model, plan.task.kind, batch=plain[len(plain) // 2], schedule=schedule)
    seconds = sum(probe.step_seconds(model, plan.task.kind, batch=batch, pace=pace, dropout=schedule.dropout) for batch in plain) / _size(plain)
    forward = _forward_s(model, plan.task, given=plain, pace=pace)
    return schedule.epochs, schedule.epochs * seconds + sum(_asked_s(m, plan, schedule, pace) for m in phase if isinstance(m, Modifier)), forward


def _before(plan: Plan, k: int) -> Any:
    """A model of the form that it has before phase k, untrained."""
    model = phases.first_model(plan)
    for (method,) in (p for p in plan.recipe.phases[:k] if not is_training(p)):
        if method.spelling() != "merge":
            phases.shrink(model, method, _little(plan.task) if isinstance(method, Readout) else plan.task)
    return model


def _little(task: Task) -> Task:
    """The task with the first training rows of each label: enough for a readout whose values do not matter."""
    of_label: dict[Any, list[Any]] = {}
    for row in task.train:
        of_label.setdefault(row[task.columns["label"]], []).append(row)
    return dataclasses.replace(task, train=type(task.train)(row for rows in of_label.values() for row in rows[:LEAST]))


def _asked_s(modifier: Modifier, plan: Plan, schedule: Schedule, pace: Pace) -> float:
    """Seconds per training example in which the models that a modifier reads beside are asked: once, or in every epoch."""
    total = 0.0
    for source, _ in modifier.models():
        model = backbones.load(teachers.found(source), plan.task) if isinstance(source, str) else _before(plan, source.phase)
        times = 1.0 if modifier.keeps_outputs else schedule.epochs
        total += times * _forward_s(model, plan.task, given=_batches(plan.task, model, schedule.batch), pace=pace)
    return total


def _forward_s(model: Any, task: Task, *, given: list[dict[str, torch.Tensor]], pace: Pace | None = None) -> float:
    """Seconds per example of a forward pass."""
    with torch.inference_mode(), probe.paced(model.eval(), pace) if pace else contextlib.nullcontext(), probe.autocast(pace):
        started = time.perf_counter()
        for batch in given:
            model(**task.kind.inputs(batch))
        return (time.perf_counter() - started) / _size(given)


def _size(given: list[dict[str, torch.Tensor]]) -> int:
    return sum(len(next(iter(batch.values()))) for batch in given)


def _batches(task: Task, model: Any, size: int) -> list[dict[str, torch.Tensor]]:
    """Five batches of an epoch, from short to long, as a CPU takes them: what they take on average, an epoch's batches take."""
    encodings = training.encode(task, task.train[: 32 * size], model=model)
    lengths = [task.kind.length(e) for e in encodings]
    ordered = sorted(batches.epoch_batches(lengths, None, batch=size, random=batches.generator(0, 0)), key=lambda indices: max(lengths[i] for i in indices))
    picked = [ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.3, 0.5, 0.7, 0.9)]
    return [task.kind.collate([encodings[i] for i in part], surgery.state(model).processor) for indices in picked for part in batches.parts(indices, lengths)]
