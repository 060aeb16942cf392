"""Quantization-aware training: the model computes with weights as codes will hold them, and learns the steps between the codes.

    ŵ = s · round(clip(w / s, −Q, Q)),   Q = 2^(bits−1) − 1                 a step s for each row of W, or group of inputs
    ∂ŵ/∂w = 1[|w / s| ≤ Q]                                                  the straight-through estimator
    ∂ŵ/∂s = round(w / s) − w / s  inside,  ±Q  outside;   times g = 1 / √(N Q)  for the N weights of a step

W is the effective weight, an adapter's BA in it. The steps stay beside it when the phase ends, and the codes that come next have
exactly them. Esser et al. 2019, arXiv:1902.08153, equations 1 to 3 and section 2.2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paretune import seams, surgery
from paretune.anatomy import Site
from paretune.card import Card, knob
from paretune.errors import Incompatible, RecipeError
from paretune.roles import Modifier, Trail
from paretune.seams import Patch
from paretune.training import Events, Loop
from paretune.weights.maps import require_floats
from paretune.weights.numerics import TINY, absmax, grouped, scaled, ungrouped
from paretune.weights.packed import packable
from paretune.weights.sharing import require_own_layers, require_unshared

GROUPS = (32, 64, 128)  # of int4


@dataclasses.dataclass(frozen=True, repr=False)
class QAT(Modifier):
    """Trains with the linear maps' weights on a grid of codes, whose steps learn along."""

    card = Card(
        title="Quantization-aware training (LSQ)",
        paper="Esser et al. 2019, Learned Step Size Quantization",
        arxiv="1902.08153",
        equation="ŵ = s · round(clip(w / s, -Q, Q)),  g = 1 / √(N Q)",
        lowers="E",
        why="The weights learn to be few bits, so that packing them costs no accuracy that training has not already seen.",
        note="Steps learn as log s, so that a rate that suits weights moves them by a share of themselves, and start at the paper's 2 mean|w| / √Q or at "
        "absmax's where that is finer. Codes are symmetric, without the paper's -Q - 1. Activations, the token embedding and the head stay float, and an "
        "adapter's dropout is left out, since its update is inside the weight. 8 bits become int8 or int8_weights, 4 become int4(symmetric=True); 3 and 2 "
        "have no packed format and stay float weights that are rounded at every forward. Merge adapters first.",
    )

    bits: int = knob(8, "bits of a code; 32 is training as without qat", choices=(2, 3, 4, 8, 32))
    group: int | None = knob(None, "inputs with one step; 0 is a row, None 64 for 4 bits and a row for others", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits == 4 and self.grid[1] not in GROUPS:
            raise RecipeError(f"{self!r}: int4 has groups of 32, 64 or 128 inputs; give one of these, or leave group out")

    @property
    def grid(self) -> tuple[int, int]:
        """(bits, group; 0 is a row), as a packed format says them."""
        return self.bits, (64 if self.bits == 4 else 0) if self.group is None else self.group

    @property
    def becomes(self) -> str:
        """Which transforms pack its codes, for refusals."""
        bits, group = self.grid
        if bits == 8:
            return f"int8_weights(group={group})" if group else "int8 or int8_weights"
        return f"int4(group={group}, symmetric=True)" if bits == 4 else f"none, since no format packs {bits} bits"

    def follow(self, trail: Trail) -> Trail:
        if self.bits == 32:
            return trail
        if trail.weights != "float":
            require_floats(self, trail)
            raise Incompatible(f"{self!r}: {trail.by} left {trail.weights} weights, which are rounded already; put it behind {self.spelling()}")
        require_unshared(self, trail)
        return trail.replace(ranges=self)

    def events(self, loop: Loop) -> Events:
        if self.bits < 32:
            self._install(loop)
        return Events()

    def _install(self, loop: Loop) -> None:
        """Puts steps beside every linear map that a format would pack, and lets them learn."""
        require_own_layers(loop.model, by=self)
        for path in packable(loop.model, embeddings=False):
            module = loop.model.get_submodule(path)
            seam = seams.seam_of(module)
            if seam is not None and (here := seam.ranges()) is not None:  # a second fit learns on
                if here.method != self or here.settled:
                    raise Incompatible(f"{self!r}: {path} has the step sizes of {here.method!r} already; pack them first ({here.method.becomes})")
                continue
            others = [] if seam is None else [p for _, _, p in seam.patches() if not (isinstance(p, seams.Selected) or p.wraps or p.attends)]
            patches = [p for p in others if p.method.foldable]
            weight = seams.effective(module, patches)["weight"].detach()
            out, inside = seams.anatomy.weight(module).shape
            site = Site(place="other", path=path, in_features=inside, out_features=out, transposed=seams.anatomy.is_transposed(module))
            steps = surgery.install(loop.model, seams.RANGES, method=self, site=site)
            steps.start(weight.T if site.transposed else weight)
            loop.learn(f"{path}.{seams.CHILD}.{seams.RANGES}.{self.spelling()}.log_steps", steps.log_steps)

    def patch(self, site: Site) -> Steps:
        """The steps of one linear map."""
        return Steps(site, self)

    def settle(self, patches: list[Patch]) -> list[dict[str, Tensor]]:
        """Steps in the number format of the codes' scales."""
        return [patch.settle() for patch in patches]


class Steps(Patch):
    """The steps of one weight (O, I) with G groups of N inputs: their logarithms (O · G) while they learn, themselves once settled."""

    reweighs = True
    steps: Tensor  # (O · G)

    def __init__(self, site: Site, knobs: QAT) -> None:
        super().__init__(site)
        self.bits, group = knobs.grid
        self.size = group or site.in_features
        self.stored = torch.bfloat16 if self.bits == 4 else torch.float32  # as the format has its scales
        self.log_steps = nn.Parameter(torch.zeros(site.out_features * -(-site.in_features // self.size)))

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """s = 2 mean|w| / √Q, or max|w| / Q where that is finer."""
        groups, top = grouped(weight.float(), self.size).abs(), 2 ** (self.bits - 1) - 1
        first = torch.minimum(2 * groups.mean(-1) / math.sqrt(top), groups.amax(-1) / top)
        self.log_steps.copy_(first.clamp(min=TINY).log().flatten())

    def on_grid(self, weight: Tensor) -> Tensor:
        groups = grouped(weight, self.size)  # (O, G, N)
        if self.settled:
            return ungrouped(_rounded(groups, self.steps.view(groups.shape[:2]), self.bits), weight.shape[1])
        return ungrouped(_Learned.apply(groups, self.log_steps.view(groups.shape[:2]), self.bits, self.stored), weight.shape[1])

    def settle(self) -> dict[str, Tensor]:
        return {"steps": self.log_steps.exp().to(self.stored)}

    def keep_rows(self, kept: list[int]) -> None:
        """Follows a settled weight of which only these rows stay."""
        self.steps = self.steps.view(self.site.out_features, -1)[kept].flatten()
        self.site = dataclasses.replace(self.site, out_features=len(kept))


def _rounded(groups: Tensor, steps: Tensor, bits: int) -> Tensor:
    """ŵ (O, G, N), by the very functions that make codes and read them."""
    codes, _ = absmax(groups, bits=bits, scales=steps)
    return scaled(codes, steps)


class _Learned(torch.autograd.Function):
    """ŵ of groups (O, G, N) and log s (O, G), with the gradients of the docstring above."""

    @staticmethod
    def forward(ctx: Any, groups: Tensor, log_steps: Tensor, bits: int, stored: torch.dtype) -> Tensor:
        steps = log_steps.exp().to(stored)
        ctx.save_for_backward(groups, steps)
        ctx.top = 2 ** (bits - 1) - 1
        return _rounded(groups, steps, bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        groups, steps = ctx.saved_tensors
        s = steps.float().clamp(min=TINY)
        v = groups / s[..., None]
        inside = v.abs() <= ctx.top
        slope = torch.where(inside, v.round() - v, v.sign() * ctx.top)  # ∂ŵ/∂s
        g = 1 / math.sqrt(groups.shape[-1] * ctx.top)
        return grad * inside, g * (grad * slope).sum(-1) * s, None, None  # ∂s/∂(log s) = s
