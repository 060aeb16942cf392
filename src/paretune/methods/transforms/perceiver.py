"""Perceiver: m latents read the input once, and the model's layers compute on them in place of its n tokens.

    Z_0 = L + W_o softmax((W_q LN(L)) (W_k LN(X))ᵀ / √D) W_v X,      Z_l = f_l(Z_(l-1)),      l = 1 ... the model's own layers

X (n, D) is the model's embedded input and L (m, D) learned; the task's head reads the latents where it read the tokens, as the
class token's place is the first latent's. W_v and W_o start as the identity, so that latents are made of what the layers know.
Jaegle et al. 2021, arXiv:2103.03206, section 3.1. The paper's cross-attention has a feed-forward block of its own, for which
the first layer's stands here, and normalizes X before W_v, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from paretune import anatomy, attention, seams
from paretune.anatomy import Site
from paretune.attention import efficient
from paretune.attention.efficient import AttentionTransform, Replacement
from paretune.card import Card, knob
from paretune.errors import Incompatible


@dataclasses.dataclass(frozen=True, repr=False)
class Perceiver(AttentionTransform):
    """Lets an encoder's layers compute on latents that read the input once."""

    card = Card(
        title="Latents that read the input",
        paper="Jaegle et al. 2021, Perceiver: General Perception with Iterative Attention",
        arxiv="2103.03206",
        equation="Z = L + W_o softmax(q(L) k(X)ᵀ) W_v X, then the layers on Z",
        lowers="E",
        why="The reading takes 2 n D² + 2 n m D products and some for the latents alone, and each layer has m places in the place of n, so that depth costs the same "
        "at any length; L and four maps have to be learned.",
        note="Encoders with one answer for an input alone: latents are not tokens, and answer no question about each. Untrained latents know nothing of the input's "
        "parts, so a training phase has to follow. Opens with transformers and paretune. "
        "From 1,024 to 4,096 tokens a training step's CPU time grew as n^0.8, full attention's as n^1.8 (docs/long_range.md).",
    )

    latents: int = knob(64, "m", low=2, search="16..256 log")

    def sites(self, model: nn.Module) -> list[Site]:
        calls = {(s.stack, s.layer): s for s in attention.sites(model, "self.attention_call", asked_by=repr(self))}
        return [dataclasses.replace(calls[ref.stack, ref.index], place="layer", path=ref.path) for ref in anatomy.layers(model)]

    def check(self, model: nn.Module, sites: list[Site]) -> None:
        efficient.require_encoder(model, by=self, why="latents that have read the whole input show every place the later tokens")
        if any(stack.counter is None for stack in anatomy.family(model).stacks):
            raise Incompatible(f"{self!r}: {type(model).__name__} calls one layer again and again, which could not tell tokens from latents; use linformer")
        replaced = next((p.method for p in efficient.replaced(model)), None)
        if replaced is not None:
            raise Incompatible(f"{self!r}: {replaced!r} has replaced the attention already; leave one of the two out")
        base = seams.seam_of(model.base_model) if model.base_model is not model else None
        pooled = next((p.method for _, _, p in base.patches() if p.wraps), None) if base else None
        if pooled is not None:
            raise Incompatible(f"{self!r}: {pooled!r} pools the tokens of the last layer, which latents replace; put {self.spelling()} before it")
        if model is not model.base_model and _answers_tokens(model):
            raise Incompatible(f"{self!r}: {type(model).__name__} answers for each token, and latents are not tokens; use longformer or linformer")

    def shared(self, model: nn.Module) -> nn.Module | None:
        return Reading(self.latents, width=self.sites(model)[0].in_features)

    def patch(self, site: Site) -> Stage:
        return Stage(site)


class Reading(nn.Module):
    """The latents, and the cross-attention by which they read."""

    def __init__(self, latents: int, *, width: int) -> None:
        super().__init__()
        self.L = nn.Parameter(nn.init.trunc_normal_(torch.empty(latents, width), std=0.02))
        self.of_latents, self.of_input = nn.LayerNorm(width), nn.LayerNorm(width)
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(width, width, bias=False) for _ in range(4))
        for same in (self.W_v, self.W_o):
            nn.init.eye_(same.weight)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Z_0 (B, m, D) from the embedded input (B, n, D), of which `keep` (B or 1, n) is no padding."""
        query = self.W_q(self.of_latents(self.L)).expand(len(x), -1, -1)
        key, value = self.W_k(self.of_input(x)), self.W_v(x)
        read = F.scaled_dot_product_attention(query.to(key.dtype), key, value, None if keep is None else keep[:, None])
        return self.L + self.W_o(read)


class Stage(Replacement):
    """One layer on latents; the first has them read the input."""

    wraps = True
    attends = False

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        x, *rest = args if args else (kwargs.pop("hidden_states"),)
        mask = rest[0] if rest else kwargs.get("attention_mask")
        assert self.site is not None and self.shared is not None
        if self.site.path.rpartition(".")[2] == "0":  # the first layer there is, whichever that was before others were dropped
            keep = None if mask is None else efficient.tokens_of(mask, causal=False, by=self.method)
            x = self.shared(x.to(self.shared.L.dtype), keep).to(x.dtype)
        return forward(x, *([None] if rest else []), *rest[1:], **{**kwargs, **({} if rest else {"attention_mask": None})})


# --- what a head answers --------------------------------------------------------------------------------------------------------


def _answers_tokens(model: nn.Module) -> bool:
    """Does the task's head give something for each token: more than (B, classes), or more for more tokens?"""
    with efficient.as_it_is(model):
        short, long = (_answered(model, length) for length in (7, 8))
    return short != long or any(len(shape) > 2 for shape in short)


def _answered(model: nn.Module, length: int) -> list[torch.Size]:
    """The shapes of the head's answers to one small input; (1, 2, length) where the head compares choices."""
    given = anatomy.small_input(model, length=length)
    if any(cls.__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values() for cls in type(model).__mro__):
        given = {name: ids[:, None].repeat(1, 2, 1) for name, ids in given.items()}
    out = model(**given)
    values = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else (out,)
    return [value.shape for value in values if isinstance(value, Tensor)]  # hidden states and attention weights come in tuples
