"""BitFit: only bias terms learn.

Ben Zaken et al. 2021, arXiv:2106.10199: all biases, or a subset such as the query and the second feed-forward bias.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from paretune import anatomy
from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.roles import Adapter


@dataclasses.dataclass(frozen=True, repr=False)
class BitFit(Adapter):
    """Trains the biases of the backbone in place."""

    card = Card(
        title="BitFit",
        paper="Ben Zaken, Ravfogel & Goldberg 2021, BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        arxiv="2106.10199",
        equation="b ← b − lr · ∂L/∂b",
        lowers="E",
        why="A bias gradient is a sum over the output gradient: no weight gradient, and no activation kept for one.",
        lr=5e-3,
        exact_at_start=True,
    )
    selects = True

    biases: str | tuple[str, ...] = knob("all", 'which bias terms: "all", or places such as "query", "up"')

    def selection(self, model: nn.Module) -> list[str]:
        try:
            return anatomy.bias_names(model, self.biases)
        except Incompatible as error:
            raise Incompatible(f"{self!r}: {error}; use lora or ia3, which bring parameters of their own") from None
