"""Structured pruning: whole neurons, heads or layers go, so that shapes shrink, and time with them.

    I_u = E_x |∂L(x)/∂ξ_u|        ξ_u = 1 multiplies the output of unit u

The importance of a unit by the first term of a Taylor series of the loss in its gate: what closing it would change. The
same number stays in every layer, those of the highest importance.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor, nn

from paretune.errors import Incompatible, RecipeError
from paretune.roles import Examples, Trail, Transform
from paretune.weights import calibration
from paretune.weights.maps import require_floats


class Narrowing(Transform):
    """What methods that cut out neurons or heads share."""

    needs_examples = True
    keep: int | float
    samples: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self, self.keep)

    def follow(self, trail: Trail) -> Trail:
        require_floats(self, trail)
        return follow_keep(self, trail, keep=self.keep)

    def number(self, width: int) -> int:
        """How many of `width` units stay."""
        return number(self.keep, width)

    def importance(self, model: nn.Module, paths: list[str], *, examples: Examples, units: dict[str, int] | None = None) -> dict[str, Tensor]:
        """I_u (units) at each path: its input features, or `units[path]` equal runs of them."""
        batches = calibration.unpadded(model, examples, count=self.samples)
        gradients = calibration.gate_gradients(model, paths, batches=batches, kind=examples.task.kind)
        return {path: _per_unit(g, units[path] if units else g.shape[1]).abs().mean(0) for path, g in gradients.items()}  # E_x |Σ ∂L/∂ξ_j|


def check_keep(method: Transform, keep: int | float) -> None:
    """Refuses a `keep` that is neither a share nor a number."""
    if isinstance(keep, float) and not 0 < keep <= 1 or isinstance(keep, int) and keep < 1:
        raise RecipeError(f"{method!r}: keep is a share above 0 and up to 1.0, as in 0.5, or a whole number from 1")


def follow_keep(method: Transform, trail: Trail, *, keep: int | float) -> Trail:
    """The state after a method that kept so many; a share of all is taken once."""
    name = method.spelling()
    if isinstance(keep, int):
        return trail
    if name in trail.narrowed:
        few = dataclasses.replace(method, keep=2)  # type: ignore[type-var]
        raise Incompatible(f"{method!r}: an earlier {name} kept a share already, and a share of it is unclear; say how many stay, as in {few!r}")
    return trail.replace(narrowed=(*trail.narrowed, name))


def number(keep: int | float, width: int) -> int:
    """How many of `width` units stay: at least one, and no more than there are."""
    wanted = keep if isinstance(keep, int) else math.floor(round(keep * width, 6))
    return min(max(1, wanted), width)


def _per_unit(gradients: Tensor, units: int) -> Tensor:
    return gradients.unflatten(1, (units, -1)).sum(-1)  # (N, I) -> (N, units): one gate for all features of a unit


def highest(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` highest scores, in order; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def rows_of(site: Any, chosen: Tensor) -> Tensor:
    """The module's output features that are the place's features `chosen`."""
    return chosen if site.rows is None else chosen.new_tensor(site.rows)[chosen]
