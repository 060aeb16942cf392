"""Unlikelihood: wrong answers are made unlikely, token by token.

    L = L_LM + L_UL,   L_UL = −Σ_n Σ_t log(1 − p(y_t^(n) | x, y_<t^(n))) / Σ_n |y^(n)|   over the wrong answers y^(n)

Liu et al. 2022 (T-Few), arXiv:2205.05638, equation 4; Tam et al. 2021, arXiv:2103.11955.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from paretune.card import Card, knob
from paretune.readouts import ranking
from paretune.roles import Modifier
from paretune.training import Events, Loop


@dataclasses.dataclass(frozen=True, repr=False)
class Unlikelihood(Modifier):
    """Adds a loss that lowers the probability of every token of the wrong answers."""

    card = Card(
        title="Unlikelihood loss (T-Few)",
        paper="Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        arxiv="2205.05638",
        equation="L_UL = -sum log(1 - p(wrong token)) / number of wrong tokens",
        lowers="D",
        why="Each example teaches from its wrong answers, too; their log-probabilities are there already.",
        note="The authors' code adds 0.01 inside the logarithm and averages over the batch's tokens; here it is the paper's sum, averaged over rows, "
        "with p at most 1 - 1e-6.",
    )
    ranks = True

    weight: float = knob(1.0, "of this loss beside the likelihood of the right answer", low=0.0)

    def events(self, loop: Loop) -> Events:
        ranking.require(loop.model, self)
        return _Unlikely(self.weight)


class _Unlikely(Events):
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, loop: Loop, batch: dict[str, Tensor], *, outputs: Any, loss: Tensor) -> Tensor:
        log_p, lengths = outputs.log_probs, outputs.lengths  # (B, C, L), (B, C)
        place = torch.arange(log_p.shape[-1], device=log_p.device)
        answer = torch.arange(log_p.shape[1], device=log_p.device)
        wrong = (place < lengths[..., None]) & (answer != batch["labels"][:, None])[..., None]  # (B, C, L)
        unlikely = torch.log1p(-log_p.exp().clamp(max=1 - 1e-6)).masked_fill(~wrong, 0.0)
        return loss - self.weight * (unlikely.sum((1, 2)) / wrong.sum((1, 2))).sum()
