"""Magnitude pruning: the smallest weights become zero.

    W_ij ← W_ij · 1[|W_ij| is not among the ⌊s n⌋ lowest of n]        n weights: of a map, of a row of it, or of all maps

With a pattern n:m, of each m weights of a row that follow each other the n largest stay. Han et al. 2015,
arXiv:1506.02626, section 3. A later training phase leaves zeros zero, as there.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from paretune import surgery
from paretune.card import Card, knob
from paretune.errors import RecipeError
from paretune.roles import Examples
from paretune.weights.maps import rewritable
from paretune.weights.sparsity import Pruner, SparseLinear, keep_largest, part, require_pattern


@dataclasses.dataclass(frozen=True, repr=False)
class Magnitude(Pruner):
    """Sets the smallest weights of the targeted linear maps to zero, and stores the others alone."""

    card = Card(
        title="Magnitude pruning",
        paper="Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks",
        arxiv="1506.02626",
        equation="W = W · 1[|W| > t]",
        lowers="E",
        why="A map with a share s of zeros takes 1 − s of its bytes on disk, and one bit per weight; a short training after it brings accuracy back.",
        note="Not faster: products are dense here, as the zeros lie irregularly, and memory while computing is that of the dense model. "
        "Opens with transformers and paretune.",
    )

    sparsity: float = knob(0.5, "share of the weights that become zero", low=0.0, high=0.999, search="0.3..0.95")
    scope: str = knob("layer", "among which weights the smallest are sought: each map's, each row's, or all maps'", choices=("layer", "global", "row"))
    pattern: str = knob("", "n:m: of each m weights that follow each other n stay", choices=("", "2:4", "4:8"))
    targets: str | tuple[str, ...] = knob("linear", "which linear maps: places or module paths")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern and self.scope != "layer":
            raise RecipeError(f'{self!r}: a pattern says itself among which weights; leave scope="{self.scope}" out')

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        sites = rewritable(model, self.targets, by=self, forms=(SparseLinear,))
        require_pattern(self, sites)
        surgery.settle(model)
        scores = {site: part(model.get_submodule(site.path), site).abs() for site in sites}
        if self.scope == "global":
            together = keep_largest(torch.cat([s.flatten() for s in scores.values()])[None], sparsity=self.sparsity)[0]
            parts = together.split([s.numel() for s in scores.values()])
            keeps = {site: keep.view_as(scores[site]) for site, keep in zip(scores, parts, strict=True)}
        else:
            per_row = self.scope == "row"
            keeps = {site: keep_largest(s, sparsity=self.sparsity, pattern=self.pattern, per_row=per_row) for site, s in scores.items()}
        self.prune(model, keeps)
        return model
