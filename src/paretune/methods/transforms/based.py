"""Based: linear attention by the second-order Taylor expansion of exp, with the softmax's own weights in a small window.

    y_i = Σ_j w_ij v_j / Σ_j w_ij,    w_ij = exp(s_ij) for |i − j| < window,    φ(P_q q_i)·φ(P_k k_j) elsewhere,
    φ(x) = [1, x, vec(x xᵀ) / √2],    s_ij = q_i·k_j / √D,    P_q, P_k: D features of a head to feature_dim

P_q and P_k start where P_qᵀ P_k has the least error on the head's scores, W_qᵀ P_qᵀ P_k W_k = [W_qᵀ W_k]_feature_dim (Eckart and
Young), and learn. Arora et al. 2024, arXiv:2402.18668, section 4. There a layer has either kind of weights and is trained from
the start; here each layer has both under one normalizer, so that a loaded model keeps what it knows of nearby tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from paretune import anatomy
from paretune.anatomy import Attention, Site
from paretune.attention import Attend, Call, efficient, taylor
from paretune.attention.efficient import AttentionTransform, Replacement
from paretune.attention.taylor import Heads
from paretune.card import Card, knob
from paretune.errors import Incompatible


@dataclasses.dataclass(frozen=True, repr=False)
class Based(AttentionTransform):
    """Replaces softmax attention by a window and a state of fixed size."""

    card = Card(
        title="Taylor linear attention with a window",
        paper="Arora et al. 2024, Simple linear attention language models balance the recall-throughput tradeoff",
        arxiv="2402.18668",
        equation="w = exp(q·k) in the window, 1 + q·k + (q·k)²/2 elsewhere",
        lowers="E",
        why="A causal head takes n · ((4 window + 2 f) · D + 2 d² (d + 1)) products and some for the scores of d features, f = 1 + d + d (d + 1) / 2, "
        "in place of 2 n² D, and memory as n; a language model generates with a state of f · (D + 1) numbers a head.",
        note="Takes more products than attention below 2 window + f + d² (d + 1) / D tokens. Inputs of at most `window` tokens give what they gave before. "
        "The expansion is near exp for small scores alone, so longer ones ask for a training phase after it. "
        "Attention weights have no dropout. `fixed_state(model)` is the cache of fixed size for `generate`. Opens with transformers and paretune. "
        "From 1,024 to 4,096 tokens a training step's CPU time grew as n^0.9, full attention's as n^1.8 (docs/long_range.md).",
    )

    window: int = knob(64, "tokens on each side, the token itself counted, that have the softmax's weights", low=1, search="16..256 log")
    feature_dim: int = knob(16, "d, features of queries and keys in the expansion; a head's own number where it has fewer", low=1, search="8..32")

    def sites(self, model: nn.Module) -> list[Site]:
        return anatomy.with_heads(model, super().sites(model))

    def patch(self, site: Site) -> TaylorAttention:
        return TaylorAttention(site, self)

    @torch.no_grad()
    def start(self, model: nn.Module, patches: list[TaylorAttention]) -> None:
        found = {a.path: a for a in anatomy.attentions(model)}
        for patch in patches:
            assert patch.site is not None
            patch.begin(model, found[patch.site.path])


class TaylorAttention(Replacement):
    """P_q and P_k of one attention, each (H, D, d)."""

    method: Based

    def __init__(self, site: Site, knobs: Based) -> None:
        super().__init__(site)
        self.window = knobs.window
        shape = (site.heads, site.head_size, min(knobs.feature_dim, site.head_size))
        self.P_q, self.P_k = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        self.recurrent: Recurrent | None = None  # the state that the call at hand goes on from

    def begin(self, model: nn.Module, about: Attention) -> None:
        """The maps with the least error on scores of white inputs."""
        query, key = (_per_head(model, site, about.size) for site in (about.query, about.key))
        key = key.repeat_interleave(len(query) // len(key), 0)
        for own, found in zip((self.P_q, self.P_k), nearest(query, key, features=self.P_q.shape[-1]), strict=True):
            own.copy_(found)

    def attend(self, attend: Attend, call: Call) -> tuple[Tensor, Tensor | None]:
        try:
            return super().attend(attend, call)
        finally:
            self.recurrent = None

    def compute(self, attend: Attend, call: Call) -> tuple[Tensor, Tensor | None]:
        efficient.refuse_further(call, by=self.method)
        state = self.recurrent
        queries, keys = call.query.shape[2], call.key.shape[2]
        if state is None and keys <= self.window:
            return attend(call)
        causal = efficient.is_causal(call)
        with torch.autocast(call.query.device.type, enabled=False):
            heads = self._heads(call)
            if state is not None and state.sums is not None:
                out = taylor.pairwise(heads, window=self.window, causal=causal, state=state.sums)
            elif queries == keys:
                out = taylor.parallel(heads, window=self.window, causal=causal)
            else:
                out = taylor.pairwise(heads, window=self.window, causal=causal)
            if state is not None:
                state.absorb(heads)
        return out.transpose(1, 2).to(call.query.dtype).contiguous(), None

    def _heads(self, call: Call) -> Heads:
        key, value = (_wide(x) for x in efficient.repeated(call))
        scale = call.more.get("scaling")
        query = _wide(call.query) * (call.query.shape[-1] ** -0.5 if scale is None else scale)
        keep = efficient.padding(call, by=self.method)
        real = key.new_ones(1, 1, key.shape[2], dtype=torch.bool) if keep is None else keep[:, None]
        return Heads(query, key, taylor.counted(value, real), query @ self.P_q.to(query.dtype), key @ self.P_k.to(key.dtype), real)


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least: sums over the whole length have no place in fewer bits."""
    return x if x.dtype == torch.float64 else x.float()


