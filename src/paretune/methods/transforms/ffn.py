"""Fewer neurons: each feed-forward block keeps those that the task's loss depends on most.

    down(σ(up(x))) = Σ_j ξ_j d_j σ(u_j · x),      I_j = E_x |∂L(x)/∂ξ_j| at ξ = 1;      the n highest j stay

Neuron j is row u_j of `up` (and of `gate`) and column d_j of `down`; ∂L/∂ξ_j is its activation times the loss's gradient
by it, summed over tokens. Molchanov et al. 2019, arXiv:1906.10771, equation 8, with a gate per neuron as in section 3.2;
per example as in Michel et al. 2019, arXiv:1905.10650.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from paretune import anatomy, hub, surgery
from paretune.card import Card, knob
from paretune.roles import Examples
from paretune.weights.maps import cut, require_bare, rewritable
from paretune.weights.narrowing import Narrowing, highest, rows_of


@dataclasses.dataclass(frozen=True, repr=False)
class FFN(Narrowing):
    """Cuts the least important neurons out of every feed-forward block."""

    card = Card(
        title="Fewer feed-forward neurons",
        paper="Molchanov et al. 2019, Importance Estimation for Neural Network Pruning",
        arxiv="1906.10771",
        equation="I_j = E |∂L/∂ξ_j|",
        lowers="E",
        why="The feed-forward blocks are two thirds of a layer's weights and work; time and bytes fall with their width.",
        note="A plain smaller model of the same family: every layer keeps the same number. Importance is that for the trained task: put it after a "
        "training phase, and a short one behind it.",
    )

    keep: int | float = knob(0.5, "how many neurons of a block stay: a share up to 1.0, or a number", search="0.2..1.0")
    samples: int = knob(128, "training examples that importance is measured on", low=1)

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        assert examples is not None
        sites = rewritable(model, "ffn", by=self)
        require_bare(model, [site.path for site in sites], by=self)
        blocks = anatomy.feed_forwards(model)
        scores = self.importance(model, [block.down.path for block in blocks], examples=examples)
        surgery.settle(model)
        for block in blocks:
            chosen = highest(scores[block.down.path], self.number(block.width))
            for path in dict.fromkeys(site.path for site in block.into):  # up and gate may lie in one module
                rows = torch.cat([rows_of(site, chosen) for site in block.into if site.path == path])
                cut(model.get_submodule(path), rows=rows.sort().values)
            cut(model.get_submodule(block.down.path), columns=chosen)
            anatomy.set_field(model, block.field, value=len(chosen))
        hub.refresh(model)
        return model
