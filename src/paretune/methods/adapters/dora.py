"""Weight-decomposed low-rank adaptation: LoRA moves a weight's directions, a trained vector their lengths.

    V = W + s · B A,      W' = m ⊙ V / ‖V‖,      m (O) and ‖·‖ per output feature,      m = ‖W‖ + Δm

B and Δm start at zero, so the adapted model starts as its backbone. In the backward pass ‖V‖ counts as a constant, which
saves its share of the graph. Liu et al. 2024, arXiv:2402.09353, equation 5 and section 4.3.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from paretune import anatomy
from paretune.anatomy import Site
from paretune.card import Card, knob
from paretune.methods.adapters.lora import LoRA, LowRank
from paretune.roles import Adapter
from paretune.seams import Patch

_TINY = torch.finfo(torch.float32).tiny


@dataclasses.dataclass(frozen=True, repr=False)
class DoRA(Adapter):
    """Trains B, A and the lengths m of every targeted linear map."""

    card = Card(
        title="Weight-decomposed low-rank adaptation (DoRA)",
        paper="Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation",
        arxiv="2402.09353",
        equation="W' = m ⊙ (W + s B A) / ‖W + s B A‖",
        lowers="E",
        why="As few parameters as LoRA; but each step forms W' whole, so it takes longer than LoRA's. Merged, inference costs nothing more.",
        lr=3e-3,
        exact_at_start=True,
        note="m is trained as its difference from ‖W‖, which gives the same steps. The map is computed with W', so A's inputs have no dropout. "
        "Measured on MiniLM (docs/method-steps.md): a step takes 1.1 times full fine-tuning's CPU time; LoRA's 0.8.",
    )
    reweighs = True

    r: int = knob(8, "rank of the update", low=1, search="2..64 log")
    alpha: float | None = knob(None, "scale of the update, divided by r; None is 2r", low=0.0)
    targets: str | tuple[str, ...] = knob("linear", "which linear maps: places or module paths", search="query value, attention, ffn, linear")

    def sites(self, model: nn.Module) -> list[Site]:
        return anatomy.resolve(model, self.targets, kind="linear")

    def patch(self, site: Site) -> Patch:
        return Decomposed(site, LoRA(r=self.r, alpha=self.alpha))


class Decomposed(LowRank):
    """m ⊙ V / ‖V‖ at one linear map."""

    reweighs = True

    def __init__(self, site: Site, knobs: LoRA) -> None:
        super().__init__(site, knobs)
        self.stretch = nn.Parameter(torch.zeros(site.out_features))  # Δm

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        whole = weight + super().delta(weight, bias)[0]  # V (O, I)
        lengths = whole.detach().norm(dim=1).clamp_min(_TINY)  # ‖V‖ (O)
        ratio = (weight.norm(dim=1).clamp_min(_TINY) + self.stretch.float()) / lengths
        return ratio[:, None] * whole - weight, None
