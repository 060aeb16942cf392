"""Pruning by weights and activations: a weight counts as much as what passes through it.

    S_ij = |W_ij| · ‖X_j‖₂ ,      in each row i the ⌊s I⌋ lowest of I scores become zero, or the ⌊s n⌋ lowest of a map's n

X_j are the values of input feature j over all tokens of some training examples. Layer by layer: each sees the inputs
that the layers pruned before it leave. Sun et al. 2023, arXiv:2306.11695, section 3. The norm over tokens is taken as a
root mean square, which orders a row's scores alike.
"""

from __future__ import annotations

import dataclasses
import itertools

from torch import nn

from paretune import surgery
from paretune.card import Card, knob
from paretune.errors import RecipeError
from paretune.roles import Examples
from paretune.weights import calibration
from paretune.weights.maps import rewritable
from paretune.weights.sparsity import Pruner, SparseLinear, keep_largest, part, require_pattern


@dataclasses.dataclass(frozen=True, repr=False)
class Wanda(Pruner):
    """Sets the weights of the targeted linear maps to zero through which the least passes, by default row by row."""

    card = Card(
        title="Pruning by weights and activations (Wanda)",
        paper="Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models",
        arxiv="2306.11695",
        equation="S = |W| · ‖X‖₂",
        lowers="E",
        why="As magnitude pruning, and closer to the model's outputs for as many zeros, at the price of some forward passes.",
        note="Not faster: products are dense, and memory while computing is that of the dense model. All examples go through the model once "
        "per layer. The paper compares the weights of one output (a row), and of a whole map in an ablation; scores of different maps are in the units of "
        "different inputs, and a map's inputs are known once the layers before it are pruned, so there is no scope over all maps, as magnitude has. "
        "Opens with transformers and paretune.",
    )
    needs_examples = True

    sparsity: float = knob(0.5, "share of the weights that become zero", low=0.0, high=0.999, search="0.3..0.8")
    scope: str = knob("row", "among which weights the lowest are sought: each row's, or each map's", choices=("row", "layer"))
    pattern: str = knob("", "n:m: of each m weights that follow each other n stay", choices=("", "2:4", "4:8"))
    samples: int = knob(128, "training examples that the inputs are measured on", low=1)
    targets: str | tuple[str, ...] = knob("linear", "which linear maps: places or module paths")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern and self.scope != "row":
            raise RecipeError(f'{self!r}: a pattern says itself among which weights; leave scope="{self.scope}" out')

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        assert examples is not None
        sites = rewritable(model, self.targets, by=self, forms=(SparseLinear,))
        require_pattern(self, sites)
        batches = calibration.unpadded(model, examples, count=self.samples)
        surgery.settle(model)
        for _, layer in itertools.groupby(sites, key=lambda s: (s.stack, s.layer)):
            here = list(layer)
            means = calibration.second_moments(model, [s.path for s in here], batches=batches, kind=examples.task.kind, diagonal=True)
            scores = {site: part(model.get_submodule(site.path), site).abs() * means[site.path].sqrt() for site in here}  # |W_ij| · ‖X_j‖₂
            per_row = self.scope == "row"
            self.prune(model, {site: keep_largest(s, sparsity=self.sparsity, pattern=self.pattern, per_row=per_row) for site, s in scores.items()})
        return model
