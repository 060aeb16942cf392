"""Weight imprinting: a class's weight is the mean direction of its examples, so it answers at once and may be tuned later.

    z̄ = z / |z|,   w_k = mean of class k's z̄, at length one,   logits = s · w_k · z̄

Qi, Brown & Lowe 2018, arXiv:1712.07136, sections 3.1 and 3.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from paretune.anatomy import Site
from paretune.card import Card, knob
from paretune.readouts.heads import ClassVectors, last_map
from paretune.seams import Patch


@dataclasses.dataclass(frozen=True, repr=False)
class Imprint(ClassVectors):
    """Writes class means as the head's weights, which score by cosine."""

    card = Card(
        title="Weight imprinting",
        paper="Qi, Brown & Lowe 2018, Low-Shot Learning with Imprinted Weights",
        arxiv="1712.07136",
        equation="logits = s · w_k · z / |z|,  w_k = mean of z / |z| at length one",
        lowers="DE",
        why="One forward pass over a few examples gives a head that answers, or a start from which training is short.",
        note="In the paper s is learned; here it is a knob and part of the weights, whose lengths are free once they are tuned (imprint | full).",
    )
    unit = True

    scale: float = knob(10.0, "s: how sharp the probabilities are, and the length of the weights that tuning starts from", low=0.1, search="1..64 log")
    pooling: str = knob("auto", "over tokens; auto is mean in text encoders, else the model's own", choices=("auto", "model", "cls", "mean"))

    def sites(self, model: nn.Module) -> list[Site]:
        return [*super().sites(model), Site(place="unit", path=last_map(model))]

    def patch(self, site: Site) -> Patch:
        return Unit(site) if site.place == "unit" else super().patch(site)

    def vectors(self, means: Tensor) -> tuple[Tensor, None]:
        return self.scale * F.normalize(means, dim=-1), None


class Unit(Patch):
    """Brings what a map reads, x (..., D), to length one."""

    wraps = True

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        return forward(F.normalize(x, dim=-1))
