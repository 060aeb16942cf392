"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products with shared factors.

    y ← y + U σ(D y),   D and U each   W = Σ_i A_i ⊗ (s_i t_i),   i = 1 … n,   and a bias

A_i (n, n) is one for all adapters of the model; s_i (in/n, r) and t_i (r, out/n) are each map's own. U's t_i start at
zero, so that the adapted model starts as its backbone. Karimi Mahabadi et al. 2021, arXiv:2106.04647, section 4.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune import anatomy
from paretune.anatomy import Site
from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.roles import Adapter
from paretune.seams import Patch

PLACES = {"compacter": "self.attention_block ffn_block", "compacter++": "ffn_block"}


@dataclasses.dataclass(frozen=True, repr=False)
class Compacter(Adapter):
    """Trains the Kronecker factors of a bottleneck per block, and the layer norms."""

    card = Card(
        title="Compacter",
        paper="Karimi Mahabadi et al. 2021, Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
        arxiv="2106.04647",
        equation="y = y + U σ(D y),  D, U = Σ_i A_i ⊗ (s_i t_i)",
        lowers="E",
        why="A bottleneck of width m over a block of width d learns 3 (d + m) numbers, not 2 d m; a little more work in every later inference.",
        lr=3e-3,
        exact_at_start=True,
        note="The paper starts every factor at random, so that its start is near the backbone; here the second factor of U starts at zero, and it is the "
        "backbone. Cross-attention has no adapter, as in the paper's code.",
    )
    foldable = False
    additive = True

    n: int = knob(4, "number of Kronecker products; divides the width and the bottleneck", low=1, search="2, 4, 8")
    rank: int = knob(1, "rank r of s_i t_i", low=1)
    bottleneck: int = knob(24, "width m of the bottleneck; the paper takes d / 32", low=1, search="8..96 log")
    form: str = knob("compacter", "compacter: after attention and feed-forward; compacter++: after feed-forward", choices=("compacter", "compacter++"))
    norms: bool = knob(True, "train the layer norms too, as the paper does")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck % self.n:
            raise Incompatible(f"{self!r}: the bottleneck is a multiple of n = {self.n}, and {self.bottleneck} is none")

    def sites(self, model: nn.Module) -> list[Site]:
        sites = [dataclasses.replace(site, source=None) for site in anatomy.resolve(model, PLACES[self.form])]
        width = sites[0].in_features
        if width % self.n:
            raise Incompatible(f"{self!r}: the width of the model is a multiple of n = {self.n}, and {width} is none; try n=2")
        return sites

    def selection(self, model: nn.Module) -> list[str]:
        paths = tuple(f"{path}." for path in anatomy.all_norms(model)) if self.norms else ()
        return [name for name, _ in model.named_parameters() if name.startswith(paths)] if paths else []

    def shared(self, model: nn.Module) -> nn.Module:
        return Rules(self)

    def patch(self, site: Site) -> Patch:
        return Hypercomplex(site, self)


class Rules(nn.Module):
    """The A_i (n, n, n) that all adapters share."""

    def __init__(self, knobs: Compacter) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(knobs.n, knobs.n, knobs.n).normal_(std=0.01))


class Hypercomplex(Patch):
    """U σ(D y) of width m at one block of width d."""

    def __init__(self, site: Site, knobs: Compacter) -> None:
        super().__init__(site)
        self.down = Kronecker(site.in_features, knobs.bottleneck, n=knobs.n, rank=knobs.rank)
        self.up = Kronecker(knobs.bottleneck, site.out_features, n=knobs.n, rank=knobs.rank)
        nn.init.zeros_(self.up.t)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        A = self.shared.A
        update = self.up(F.gelu(self.down(y.to(A.dtype), A)), A)  # (B, T, d) -> (B, T, m) -> (B, T, d)
        return y + update.to(y.dtype)


class Kronecker(nn.Module):
    """x W + b with W = Σ_i A_i ⊗ (s_i t_i), never built: x is read as n parts, which s, A and t contract one after the other."""

    def __init__(self, inputs: int, outputs: int, *, n: int, rank: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.empty(n, inputs // n, rank))
        self.t = nn.Parameter(torch.empty(n, rank, outputs // n))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for factor in (*self.s, *self.t):
            nn.init.xavier_uniform_(factor)

    def forward(self, x: Tensor, A: Tensor) -> Tensor:
        parts = x.unflatten(-1, (len(A), -1))  # (B, T, in) -> (B, T, n, in/n)
        y = torch.einsum("...ap,ipr,iab,irq->...bq", parts, self.s, A, self.t)  # y[b, q] = Σ x[a, p] A_i[a, b] (s_i t_i)[p, q]
        return y.flatten(-2) + self.bias
