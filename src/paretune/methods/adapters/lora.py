"""Low-rank adaptation: a frozen weight plus a trained product of two thin matrices.

    h = W x + s · B A x,   A (r, I), B (O, r),   s = alpha / r,  or alpha / √r when rank-stabilized

A starts random (Kaiming uniform) and B at zero, so the adapted model starts as its backbone. Hu et al. 2021,
arXiv:2106.09685, section 4.1; the rank-stabilized factor is Kalajdzievski 2023, arXiv:2312.03732.

The product is taken in the order that counts fewer operations for the shapes at hand (`operations`): thin, as above, or whole, (W + s · B A) x,
which is the same but for rounding.

A rank for each place is a sum: lora(r=4, targets="query") + lora(r=16, targets="value").
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune import anatomy
from paretune.anatomy import Site
from paretune.card import Card, knob
from paretune.patches import Patch, fitting, openness
from paretune.roles import Adapter
from paretune.seams import base_of

WORTH = 1e6  # FLOPs that the other order must save: fewer take no longer than Python's call of a product


@dataclasses.dataclass(frozen=True, repr=False)
class LoRA(Adapter):
    """Trains B and A of every targeted linear map."""

    card = Card(
        title="Low-rank adaptation (LoRA)",
        paper="Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models",
        arxiv="2106.09685",
        equation="h = W x + (alpha / r) B A x",
        lowers="E",
        why="No gradient of a frozen weight is computed and no optimizer state kept for it; merged, inference costs nothing more.",
        lr=3e-3,
        exact_at_start=True,
        note="alpha defaults to 2r; the paper sets alpha to the first r tried and keeps it. It adapts attention alone; all linear maps are the default here, "
        "because adapters on attention alone stay behind full fine-tuning (Dettmers et al. 2023, arXiv:2305.14314, figure 2; docs/folds.md).",
    )
    additive = True

    r: int = knob(8, "rank of the update", low=1, search="2..64 log")
    alpha: float | None = knob(None, "scale of the update, divided by r; None is 2r", low=0.0)
    dropout: float = knob(0.0, "share of the inputs of A set to zero in training", low=0.0, high=1.0)
    targets: str | tuple[str, ...] = knob("linear", "which linear maps: places or module paths", search="query value, attention, ffn, linear")
    rank_stabilized: bool = knob(False, "scale by alpha / √r instead of alpha / r")
    gate: bool = knob(False, "a trained gate σ(w·x + b) for each map and token, as UniPELT has it")

    @property
    def foldable(self) -> bool:  # type: ignore[override]
        """Is the update the same for all tokens?"""
        return not self.gate

    def sites(self, model: nn.Module) -> list[Site]:
        return anatomy.resolve(model, self.targets, kind="linear")

    def patch(self, site: Site) -> Patch:
        return (Gated if self.gate else LowRank)(site, self)


def operations(rows: int, shape: tuple[int, int], *, r: int, learns: bool) -> tuple[int, int]:
    """FLOPs of x Wᵀ + s (x Aᵀ) Bᵀ and of x (W + s B A)ᵀ, for N rows of x and W of shape (O, I), without x Wᵀ and its gradient for x, which both have.

        forward:                   thin 2Nr(I + O)     whole 2rOI + OI
        backward, where A learns:  thin 4Nr(I + O)     whole 4rOI + 2NOI

    Thin, each of the products with A and with B is taken once forward and twice backward: for its input and for its weight. Whole, the same holds of
    B A, and the gradient for A and B comes from that for W + s B A, (O, I), a product as large as x Wᵀ. So without gradients whole is less from about
    N = OI / (I + O) on; where A learns only for r > OI / 3(I + O), too.
    """
    outputs, inputs = shape
    thin, whole = 2 * rows * r * (inputs + outputs), (2 * r + 1) * outputs * inputs
    return (3 * thin, whole + (4 * r + 2 * rows) * outputs * inputs) if learns else (thin, whole)


class LowRank(Patch):
    """s · B A at one linear map."""

    def __init__(self, site: Site, knobs: LoRA) -> None:
        super().__init__(site)
        alpha = 2.0 * knobs.r if knobs.alpha is None else knobs.alpha
        self.scale = alpha / (math.sqrt(knobs.r) if knobs.rank_stabilized else knobs.r)
        self.dropout = knobs.dropout
        self.A = nn.Parameter(torch.empty(knobs.r, site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, knobs.r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.inner(x)
        if h.dtype != y.dtype:
            return y + self.scale * F.linear(h, self.B).to(y.dtype)
        rows, h = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])  # summed up within the product: y is read and written once
        if torch.is_grad_enabled():
            return torch.addmm(rows, h, self.B.T, alpha=self.scale).view(y.shape)
        return rows.addmm_(h, self.B.T.to(h.dtype), alpha=self.scale).view(y.shape)

    def whole(self, x: Tensor, module: nn.Module) -> Tensor | None:
        """(W + s · B A) x + b at a float linear map, all of which this adapts; in 16 bits W + s · B A would be rounded."""
        if torch.compiler.is_compiling():
            return None
        shape = self.site.out_features, self.site.in_features
        learns = torch.is_grad_enabled() and self.A.requires_grad
        thin, whole = operations(x.numel() // shape[1], shape, r=len(self.A), learns=learns)
        if thin < whole + WORTH or self.site.rows is not None or base_of(module) is not nn.Linear or self.training and self.dropout:
            return None
        if not x.dtype == module.weight.dtype == self.A.dtype or x.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type):
            return None
        return F.linear(x, torch.addmm(module.weight, self.B, self.A, alpha=self.scale), module.bias)

    def inner(self, x: Tensor) -> Tensor:
        """A x: (B, T, I) to (B, T, r)."""
        x = F.dropout(x, self.dropout) if self.training and self.dropout else x
        return F.linear(fitting(x, self.A), self.A)

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        return self.scale * (self.B.float() @ self.A.float()), None  # ΔW = s B A


class Gated(LowRank):
    """g · s · B A at one linear map, with g = σ(w·x + b) for each token."""

    def __init__(self, site: Site, knobs: LoRA) -> None:
        super().__init__(site, knobs)
        self.gate = nn.Parameter(torch.zeros(site.in_features + 1))

    def whole(self, x: Tensor, module: nn.Module) -> None:
        return None  # the gate differs from token to token

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + (openness(x, self.gate) * self.scale * F.linear(self.inner(x), self.B)).to(y.dtype)
