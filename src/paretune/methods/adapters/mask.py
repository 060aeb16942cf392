"""Masking: no weight changes, some are switched off.

    W' = W ⊙ m,      m = 1[s > τ],      ∂L/∂s := ∂L/∂m       (the straight-through estimator)

All scores s start at one value above the threshold τ, so the adapted model starts as its backbone. When the phase ends
only the bits m stay: one per weight, in memory and on disk. Zhao et al. 2020, arXiv:2004.12406, section 3.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from paretune import anatomy
from paretune.anatomy import Site
from paretune.card import Card, knob
from paretune.errors import RecipeError
from paretune.roles import Adapter
from paretune.seams import Patch
from paretune.weights.numerics import pack_bits, unpack_bits


@dataclasses.dataclass(frozen=True, repr=False)
class Mask(Adapter):
    """Trains a score for every weight of the targeted linear maps; a weight whose score is too low counts as zero."""

    card = Card(
        title="Masking",
        paper="Zhao et al. 2020, Masking as an Efficient Alternative to Finetuning for Pretrained Language Models",
        arxiv="2004.12406",
        equation="W' = W ⊙ 1[s > τ]",
        lowers="E",
        why="A task costs one bit per weight to store, a 32nd of a fine-tuned copy; a training step costs somewhat more than full fine-tuning's.",
        lr=1e-3,
        exact_at_start=True,
        note="The paper starts with 3 to 10 % of the weights switched off at random; here all are on. Scores are kept in checkpoints, bits after the phase. "
        "Measured on MiniLM (docs/method-steps.md): a step takes 1.2 times full fine-tuning's CPU time, for every weight is masked anew. Merge it for inference.",
    )
    reweighs = True

    threshold: float = knob(0.01, "τ: weights whose score is not above it are off")
    init: float = knob(0.02, "the score s of every weight at the start; above the threshold")
    targets: str | tuple[str, ...] = knob("linear", "which linear maps: places or module paths", search="attention, ffn, linear")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init <= self.threshold:
            raise RecipeError(f"mask(threshold={self.threshold}, init={self.init}): init is above the threshold, or every weight would start switched off")

    def sites(self, model: nn.Module) -> list[Site]:
        return anatomy.resolve(model, self.targets, kind="linear")

    def patch(self, site: Site) -> Patch:
        return Bits(site, self)


class Bits(Patch):
    """m at one linear map: of scores while it trains, of packed bits once it is settled."""

    reweighs = True
    bits: Tensor  # (⌈O I / 8⌉,) uint8

    def __init__(self, site: Site, knobs: Mask) -> None:
        super().__init__(site)
        self.threshold = knobs.threshold
        self.scores = nn.Parameter(torch.full((site.out_features, site.in_features), knobs.init))

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        return (self._mask(weight.shape) - 1) * weight, None  # W ⊙ m = W + (m − 1) ⊙ W

    def _mask(self, shape: torch.Size) -> Tensor:
        if self.settled:
            return unpack_bits(self.bits, shape.numel()).view(shape).float()
        scores = self.scores.float()
        return (scores > self.threshold).float() + (scores - scores.detach())  # the value is m's, the gradient goes to s

    def settle(self) -> dict[str, Tensor]:
        return {"bits": pack_bits(self.scores > self.threshold)}
