"""Length-normalized choice: the right answer shall win the ranking, whatever the answers' lengths.

    L = L_LM + L_LN,   L_LN = −log softmax(β)_right,   β(y) = (1 / |y|) Σ_t log p(y_t | x, y_<t)

Liu et al. 2022 (T-Few), arXiv:2205.05638, equations 5 and 6.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from paretune.card import Card, knob
from paretune.readouts import ranking
from paretune.roles import Modifier
from paretune.training import Events, Loop


@dataclasses.dataclass(frozen=True, repr=False)
class LengthNorm(Modifier):
    """Adds the cross-entropy over the answers' mean log-probabilities."""

    card = Card(
        title="Length-normalized choice loss (T-Few)",
        paper="Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        arxiv="2205.05638",
        equation="L_LN = -log softmax(beta)[right],  beta = mean log p per token",
        lowers="D",
        why="Training minimizes what the ranking of answers is decided by; the log-probabilities are there already.",
    )
    ranks = True

    weight: float = knob(1.0, "of this loss beside the likelihood of the right answer", low=0.0)

    def events(self, loop: Loop) -> Events:
        ranking.require(loop.model, self)
        return _Ranking(self.weight)


class _Ranking(Events):
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, loop: Loop, batch: dict[str, Tensor], *, outputs: Any, loss: Tensor) -> Tensor:
        return loss + self.weight * F.cross_entropy(outputs.normalized, batch["labels"], reduction="sum")