def _per_head(model: nn.Module, site: Site, size: int) -> Tensor:
    weight = anatomy.weight(model.get_submodule(site.path)).detach().float()
    return (weight if site.rows is None else weight[torch.tensor(site.rows)]).unflatten(0, (-1, size))  # (H, D, I)


def nearest(query: Tensor, key: Tensor, *, features: int) -> tuple[Tensor, Tensor]:
    """P_q and P_k (H, D, d) by which (W_qᵀ P_q)(P_kᵀ W_k) is the best map of rank d for W_qᵀ W_k, given W_q and W_k (H, D, I)."""
    (_, left), (_, right) = (torch.linalg.qr(w.transpose(-1, -2)) for w in (query, key))  # Wᵀ = Q R, R (H, D, D)
    u, s, vt = torch.linalg.svd(left @ right.transpose(-1, -2))
    root = s[..., None, :features].sqrt()
    return (
        torch.linalg.solve_triangular(left, u[..., :features] * root, upper=True),
        torch.linalg.solve_triangular(right, vt.transpose(-1, -2)[..., :features] * root, upper=True),
    )


# --- generation with a state of fixed size --------------------------------------------------------------------------------------


class Recurrent(CacheLayerMixin):
    """One layer's state: the last window − 1 keys and values, and Σ φ(k) [v, 1]ᵀ of all tokens before them."""

    is_sliding = False

    def __init__(self, patch: TaylorAttention) -> None:
        super().__init__()
        self.patch = patch
        self.sums: Tensor | None = None  # (B, H, f, D + 1)
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begins with no token."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *further: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """The window's keys and values with the new ones behind them; the attention call then absorbs what has left the window."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        self.seen += key_states.shape[2]
        self.patch.recurrent = self
        return self.keys, self.values

    def absorb(self, heads: Heads) -> None:
        """Takes all but the last window − 1 keys into the sums."""
        leave = max(0, heads.key.shape[2] - self.patch.window + 1)
        new = taylor.features(heads.low_key[:, :, :leave]).transpose(-1, -2) @ heads.value[:, :, :leave]
        self.sums = new if self.sums is None else self.sums + new
        self.keys, self.values = self.keys[:, :, leave:].clone(), self.values[:, :, leave:].clone()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i goes on from row beam_idx[i]."""
        self.keys, self.values = (x.index_select(0, beam_idx) for x in (self.keys, self.values))
        self.sums = None if self.sums is None else self.sums.index_select(0, beam_idx)

    def get_seq_length(self) -> int:
        """How many tokens it has seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next call has, and the place of the first."""
        held = self.keys.shape[2] if self.is_initialized else 0
        return held + query_length, self.seen - held

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def fixed_state(model: nn.Module) -> Cache:
    """A cache of fixed size for one call of `generate(..., past_key_values=fixed_state(model))`, for one batch.

    Raises:
        Incompatible: for a model whose attention `based` has not replaced, and for one that reads by an encoder.
    """
    patches = [p for p in efficient.replaced(model) if isinstance(p, TaylorAttention)]
    if not patches:
        raise Incompatible(f"{type(model).__name__} has no attention of fixed state; apply based first: paretune.shrink(model, Based())")
    if getattr(model.config, "is_encoder_decoder", False):
        raise Incompatible(f"{type(model).__name__} keeps keys of its encoder, too, which have no place in a fixed state; generate without past_key_values")
    return Cache(layers=[Recurrent(patch) for patch in patches])
