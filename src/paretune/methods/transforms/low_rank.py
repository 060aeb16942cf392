"""Thin factors: a linear map becomes two that meet in r features.

    W ≈ W_r = (U_r √S_r)(√S_r V_rᵀ),        W = U S Vᵀ,        ‖W − W_r‖_F² = Σ_{i>r} σ_i²                     plain
    W_r = [U S Vᵀ of W C^½]_r C^−½,   C = E[x xᵀ],    E‖W x − W_r x‖² = ‖(W − W_r) C^½‖_F² = Σ_{i>r} σ_i²      activation-aware

By Eckart and Young each is the best there is: plain for the weight, activation-aware for the outputs on training
examples, of whose inputs C is the covariance. Wang et al. 2024, arXiv:2403.07378 (SVD-LLM), section 3.1, whose C = L Lᵀ
in the place of C^½ gives the same W_r. Factors that would not save parameters are not made.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune import anatomy, surgery
from paretune.card import Card, knob
from paretune.errors import Incompatible, RecipeError
from paretune.roles import Examples, Trail, Transform
from paretune.weights import calibration
from paretune.weights.maps import mark, require_floats, rewritable

LEAST = 1e-6  # a direction in which the inputs have less than this share of their largest variance counts as having it


@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(Transform):
    """Puts two thin maps in the place of each targeted linear map."""

    card = Card(
        title="Low-rank factors",
        paper="Wang et al. 2024, SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
        arxiv="2403.07378",
        equation="W = (U √S)(√S Vᵀ)",
        lowers="E",
        why="A map of rank r costs r (O + I) products in the place of O I, on disk and in time; a short training after it brings accuracy back.",
        note="The weights of pretrained models are far from low rank: expect a loss at half the parameters, less with activation_aware. "
        "Holds the covariances of all targeted maps at once while it works. Opens with transformers and paretune.",
    )

    keep: float = knob(0.5, "the rank is such that this share of a map's parameters stays, where neither rank nor energy says it", low=0.0, high=1.0)
    rank: int | None = knob(None, "r, the same for all maps", low=1, search="8..256 log")
    energy: float | None = knob(None, "the least rank whose share of Σ σ² is this much", low=0.0, high=1.0)
    activation_aware: bool = knob(False, "least error of the outputs on training examples, and not of the weights")
    samples: int = knob(128, "training examples that the inputs' covariance is of", low=1)
    targets: str | tuple[str, ...] = knob("linear", "which linear maps: places or module paths", search="attention, ffn, linear")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.energy is not None:
            raise RecipeError(f"{self!r}: the rank is said twice; give rank or energy")

    @property
    def needs_examples(self) -> bool:  # type: ignore[override]
        """Only the covariance of inputs reads examples."""
        return self.activation_aware

    def follow(self, trail: Trail) -> Trail:
        require_floats(self, trail)
        return trail.replace(fixed=self.spelling())

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        paths = list(dict.fromkeys(site.path for site in rewritable(model, self.targets, by=self)))
        moments: dict[str, Tensor] = {}
        if self.activation_aware:
            assert examples is not None
            batches = calibration.unpadded(model, examples, count=self.samples)
            moments = calibration.second_moments(model, paths, batches=batches, kind=examples.task.kind)
        found = {path: factors(anatomy.weight(model.get_submodule(path)), self, moment=moments.get(path)) for path in paths}
        found = {path: pair for path, pair in found.items() if pair is not None}
        if not found:
            raise Incompatible(f"{self!r}: at this rank two factors of a map have no fewer parameters than the map; lower keep, rank or energy")
        surgery.settle(model)
        surgery.replace(model, ((path, self._thin(model.get_submodule(path), *pair)) for path, pair in found.items()))
        return model

    def _thin(self, module: nn.Module, first: Tensor, second: Tensor) -> Thin:
        made = Thin(module, rank=len(first))
        made.take(module, first, second=second)
        made.packed_by = self.spell()
        return made

    def empty(self, module: nn.Module) -> nn.Module:
        made = Thin(module, rank=module.__dict__["resized"]["rank"])
        made.packed_by = self.spell()
        return made


def factors(weight: Tensor, knobs: LowRank, *, moment: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """(√S Vᵀ (r, I), U √S (O, r)) of a weight (O, I), given E[x xᵀ] (I, I) or not; None where that saves no parameters."""
    target = weight.detach().float()
    root = back = None
    if moment is not None:
        values, vectors = torch.linalg.eigh(moment.double())
        scale = values.clamp(min=LEAST * float(values[-1])).sqrt()
        root, back = ((vectors * s @ vectors.T).float() for s in (scale, 1 / scale))  # C^½, C^−½
        target = target @ root
    u, s, vt = torch.linalg.svd(target, full_matrices=False)
    r = _rank(s, *weight.shape, knobs)
    if r * sum(weight.shape) >= weight.numel():
        return None
    first = s[:r].sqrt()[:, None] * vt[:r]
    return (first if back is None else first @ back).to(weight.dtype), (u[:, :r] * s[:r].sqrt()).to(weight.dtype)


def _rank(s: Tensor, out: int, inside: int, knobs: LowRank) -> int:
    if knobs.rank is not None:
        return min(knobs.rank, len(s))
    if knobs.energy is not None:
        share = s.double().pow(2).cumsum(0) / s.double().pow(2).sum()
        return min(len(s), int((share < knobs.energy - 1e-12).sum()) + 1)
    return max(1, math.floor(round(knobs.keep * out * inside / (out + inside), 6)))


class Thin(nn.Module):
    """y = second(first(x)): I features to r, r to O."""

    paretune_linear = True
    paretune_fixed = True  # no merge
    packed_by: str

    def __init__(self, module: Any, *, rank: int) -> None:
        super().__init__()
        weight = anatomy.weight(module)
        self.out_features, self.in_features = weight.shape
        mark(self, {"rank": rank})
        made = {"device": weight.device, "dtype": weight.dtype}
        self.first = nn.Linear(self.in_features, rank, bias=False, **made)
        self.second = nn.Linear(rank, self.out_features, bias=module.bias is not None, **made)

    def take(self, module: Any, first: Tensor, *, second: Tensor) -> None:
        """Has these factors (r, I) and (O, r), and the bias of the map."""
        learns = module.weight.requires_grad
        self.first.weight, self.second.weight = (nn.Parameter(t.contiguous(), requires_grad=learns) for t in (first, second))
        if module.bias is not None:
            self.second.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=module.bias.requires_grad)

    def dequantized(self) -> Tensor:
        """The product (O, I) of the factors."""
        return self.second.weight @ self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        if "weight" in self.__dict__:  # an adapter computes with the whole matrix, changed
            return F.linear(x, self.weight, self.bias)
        return self.second(self.first(x))

    def __getattr__(self, name: str) -> Any:
        """`weight` and `bias` are the second map's: who asks wants a number format or a device; the whole weight is `anatomy.weight`'s."""
        return getattr(self.second, name) if name in ("weight", "bias") else super().__getattr__(name)
