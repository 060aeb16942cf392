"""How many training examples a time budget allows on this machine: a few batches of every training phase and readout are timed first."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paretune import store, training
from paretune.errors import BudgetError
from paretune.options import Options
from paretune.phases import Plan
from paretune.planning import rehearsal
from paretune.planning.rehearsal import Rehearsed
from paretune.roles import Readout, Transform

LEAST = 64  # training examples below which no frontier is worth drawing
PER_RUN_S = 14.0  # opening, saving and measuring one run of a small model on 2 slow cores; an estimate
RESERVE = 0.88  # of the budget is planned for; the rest is for what a shared machine does meanwhile


@dataclasses.dataclass(frozen=True)
class Allotment:
    """What a time budget buys."""

    max_train: int
    recipes: int  # so many from the beginning of the list
    seconds_per_example: float  # of all training phases and readouts together, all epochs and teachers
    fixed_s: float  # this timing, validation, scoring and measuring
    budget_s: float

    def describe(self, recipes: Sequence[str]) -> str:
        """One line for people, and one for what is left out of these recipes."""
        allowed = (
            f"{self.budget_s:.0f} s allow {self.max_train:,} training examples: {1e3 * self.seconds_per_example:.0f} ms each over all trainings, "
            f"about {self.fixed_s:.0f} s for this timing, validation, scoring and measuring (estimates, from a rehearsal of each training)"
        )
        left_out = recipes[self.recipes :]
        return allowed + f"\nwarning: no time for all recipes; left out, from the end of the list: {', '.join(left_out)}" * bool(left_out)


def remembered(out: Path, plans: Sequence[tuple[str, Plan]], *, options: Options) -> tuple[int, int]:
    """(training examples, recipes from the beginning) for a frontier's time budget; timed once per results folder, so that it can be resumed."""
    asked = {"budget_s": options.training.time_budget_s, "runs": [plan.id for _, plan in plans]}
    file = out / "allotment.json"
    if file.is_file() and (known := store.read_json(file))["asked"] == asked:
        return int(known["max_train"]), int(known["recipes"])
    found = allot([plan for _, plan in plans], float(options.training.time_budget_s or 0.0), report=options.report)
    if options.report:
        options.report({"said": found.describe(list(dict.fromkeys(text for text, _ in plans)))})
    out.mkdir(parents=True, exist_ok=True)
    store.write_json(file, {"asked": asked, **dataclasses.asdict(found)})
    return found.max_train, found.recipes


def allot(plans: Sequence[Plan], budget_s: float, *, report: Callable[[dict[str, Any]], None] | None = None) -> Allotment:
    """The number of training examples with which all plans are done in time; where even a few are too many, recipes at the end are left out.

    Shared phases count once. Each training phase is rehearsed: three batches of it, from short to long, with all that its modifiers do beside;
    the passes that fit a readout are counted, too.

    Raises:
        BudgetError: when not even a few examples would be done in time by half of the recipes.
    """
    begun, rehearsed = time.perf_counter(), dict[str, Rehearsed]()
    learning = {plan.identity(k + 1): (plan, k) for plan in plans for k, phase in enumerate(plan.recipe.phases) if not isinstance(phase[0], Transform)}
    for i, (identity, (plan, k)) in enumerate(learning.items()):
        rehearsed[identity] = _rehearsed(plan, k)
        if report:
            report({"measuring": "training speed", "done": i + 1, "of": len(learning)})
    spent = time.perf_counter() - begun
    rows, recipes = len(plans[0].task.train), list(dict.fromkeys(plan.recipe for plan in plans))
    for count in range(len(recipes), (len(recipes) - 1) // 2, -1):
        allowed, each, fixed = _allowed([plan for plan in plans if plan.recipe in recipes[:count]], rehearsed, budget_s, spent=spent)
        if allowed >= min(LEAST, rows):
            return Allotment(min(allowed, rows), count, each, fixed, budget_s)
    needed = (fixed + LEAST * each) / RESERVE
    raise BudgetError(f"a budget of {budget_s:.0f} s is too short: {needed:.0f} s are needed for {count} of {len(recipes)} recipes; give more time")


def _allowed(plans: Sequence[Plan], rehearsed: dict[str, Rehearsed], budget_s: float, *, spent: float) -> tuple[int, float, float]:
    """(how many training examples, seconds for each, seconds for all else)."""
    task, without = plans[0].task, spent + PER_RUN_S * len(plans)
    parts = [[known for k in range(len(plan.recipe.phases)) if (known := plan.identity(k + 1)) in rehearsed] for plan in plans]
    trainings = [rehearsed[known] for known in dict.fromkeys(known for part in parts for known in part)]
    each = sum(found.each().wall_s for found in trainings)
    for part in parts:  # each is scored, as fast as what it learned last
        without += (rehearsed[part[-1]].answer.wall_s if part else 0.0) * (len(task.validation) + len(task.test))
    allowed, fixed = LEAST, without
    for _ in range(2):  # how many rows are watched depends on how many are trained on
        watched = training.watched_of(task.subset(max(LEAST, allowed)))
        fixed = without + sum(found.training(0, watched=watched).wall_s for found in trainings)
        allowed = int((budget_s * RESERVE - fixed) / each) if each else len(task.train)
    return allowed, each, fixed


def _rehearsed(plan: Plan, k: int) -> Rehearsed:
    """What the training or readout at index k takes here."""
    phase, model = plan.recipe.phases[k], rehearsal.before(plan, k)
    if isinstance(phase[0], Readout):
        return rehearsal.readout(model, phase[0], task=plan.task)
    return rehearsal.rehearse(model, plan, k=k)
