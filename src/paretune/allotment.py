"""How many training examples a time budget allows on this machine: every training phase is timed on a few batches first."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from paretune import batches, phases, probe, store, surgery, training
from paretune.errors import BudgetError
from paretune.methods.modifiers.schedule import Schedule
from paretune.options import Options
from paretune.phases import Plan
from paretune.recipe import is_training
from paretune.roles import Adapter

LEAST = 64  # training examples below which no frontier is worth drawing
PER_RUN_S = 24.0  # opening, scoring, saving and measuring one run of a small model, as the demo took it on 2 cores; an estimate
RESERVE = 0.9  # of the budget is planned for; the rest is for what a shared machine does meanwhile


@dataclasses.dataclass(frozen=True)
class Allotment:
    """What a time budget buys."""

    max_train: int
    seconds_per_example: float  # of all training phases together, all epochs
    fixed_s: float  # validation, scoring and measuring
    budget_s: float

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.budget_s:.0f} s allow {self.max_train:,} training examples: {1e3 * self.seconds_per_example:.0f} ms each over all trainings, "
            f"about {self.fixed_s:.0f} s for validation, scoring and measuring (estimates, from five timed batches per training)"
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

    Shared phases count once. Each training phase is timed on five batches, from short to long, at the pace it would choose.

    Raises:
        BudgetError: when not even a few examples would be done in time.
    """
    task = plans[0].task
    each, fixed = 0.0, PER_RUN_S * len(plans)
    trainings = {plan.identity(k + 1): (plan, k) for plan in plans for k, phase in enumerate(plan.recipe.phases) if is_training(phase)}
    for i, (plan, k) in enumerate(trainings.values()):
        schedule, seconds, forward = _timed(plan, k)
        each += schedule.epochs * seconds
        fixed += forward * (schedule.epochs * min(training.WATCHED, len(task.validation)) + len(task.validation) + len(task.test))
        if report:
            report({"measuring": "training speed", "done": i + 1, "of": len(trainings)})
    allowed = int((budget_s * RESERVE - fixed) / each) if each else len(task.train)
    if allowed < LEAST:
        needed = (fixed + LEAST * each) / RESERVE
        raise BudgetError(
            f"a budget of {budget_s:.0f} s is too short for these {len(plans)} runs: {needed:.0f} s are needed; give more time, or fewer --recipe"
        )
    return Allotment(min(allowed, len(task.train)), each, fixed, budget_s)


def _timed(plan: Plan, k: int) -> tuple[Schedule, float, float]:
    """(schedule, seconds per example of a step, of a forward pass) of the training phase at index k."""
    phase = plan.recipe.phases[k]
    schedule = next(m for m in phase if isinstance(m, Schedule))
    model = phases.first_model(plan)
    for (method,) in (p for p in plan.recipe.phases[:k] if not is_training(p)):
        if method.spelling() != "merge":
            phases.shrink(model, method, plan.task)
    surgery.attach(model, [m for m in phase if isinstance(m, Adapter)])
    plain = _batches(plan, model, schedule.batch)
    pace = probe.choose(model, plan.task.kind, batch=plain[len(plain) // 2], schedule=schedule)
    examples = sum(len(next(iter(batch.values()))) for batch in plain)
    seconds = sum(probe.step_seconds(model, plan.task.kind, batch=batch, pace=pace, dropout=schedule.dropout) for batch in plain)
    with torch.inference_mode(), probe.paced(model.eval(), pace), probe.autocast(pace):
        started = time.perf_counter()
        for batch in plain:
            model(**plan.task.kind.inputs(batch))
        forward = time.perf_counter() - started
    return schedule, seconds / examples, forward / examples


def _batches(plan: Plan, model: Any, size: int) -> list[dict[str, torch.Tensor]]:
    """Five batches of an epoch, from short to long: what they take on average, an epoch's batches take."""
    encodings = training.encode(plan.task, plan.task.train[: 32 * size], model=model)
    lengths = [plan.task.kind.length(e) for e in encodings]
    ordered = sorted(batches.epoch_batches(lengths, None, batch=size, random=batches.generator(0, 0)), key=lambda indices: max(lengths[i] for i in indices))
    picked = [ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.3, 0.5, 0.7, 0.9)]
    return [plan.task.kind.collate([encodings[i] for i in indices], surgery.state(model).processor) for indices in picked]
