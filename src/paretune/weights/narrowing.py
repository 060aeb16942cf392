"""Structured pruning: whole neurons or heads go, so that shapes shrink, and time with them.

    I_u = E_x |∂L(x)/∂ξ_u|        ξ_u = 1 multiplies the output of unit u

The importance of a unit by the first term of a Taylor series of the loss in its gate: what closing it would change. The
same number stays in every layer, those of the highest importance.
"""

from __future__ import annotations

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
        if isinstance(self.keep, float) and not 0 < self.keep <= 1 or isinstance(self.keep, int) and self.keep < 1:
            raise RecipeError(f"{self!r}: keep is a share above 0 and up to 1.0, as in 0.5, or a whole number from 1")

    def follow(self, trail: Trail) -> Trail:
        require_floats(self, trail)
        name = self.spelling()
        if isinstance(self.keep, int):
            return trail
        if name in trail.narrowed:
            raise Incompatible(f"{self!r}: an earlier {name} kept a share already, and a share of it is unclear; say how many stay, as in {name}(keep=2)")
        return trail.replace(narrowed=(*trail.narrowed, name))

    def number(self, width: int) -> int:
        """How many of `width` units stay: at least one, and no more than there are."""
        wanted = self.keep if isinstance(self.keep, int) else math.floor(round(self.keep * width, 6))
        return min(max(1, wanted), width)

    def importance(self, model: nn.Module, paths: list[str], *, examples: Examples, units: dict[str, int] | None = None) -> dict[str, Tensor]:
        """I_u (units) at each path: its input features, or `units[path]` equal runs of them."""
        batches = calibration.unpadded(model, examples, count=self.samples)
        gradients = calibration.gate_gradients(model, paths, batches=batches, kind=examples.task.kind)
        return {path: _per_unit(g, units[path] if units else g.shape[1]).abs().mean(0) for path, g in gradients.items()}  # E_x |Σ ∂L/∂ξ_j|


def _per_unit(gradients: Tensor, units: int) -> Tensor:
    return gradients.unflatten(1, (units, -1)).sum(-1)  # (N, I) -> (N, units): one gate for all features of a unit


def highest(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` highest scores, in order; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def rows_of(site: Any, chosen: Tensor) -> Tensor:
    """The module's output features that are the place's features `chosen`."""
    return chosen if site.rows is None else chosen.new_tensor(site.rows)[chosen]
