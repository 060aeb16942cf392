"""Full fine-tuning: every parameter learns. The reference point of every frontier.

    θ ← θ − lr · ∇L(θ)

Devlin et al. 2018, arXiv:1810.04805, section 3.2.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from paretune.card import Card
from paretune.roles import Adapter
from paretune.seams import is_adapters


@dataclasses.dataclass(frozen=True, repr=False)
class Full(Adapter):
    """Trains every parameter of the backbone in place."""

    card = Card(
        title="Full fine-tuning",
        paper="Devlin et al. 2018, BERT: Pre-training of Deep Bidirectional Transformers",
        arxiv="1810.04805",
        equation="θ ← θ − lr · ∇L(θ)",
        lowers="D",
        why="A pretrained start needs far fewer examples than training from nothing; each one costs the full price.",
        lr=5e-5,
        lr_falls_with_size=True,
        exact_at_start=True,
    )
    selects = True

    def selection(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters() if not is_adapters(name)]
