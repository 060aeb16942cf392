"""Linformer: attention to k mixtures of the tokens, in place of all n.

    out = softmax(Q (E K)ᵀ / √D) (F V),      E, F (k, n): learned

E and F start as means over k equal runs of positions, so that k = n starts as attention itself. An input of fewer than n tokens
meets the first columns of E and F, and a mixture s of it weighs in the softmax by the share of E's row that lies on tokens,
Σ_j |E_sj| [j is a token] / Σ_j |E_sj|; at full length that is 1 and the paper's form. Wang et al. 2020, arXiv:2006.04768,
section 4; its figure of singular values by layer and head is `paretune analyze attention`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune import anatomy
from paretune.anatomy import Site
from paretune.attention import Attend, Call, efficient
from paretune.attention.efficient import AttentionTransform, Replacement
from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.roles import Examples


@dataclasses.dataclass(frozen=True, repr=False)
class Linformer(AttentionTransform):
    """Projects keys and values of an encoder along the sequence, to k of each."""

    card = Card(
        title="Low-rank attention along the sequence",
        paper="Wang et al. 2020, Linformer: Self-Attention with Linear Complexity",
        arxiv="2006.04768",
        equation="softmax(Q (E K)ᵀ) (F V)",
        lowers="E",
        why="A head takes 4 n k D products, in place of 2 n² D, and memory as n k; each position up to `length` has k weights in E and in F, which have to be learned.",
        note="Encoders alone: a mixture of all tokens knows of later ones. Takes more products than attention below 2 k tokens. Attention weights have no dropout. "
        "E and F are as wide as the longest input, so that one of n tokens has about k · n / length live mixtures: where texts are short and the table of positions is "
        "long, put max_length before it. Opens with transformers and paretune. "
        "From 1,024 to 4,096 tokens a training step's CPU time grew as n^1.0, full attention's as n^1.8 (docs/long_range.md).",
    )

    k: int = knob(256, "mixtures that take the place of n keys and values", low=1, search="32..256 log")
    share: str = knob("headwise", "who has E and F in common: nobody, a layer's heads, these with E = F, or all layers with E = F",
                      choices=("none", "headwise", "kv", "layerwise"))  # fmt: skip
    length: int | None = knob(None, "n, the longest input in tokens, for a model without a limit of its own", low=1)

    def sites(self, model: nn.Module) -> list[Site]:
        return anatomy.with_heads(model, super().sites(model))

    def check(self, model: nn.Module, sites: list[Site]) -> None:
        efficient.require_encoder(model, by=self, why="a mixture of all tokens shows each of them the later ones")
        longest = efficient.longest(model)
        if self.length is not None and longest is not None and self.length < longest:
            raise Incompatible(f"{self!r}: {type(model).__name__} takes up to {longest} tokens, for which there would be no mixtures; "
                               f"leave length out, or put max_length before it")  # fmt: skip

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        if self.length is not None:
            return super().apply(model, examples)
        longest = efficient.longest(model)
        if longest is None:
            raise Incompatible(f"{self!r}: {type(model).__name__} has no limit to its inputs; say the longest, as in linformer(k={self.k}, length=512)")
        return dataclasses.replace(self, length=longest).apply(model, examples)

    def shared(self, model: nn.Module) -> nn.Module | None:
        return Mixtures(self, heads=1) if self.share == "layerwise" else None

    def patch(self, site: Site) -> Projected:
        return Projected(site, self)


class Mixtures(nn.Module):
    """E and F, each (1 or H, k, n); None for F where it is E."""

    def __init__(self, knobs: Linformer, *, heads: int) -> None:
        super().__init__()
        assert knobs.length is not None
        means = mean_of_runs(min(knobs.k, knobs.length), length=knobs.length)
        self.E = nn.Parameter(means.repeat(heads, 1, 1))
        self.F = nn.Parameter(means.repeat(heads, 1, 1)) if knobs.share in ("none", "headwise") else None


def mean_of_runs(k: int, *, length: int) -> Tensor:
    """The means over k runs of positions that are as long as each other, or one longer: (k, n)."""
    run = torch.arange(length) * k // length
    table = (run == torch.arange(k)[:, None]).float()
    return table / table.sum(-1, keepdim=True)


class Projected(Replacement):
    """One attention on mixtures of its keys and values."""

    method: Linformer

    def __init__(self, site: Site, knobs: Linformer) -> None:
        super().__init__(site)
        self.longest = knobs.length
        self.mixtures = None if knobs.share == "layerwise" else Mixtures(knobs, heads=site.heads if knobs.share == "none" else 1)

    def compute(self, attend: Attend, call: Call) -> tuple[Tensor, Tensor | None]:
        efficient.refuse_further(call, by=self.method)
        mixtures: Any = self.shared if self.mixtures is None else self.mixtures
        E, F_ = mixtures.E, mixtures.E if mixtures.F is None else mixtures.F
        keys, longest = call.key.shape[2], E.shape[-1]
        if keys > longest:
            raise Incompatible(f"{self.method!r}: an input has {keys} tokens, and the mixtures are of {longest}; cut it, or give a larger length")
        key, value = efficient.repeated(call)
        keep = efficient.padding(call, by=self.method)
        bias = None
        if keep is not None:
            efficient.require_text_first(keep, by=self.method)
        if keep is not None or keys < longest:
            real = key.new_ones(1, keys) if keep is None else keep.to(key.dtype)
            key, value = (x * real[:, None, :, None] for x in (key, value))
            bias = shares(E, real).to(call.query.dtype)
        key, value = (table[..., :keys].to(x.dtype) @ x for table, x in ((E, key), (F_, value)))  # E K, F V: (B, H, k, D)
        out = F.scaled_dot_product_attention(call.query, key.to(call.query.dtype), value.to(call.query.dtype), bias, scale=call.more.get("scaling"))
        return out.transpose(1, 2).contiguous(), None


def shares(E: Tensor, real: Tensor) -> Tensor:
    """log of the share of each mixture's weights (H or 1, k, n) that lies on tokens (B, S): (B, H or 1, 1, k). A mask: nothing learns by it."""
    weights = E.detach().abs()
    inside = torch.einsum("hks,bs->bhk", weights[..., : real.shape[1]], real.to(weights.dtype))
    return (inside / weights.sum(-1)).log()[:, :, None]
