"""Training in a random subspace: d numbers move all weights, through a fixed random projection.

    θ = θ₀ + λ_i P θ_d,        P = [H G₁ Π₁ H B₁; H G₂ Π₂ H B₂; ...] / √n        (Fastfood)

H is the orthonormal Hadamard matrix of the next power of two p above the length of θ_d; each of the n blocks has signs B,
a permutation Π and Gaussians G of its own, made from a seed. Structure-aware, the weights of layer i have a scale λ_i,
which is one of the d numbers. θ_d starts at zero and each λ at one. Aghajanyan et al. 2020, arXiv:2012.13255, section 3;
the subspace is Li et al. 2018, arXiv:1804.08838; Fastfood is Le et al. 2014, arXiv:1408.3060.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune import anatomy
from paretune.anatomy import Site
from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.roles import Adapter
from paretune.seams import Patch


@dataclasses.dataclass(frozen=True, repr=False)
class IntrinsicDimension(Adapter):
    """Trains d numbers in all, whatever the size of the model."""

    card = Card(
        title="Training in a random subspace (intrinsic dimension)",
        paper="Aghajanyan et al. 2020, Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
        arxiv="2012.13255",
        equation="θ = θ₀ + λ_i P θ_d",
        lowers="E",
        why="A task costs d numbers to store. Training is slower than full fine-tuning: every step projects, and keeps 9 bytes of P for each weight.",
        lr=5e-3,
        exact_at_start=True,
        note="A measure of how hard a task is, more than a way to save: d90 is the least d that reaches 90 % of full fine-tuning's score (pt.d90). "
        "The paper projects onto every parameter, here onto linear maps; the λ are the last of the d numbers, as differences from one. "
        "A dense P needs 4 d bytes for each weight. Measured on MiniLM (docs/method-steps.md): a step of 16 sentences takes 2.0 times full "
        "fine-tuning's CPU time; the projection costs the same for longer batches, where it weighs less.",
    )
    reweighs = True

    d: int = knob(500, "how many numbers learn, the layers' scales included", low=1, search="50..5000 log")
    projection: str = knob("fastfood", "P: products of fast transforms, or a matrix of Gaussians", choices=("fastfood", "dense"))
    structure_aware: bool = knob(True, "one of the d numbers is a scale for each layer (SAID; else DID)")
    targets: str | tuple[str, ...] = knob("linear", "which linear maps: places or module paths", search="attention, ffn, linear")

    def sites(self, model: nn.Module) -> list[Site]:
        sites = anatomy.resolve(model, self.targets, kind="linear")
        layers = len({(s.stack, s.layer) for s in sites})
        if self.structure_aware and self.d <= layers:
            raise Incompatible(f"{self!r}: each of the {layers} layers takes one of the d numbers as its scale; give a larger d, or structure_aware=False")
        return sites

    def shared(self, model: nn.Module) -> nn.Module:
        return nn.ParameterDict({"theta": nn.Parameter(torch.zeros(self.d))})

    def patch(self, site: Site) -> Patch:
        return Projected(site, Dense if self.projection == "dense" else Fastfood)

    def start(self, model: nn.Module, patches: list[Patch]) -> None:
        if self.structure_aware:
            layers = list(dict.fromkeys((p.site.stack, p.site.layer) for p in patches))
            for patch in patches:
                patch.plan[1:] = torch.tensor([layers.index((patch.site.stack, patch.site.layer)), len(layers)])


class Projected(Patch):
    """λ_i P θ_d at one linear map, as one vector: its matrix, row by row, then its bias."""

    reweighs = True
    plan: Tensor  # (3,): the seed of P, the layer i, and how many layers have a scale

    def __init__(self, site: Site, projection: type[Dense] | type[Fastfood]) -> None:
        super().__init__(site)
        self.sizes = [site.out_features * site.in_features] + [site.out_features] * site.bias
        self.projection = projection
        self.register_buffer("plan", F.pad(torch.randint(2**31, (1,)), (0, 2)))
        self._made: tuple[Any, Any] | None = None

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        numbers = self.shared["theta"].float()
        seed, layer, layers = self.plan.tolist()
        scale = 1 + numbers[len(numbers) - layers + layer] if layers else 1.0  # λ_i
        change = scale * self._project(seed, numbers[: len(numbers) - layers])
        matrix, *rest = change.split(self.sizes)
        return matrix.view(weight.shape), rest[0] if rest else None

    def _project(self, seed: int, theta: Tensor) -> Tensor:
        wanted = (seed, len(theta), theta.device)
        if self._made is None or self._made[0] != wanted:  # made anew from the seed, never saved
            with torch.inference_mode(False):
                self._made = wanted, self.projection(sum(self.sizes), len(theta), generator=torch.Generator().manual_seed(seed), device=theta.device)
        return self._made[1](theta)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # copies and pickles make their own


class Dense:
    """P (D, d) of Gaussians, whose columns have length one on average."""

    def __init__(self, rows: int, columns: int, *, generator: torch.Generator, device: torch.device) -> None:
        self.matrix = torch.randn(rows, columns, generator=generator).div_(math.sqrt(rows)).to(device)

    def __call__(self, theta: Tensor) -> Tensor:
        return self.matrix @ theta


class Fastfood:
    """n blocks H G Π H B of size p, one below the other, of which the first D rows are P; its columns, too, have length one on average."""

    def __init__(self, rows: int, columns: int, *, generator: torch.Generator, device: torch.device) -> None:
        self.rows, self.size = rows, 1 << (columns - 1).bit_length()  # D, p
        shape = -(-rows // self.size), self.size  # (n, p)
        self.signs = torch.randint(2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1).to(device)  # B
        order = torch.rand(shape, generator=generator).argsort(1) + self.size * torch.arange(shape[0])[:, None]
        self.order = order.flatten().int().to(device)  # Π, in all blocks at once
        self.gains = torch.randn(shape, generator=generator).div_(math.sqrt(shape[0])).to(device)  # G / √n

    def __call__(self, theta: Tensor) -> Tensor:
        x = hadamard(self.signs * F.pad(theta, (0, self.size - len(theta))))  # (n, p)
        x = x.flatten().index_select(0, self.order).view(x.shape)
        return hadamard(self.gains * x).flatten()[: self.rows]


def hadamard(x: Tensor) -> Tensor:
    """x H for rows (n, p), p a power of two; as H_p = H_a ⊗ H_b with a b = p, which takes a + b products for each entry, not p."""
    a = 1 << (x.shape[1].bit_length() - 1) // 2
    b = x.shape[1] // a
    return (_hadamard(a, x.device) @ x.view(-1, a, b) @ _hadamard(b, x.device)).reshape(x.shape)


@functools.cache
def _hadamard(size: int, device: torch.device) -> Tensor:
    """H (p, p): symmetric, orthonormal."""
    with torch.inference_mode(False):
        whole = torch.ones(1, 1, device=device)
        while len(whole) < size:  # H_2p = [H_p H_p; H_p −H_p]
            whole = torch.cat([torch.cat([whole, whole], 1), torch.cat([whole, -whole], 1)])
        return whole / math.sqrt(size)
