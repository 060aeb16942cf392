"""How hard a task is for a backbone: d90, the least number of trained parameters that gives 90 % of full fine-tuning's score.

    d90 = min { d : score(θ₀ + P θ_d) ≥ 0.9 · score(full) },   scores on the validation split

Aghajanyan et al. 2020, arXiv:2012.13255, section 3; Li et al. 2018, arXiv:1804.08838.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from paretune import backbones, phases, runs
from paretune.errors import Incompatible
from paretune.methods.adapters.intrinsic_dimension import IntrinsicDimension
from paretune.options import Options
from paretune.recipe import Recipe, as_recipe
from paretune.tasks import Task

SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Hardness:
    """What a search for d90 found; d90 is None where no d that was tried is enough."""

    d90: int | None
    full: float  # the validation score of full fine-tuning
    scores: dict[int, float]  # of each d that was tried


def d90(
    task: Task,
    *,
    backbone: str,
    dims: Sequence[int] = (50, 100, 200, 500, 1000, 2000, 5000),
    recipe: str = "intrinsic_dimension",
    full: str = "full",
    out: str | Path = "out",
    seed: int = 0,
    options: Options = Options(),  # noqa: B008
) -> Hardness:
    """The least d of `dims` whose validation score reaches 90 % of full fine-tuning's; larger ones are not tried any more.

    Every run is kept under `out` as `run` keeps it, and one that is there already is not done again.

    Args:
        recipe: with intrinsic_dimension in it, whose d is filled in; a schedule may stand beside it.
        full: what it is compared with.

    Raises:
        Incompatible: for a metric of which less is better, a score that is not above zero, and a recipe without intrinsic_dimension.
    """
    if task.better == "lower":
        raise Incompatible(f"d90 asks for 90 % of a score, and of {task.metric} less is better; give the task a metric of which more is better")
    if not any(isinstance(m, IntrinsicDimension) for phase in as_recipe(recipe).phases for m in phase):
        raise Incompatible(f"d90 fills in the d of intrinsic_dimension, and {recipe} has none; write it, as in intrinsic_dimension + schedule(epochs=5)")
    found = backbones.find(backbone)

    def score(recipe: Recipe) -> float:
        plan = phases.Plan(phases.complete(recipe, found, task=task, options=options), task, found, seed, Path(out), options)
        return float(runs.make(plan, str(recipe)).record["validation_score"])

    whole, scores = score(as_recipe(full)), {}
    if whole <= 0:
        raise Incompatible(f"d90 asks for 90 % of a score, and {full} scored {whole:.3g}; train it longer, or give the task a metric above zero")
    for d in sorted(dims):
        scores[d] = score(_with(as_recipe(recipe), d))
        if scores[d] >= SHARE * whole:
            return Hardness(d, whole, scores)
    return Hardness(None, whole, scores)


def _with(recipe: Recipe, d: int) -> Recipe:
    return Recipe(tuple(tuple(dataclasses.replace(m, d=d) if isinstance(m, IntrinsicDimension) else m for m in phase) for phase in recipe.phases))
