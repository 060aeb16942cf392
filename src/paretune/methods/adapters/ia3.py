"""(IA)³: learned vectors rescale keys, values and the inner activations of the feed-forward.

    k ← l_k ⊙ W_k x,   v ← l_v ⊙ W_v x,   y = W_down (l_ff ⊙ h)

All l start at one, so the adapted model starts as its backbone. Liu et al. 2022 (T-Few), arXiv:2205.05638, section 3.3.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from paretune import anatomy
from paretune.anatomy import Site
from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.roles import Adapter
from paretune.seams import Patch


@dataclasses.dataclass(frozen=True, repr=False)
class IA3(Adapter):
    """Trains one vector per key, value and feed-forward map."""

    card = Card(
        title="(IA)³, infused adapter by inhibiting and amplifying inner activations",
        paper="Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        arxiv="2205.05638",
        equation="k = l_k ⊙ W_k x, v = l_v ⊙ W_v x, y = W_down (l_ff ⊙ h)",
        lowers="E",
        why="Three vectors a layer learn; the backward pass forms no gradient of a weight. Merged, inference costs nothing more.",
        lr=1e-2,
        exact_at_start=True,
    )

    targets: str | tuple[str, ...] = knob("key value down", "linear maps; in the feed-forward the input is rescaled, elsewhere the output")

    def sites(self, model: nn.Module) -> list[Site]:
        sites = anatomy.resolve(model, self.targets, kind="linear")
        part = next((s for s in sites if s.place in anatomy.GROUPS["ffn"] and s.rows is not None), None)
        if part is not None:
            raise Incompatible(f"{self!r}: {part.path} holds {part.place} beside other maps that read the same input; rescale down instead")
        return sites

    def patch(self, site: Site) -> Patch:
        return InputScale(site) if site.place in anatomy.GROUPS["ffn"] else OutputScale(site)


class OutputScale(Patch):
    """y ← l ⊙ y, bias included."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.scale = nn.Parameter(torch.ones(site.out_features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.scale.to(y.dtype)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        excess = self.scale.float() - 1  # l ⊙ (W x + b) = (W + (l − 1) W) x + b + (l − 1) b
        return excess[:, None] * weight, None if bias is None else excess * bias


class InputScale(Patch):
    """y = W (l ⊙ x)."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.scale = nn.Parameter(torch.ones(site.in_features))

    def enter(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        return weight * (self.scale.float() - 1), None  # W diag(l) = W + W diag(l − 1)
