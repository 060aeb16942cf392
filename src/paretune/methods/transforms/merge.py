"""Merging: the adapters become part of the weights, and inference costs what the backbone costs.

    W ← W + ΔW,   b ← b + Δb       for every patch, in the order of attachment, in fp32

Hu et al. 2021, arXiv:2106.09685, section 4.1 (no additional inference latency).
"""

from __future__ import annotations

import dataclasses

from torch import nn

from paretune import folding
from paretune.card import Card
from paretune.errors import Incompatible
from paretune.methods.transforms.cast import Cast
from paretune.roles import Examples, Trail, Transform
from paretune.weights.packed import unpack


@dataclasses.dataclass(frozen=True, repr=False)
class Merge(Transform):
    """Folds all attached adapters into the backbone."""

    keeps_ranges = True

    card = Card(
        title="Merging",
        paper="Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models",
        arxiv="2106.09685",
        equation="W = W + ΔW",
        lowers="E",
        why="An inference computes W x once instead of W x and the adapter's share; afterwards adapters cannot be switched.",
        note="Equal to the unmerged model within rounding: ΔW is added in fp32 and rounded to the weight's format. On a packed base, such as "
        "nf4 | lora | merge, the codes are dequantized first and the whole model is left in bf16, as large as cast makes it: W + ΔW lies on no "
        "grid of codes. To have few bits again is a further phase, with its own error.",
    )

    def follow(self, trail: Trail) -> Trail:
        if not trail.attached:
            raise Incompatible("merge: no adapter is attached before it; put one in front, such as lora | merge")
        stuck = next((m for m in trail.attached if not m.foldable), None)
        if stuck is not None:
            raise Incompatible(f"merge: {stuck!r} is no change of the weights and cannot be folded; leave merge out, the model saves with it")
        if trail.weights != "float" and not trail.carries:
            raise Incompatible(f"merge: {trail.by} left {trail.weights} weights, and a merge adds to float ones; put merge before {trail.by}")
        filling = next((m for m in trail.attached if not m.selects), None)
        if trail.fixed and filling is not None:
            raise Incompatible(f"merge: {filling!r} would undo what {trail.fixed} fixed in the weights; leave merge out, or put it before {trail.fixed}")
        if trail.carries:
            return trail.replace(attached=(), weights="bf16", by="merge", carries=False, embeddings="float")
        return trail.replace(attached=())

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        folding.check(model)
        packed = unpack(model)
        folding.merge(model)
        return Cast().apply(model) if packed else model
