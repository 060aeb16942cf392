"""Longformer: each token sees a window around it, and a few global tokens see, and are seen by, all.

    y_i = softmax(s q_i Kᵀ) V over the j with |i − j| ≤ w d and d | i − j, or j < g;        n (2m + 1)(c + g) d_h products, not n² d_h
    y_i = softmax(s q'_i K'ᵀ) V' over all j, for i < g;      q', K', V' by maps of their own, at the start copies of the local ones

A chunk of c queries, where c is w within 64 and 256, reads its own block of c keys, m = ⌈w/c⌉ on each side, and g behind each.
Beltagy et al. 2020, arXiv:2004.05150, sections 3.1 and 3.2; positions beyond the model's own are copies of them (section 5).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune import anatomy
from paretune.anatomy import Site
from paretune.attention import Attend, Call, efficient, lengths, windows
from paretune.attention.efficient import AttentionTransform, Replacement
from paretune.attention.windows import Band
from paretune.card import Card, knob
from paretune.errors import Incompatible, RecipeError
from paretune.patches import fitting
from paretune.roles import Examples

GLOBAL = {"query_global": "query", "key_global": "key", "value_global": "value"}


@dataclasses.dataclass(frozen=True, repr=False)
class Longformer(AttentionTransform):
    """Replaces self-attention by a window and global tokens, and keeps its weights."""

    card = Card(
        title="Longformer",
        paper="Beltagy, Peters & Cohan 2020, Longformer: The Long-Document Transformer",
        arxiv="2004.05150",
        equation="softmax(s q_i K_jᵀ) V_j over |i − j| ≤ w",
        lowers="E",
        why="Attention costs n (2m + 1)(c + g) products a feature instead of n², for chunks of c queries (w within 64 and 256) that read m = ⌈w/c⌉ blocks on each side, "
        "so it grows with the length and not with its square; far tokens meet over layers.",
        note="Exact within its window: at w ≥ n − 1 without global tokens it is the model's own attention, bit for bit. Below dense_below tokens, and where "
        "attention weights are asked for (output_attentions, in eager attention), all pairs are computed and a mask hides the far ones, slower than no mask "
        "(docs/windows.md). On a CUDA device FlexAttention computes the window, which was not timed. A T5 computes its n² position biases as before. "
        "A decoder has no global tokens, for its first tokens may see nothing later; its cache keeps all keys. "
        "From 1,024 to 4,096 tokens a training step's CPU time grew as n^1.0, full attention's as n^1.8 (docs/long_range.md).",
    )
    needs_processor = True

    window: int | str = knob(256, 'keys on each side; "32,64/256": a window for each layer, and in one for equal groups of heads', low=1, search="16..512 log")
    dilation: int | str = knob(1, "the step between the keys of a window; spelled as window is", low=1)
    global_tokens: int = knob(1, "tokens at the start of an encoder that see all and are seen by all; a decoder has none", low=0)
    length: int | None = knob(None, "tokens it shall read; positions beyond the model's own are copies of them; None: as many as before", low=2)
    dense_below: int | None = knob(None, "tokens below which all pairs are computed and masked; None: where a probe finds that to be faster here", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bands(0)

    def bands(self, layer: int, *, causal: bool = False, first: int = 0) -> list[Band]:
        """The band of each group of heads of a layer."""
        window, dilation = (_spelled(self, name)[layer % len(_spelled(self, name))] for name in ("window", "dilation"))
        if len(window) > 1 < len(dilation) != len(window):
            raise RecipeError(f"{self!r}: window has {len(window)} groups of heads and dilation {len(dilation)}; give as many, or one")
        groups = max(len(window), len(dilation))
        return [Band(window[i % len(window)], dilation[i % len(dilation)], causal, first) for i in range(groups)]

    def check(self, model: nn.Module, sites: list[Site]) -> None:
        if any(self.first(site) and efficient.hides_later(model, site) for site in sites):
            raise Incompatible(f"{self!r}: {type(model).__name__} hides later tokens from its first ones, which as global tokens would see them; give global_tokens=0")
        for stack in {site.stack for site in sites}:
            count = len([site for site in sites if site.stack == stack])
            for name in ("window", "dilation"):
                given = len(_spelled(self, name))
                if given not in (1, count):
                    raise Incompatible(f"{self!r}: {name} is given for {given} layers, and {type(model).__name__} has {count}; give one, or {count}")
        if self.length is not None:
            lengths.check(model, self.length, by=self)

    def decided(self, model: nn.Module, sites: list[Site]) -> Self:
        if self.dense_below is not None:
            return self
        widest = max(window for layer in _spelled(self, "window") for window in layer)
        return dataclasses.replace(self, dense_below=windows.crossover(widest, str(model.device)))

    def first(self, site: Site) -> int:
        """g: how many tokens are global there."""
        return 0 if site.stack == "decoder" else self.global_tokens

    def patch(self, site: Site) -> Window:
        return Window(site, self)

    def start(self, model: nn.Module, patches: list[Window]) -> None:
        local = {(s.stack, s.layer, s.place): s for s in anatomy.resolve(model, "self.qkv")}
        for patch in patches:
            for name, place in GLOBAL.items() if patch.first else ():
                _copy(model, local[patch.site.stack, patch.site.layer, place], into=getattr(patch, name))

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        super().apply(model, examples)
        if self.length is not None:
            lengths.extend(model, self.length)
        return model

    def facts(self, processor: Any, model: nn.Module, *, task: Any) -> dict[str, float]:
        found = next(m.method for m in model.modules() if isinstance(m, Window))
        return {"dense_below_tokens": found.dense_below}


def _spelled(method: Longformer, name: str) -> list[list[int]]:
    """The numbers of a knob, by layer and group of heads."""
    value = getattr(method, name)
    layers = [[group.strip() for group in layer.split("/")] for layer in str(value).split(",")]
    if not all(group.isdecimal() and int(group) > 0 for layer in layers for group in layer):
        raise RecipeError(f'{method!r}: {name} is a whole number from 1, or one for each layer and group of heads, as in "32,64/256"')
    return [[int(group) for group in layer] for layer in layers]


@torch.no_grad()
def _copy(model: nn.Module, site: Site, *, into: nn.Linear) -> None:
    module = model.get_submodule(site.path)
    rows = slice(None) if site.rows is None else list(site.rows)
    into.weight.copy_(anatomy.weight(module)[rows])
    if into.bias is not None:
        into.bias.copy_(module.bias[rows])


class Window(Replacement):
    """A window at one attention call; with global tokens it has projections of its own for them."""

    site: Site
    method: Longformer
    weighs = True

    def __init__(self, site: Site, method: Longformer) -> None:
        super().__init__(site)
        self.first = method.first(site)
        self.bands = [method.bands(site.layer or 0, causal=causal, first=self.first) for causal in (False, True)]
        for name in GLOBAL if self.first else ():
            bias = site.bias and name != "key_global"  # one number for all keys of a query changes no softmax
            setattr(self, name, nn.Linear(site.in_features, site.out_features, bias=bias))

    def compute(self, attend: Attend, call: Call) -> tuple[Tensor, Tensor | None]:
        bands = self.bands[efficient.is_causal(call)]
        out, weights = windows.attention(attend, call, bands=bands, dense_below=self.method.dense_below or 0, by=self.method)
        if not self.first:
            return out, weights
        if call.mask is not None:
            efficient.require_text_first(efficient.visible(call.mask)[:, 0, -1], by=self.method)
        first, first_weights = self._of_all(call)
        g = first.shape[1]
        out = torch.cat([first, out[:, g:]], 1)
        return out, None if weights is None else torch.cat([first_weights, weights[:, :, g:]], 2)

    def _of_all(self, call: Call) -> tuple[Tensor, Tensor]:
        """The global tokens' output (B, g, H, D) and weights (B, H, g, n), without their keys and values.

        q'·(W_k x_j + b_k) = (W_kᵀ q')·x_j + a number that is the same for all j, and Σ p_j (W_v x_j + b_v) = W_v (Σ p_j x_j) + b_v Σ p_j:
        H g n D_x products a map instead of n D_x².
        """
        g, size = self.first, call.query.shape[-1]
        key, value = self.key_global.weight, self.value_global
        x = fitting(call.x, key)
        query = self.query_global(x[:, :g].contiguous()).unflatten(-1, (-1, size))  # (B, g, H, D)
        reach = torch.einsum("bghd,hdx->bhgx", query, key.unflatten(0, (-1, size)).to(query.dtype))
        scale = call.more.get("scaling")
        scores = torch.einsum("bhgx,bnx->bhgn", reach, x.to(reach.dtype)) * (size**-0.5 if scale is None else scale)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        cap = call.more.get("softcap")
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        if call.more.get("position_bias") is not None:
            scores = scores + call.more["position_bias"][:, :, :g]
        if call.mask is not None:
            said = call.mask[:, :, :g]
            scores = scores.masked_fill(~said, windows.lowest(scores.dtype)) if said.dtype == torch.bool else scores + said
        weights = scores.softmax(-1)
        kept = F.dropout(weights, call.more.get("dropout", 0.0))
        summed = torch.einsum("bhgn,bnx->bghx", kept.to(x.dtype), x)
        out = torch.einsum("bghx,hdx->bghd", summed, value.weight.unflatten(0, (-1, size)).to(summed.dtype))
        if value.bias is not None:
            out = out + kept.sum(-1).transpose(1, 2)[..., None] * value.bias.unflatten(0, (-1, size))
        return out.to(call.query.dtype), weights.to(call.query.dtype)
