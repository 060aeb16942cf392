"""Reformer: each token attends to those that a hash finds near it.

    h(x) = argmax [x R; −x R],    P_i = {j: h(q_j) = h(q_i), in i's chunk of the order by (h, position), or in the one before},
    o_i = Σ_r exp(z_i^r − z_i) Σ_(j ∈ P_i^r) exp(s_ij − z_i^r) v_j,    s_ij = q_i·q_j / |q_j|,    z_i = log Σ_r exp(z_i^r),
    z_i^r = log Σ_(j ∈ P_i^r) exp(s_ij),    R (D, buckets / 2) of Gaussians, another for each round r

Queries and keys are one: the mean of the model's own two maps. A token attends to itself where no other is left (s_ii is 10⁵ less).
A key of length one in the place of 1/√D, and a pair counting as often as rounds find it, are as in the authors' code. Kitaev et al. 2020, arXiv:2001.04451, section 2.

Shapes: B rows, H heads, T tokens, D features of a head, r rounds, C chunks of c tokens in order.
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
from paretune.attention.chunks import beside, chunks
from paretune.attention.efficient import AttentionTransform, Replacement
from paretune.card import Card, knob

SELF = -1e5  # what is added to the score of a token with itself
NEVER = -1e9  # and to that with what it must not see
HALVES = 256  # columns of R: the most buckets are twice as many


@dataclasses.dataclass(frozen=True, repr=False)
class Reformer(AttentionTransform):
    """Replaces an encoder's attention by attention within the buckets of a hash."""

    card = Card(
        title="Locality-sensitive hashing attention",
        paper="Kitaev et al. 2020, Reformer: The Efficient Transformer",
        arxiv="2001.04451",
        equation="o = Σ_r exp(z^r − z) softmax(q kᵀ / |k|) v within a bucket, q = k",
        lowers="E",
        why="A head takes rounds · n · (4 bucket_size + n / (2 bucket_size)) · D products, the latter of them for the hash, and a sort, in place of 2 n² D, and "
        "memory as rounds · n · bucket_size; what the hash misses is not seen.",
        note="Encoders alone: where a chunk ends depends on the hashes of all tokens, the later ones, too. Queries and keys become one, which changes the output "
        "of a loaded model at any length, so a training phase has to follow. Attention weights have no dropout. Opens with transformers and paretune. "
        "From 1,024 to 4,096 tokens a training step's CPU time grew as n^1.1, full attention's as n^1.8 (docs/long_range.md).",
    )

    bucket_size: int = knob(64, "tokens of a chunk, and of a bucket on average", low=1, search="16..128 log")
    rounds: int = knob(4, "hashes, each with its own buckets", low=1, high=16, search="1..8 log")

    def check(self, model: nn.Module, sites: list[Site]) -> None:
        efficient.require_encoder(model, by=self, why="where its chunks end depends on the hashes of all tokens, which would show each the later ones")

    def sites(self, model: nn.Module) -> list[Site]:
        return anatomy.with_heads(model, super().sites(model))

    def patch(self, site: Site) -> Hashed:
        return Hashed(site, self)


class Hashed(Replacement):
    """One attention within buckets; its rotations R are drawn once and stored."""

    method: Reformer
    R: Tensor  # (r, D, HALVES)

    def __init__(self, site: Site, knobs: Reformer) -> None:
        super().__init__(site)
        self.register_buffer("R", torch.randn(knobs.rounds, site.head_size, HALVES))

    def compute(self, attend: Attend, call: Call) -> tuple[Tensor, Tensor | None]:
        efficient.refuse_further(call, by=self.method)
        key, value = efficient.repeated(call)
        keep = efficient.padding(call, by=self.method)
        shared = (call.query + key) / 2
        real = torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device) if keep is None else keep.expand(len(key), -1)
        with torch.autocast(key.device.type, enabled=False):
            out = attention(*(x if x.dtype == torch.float64 else x.float() for x in (shared, value)), R=self.R, size=self.method.bucket_size, real=real)
        return out.transpose(1, 2).to(call.query.dtype).contiguous(), None


def attention(x: Tensor, value: Tensor, *, R: Tensor, size: int, real: Tensor) -> Tensor:
    """o (B, H, T, D) for shared queries and keys x and values, each (B, H, T, D), where `real` (B, T) is no padding."""
    found = buckets(x, R, size=size, real=real)  # (B, H, r, T)
    order = (found * x.shape[2] + torch.arange(x.shape[2], device=x.device)).argsort(-1)
    own = chunks(found.gather(-1, order)[..., None].short() + 1, size)  # (B, H, r, C, c, 1), zero beyond the end
    hidden = own != beside(own, back=1).transpose(-1, -2)  # (B, H, r, C, c, 2c)
    return _Rounds.apply(x, F.normalize(x, dim=-1), value, order, hidden)


def buckets(x: Tensor, R: Tensor, *, size: int, real: Tensor) -> Tensor:
    """Each token's bucket in each round, (B, H, r, T): of as many as its row's tokens fill, one where they fill but one; padding comes last."""
    lengths = real.sum(-1)  # (B)
    halves = (-(-lengths // (2 * size))).clamp(1, R.shape[-1])
    R = R[..., : int(halves.max())]
    rotated = torch.einsum("bhtd,rdk->bhrtk", x.detach(), R.to(x.dtype))
    unused = torch.arange(R.shape[-1], device=x.device) >= halves[:, None]  # (B, halves)
    both = torch.cat([rotated, -rotated], -1).masked_fill(unused.repeat(1, 2)[:, None, None, None], -torch.inf)
    found = both.argmax(-1).masked_fill((lengths <= size)[:, None, None, None], 0)
    return found.masked_fill(~real[:, None, None], 2 * R.shape[-1])


class _Rounds(torch.autograd.Function):
    """Softmax over what all rounds find, (B, H, T, D), by each round's own softmax w and its share p of the whole.

        w_ij = exp(s_ij − z_i^r),    p_i = exp(z_i^r − z_i),    o_i = Σ_r p_i Σ_j w_ij v_j,
        ∂L/∂v_j = Σ_r Σ_i w_ij p_i g_i,    ∂L/∂s_ij = w_ij (p_i g_i·v_j − p_i g_i·o_i),    g = ∂L/∂o

    Orders are permutations, so that the gradient of sorting is sorting back.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, order: Tensor, hidden: Tensor) -> Tensor:
        out, *found = _softmax(query, key, value=value, order=order, hidden=hidden)
        ctx.save_for_backward(query, key, value, order, hidden, out, *found)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, order, hidden, out, q, k, v, weights, share = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this one is wanted, too
            again = _softmax(*inputs[:2], value=inputs[2], order=order, hidden=hidden)[0]
            wanted = [t for t, asked in zip(inputs, ctx.needs_input_grad, strict=False) if asked]
            found = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
            return tuple(next(found) if asked else None for asked in ctx.needs_input_grad)
        back, shares = order.argsort(-1)[..., None], share.gather(-1, order)[..., None]
        both = torch.cat([grad, (grad * out).sum(-1, keepdim=True)], -1)[:, :, None]  # g and g·o
        part, whole = chunks(_rows(both, order[..., None]) * shares, weights.shape[-2]).split([grad.shape[-1], 1], -1)
        scores = (part @ v.transpose(-1, -2)).sub_(whole).mul_(weights)
        in_order = scores @ k, _together(scores.transpose(-1, -2) @ q), _together(weights.transpose(-1, -2) @ part)
        return *(_rows(t.flatten(3, 4), back).sum(2) for t in in_order), None, None


def _softmax(query: Tensor, key: Tensor, *, value: Tensor, order: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    """o; the sorted q, k and v (B, H, r, C, c or 2c, D), their w (B, H, r, C, c, 2c); p (B, H, r, T)."""
    size, back = hidden.shape[-2], order.argsort(-1)
    own = chunks(order[..., None], size)
    near = beside(own, back=1)  # beyond the ends stands the first token, hidden
    q, k, v = (_rows(t[:, :, None], at) for t, at in ((query, own), (key, near), (value, near)))
    scores = (q @ k.transpose(-1, -2)).masked_fill_(hidden, NEVER)
    scores.diagonal(offset=size, dim1=-2, dim2=-1).add_(SELF)  # a chunk's own tokens come last
    weights = scores.softmax(-1)
    z = (scores.amax(-1) - weights.amax(-1).log()).flatten(3)  # the greatest weight is exp(top − z)
    share = z[..., : order.shape[-1]].gather(-1, back).softmax(2)
    return (share[..., None] * _rows((weights @ v).flatten(3, 4), back[..., None])).sum(2), q, k, v, weights, share


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Whole rows of x (B, H, r or 1, ≥ T, D), by each round's index (B, H, r, ..., 1): (B, H, r, ..., D)."""
    begins = torch.arange(0, x.shape[:-1].numel(), x.shape[-2], device=x.device).view(*x.shape[:3], *[1] * (index.dim() - 3))
    return x.reshape(-1, x.shape[-1]).index_select(0, (begins + index).flatten()).view(*index.shape[:-1], -1)


def _together(x: Tensor) -> Tensor:
    """What a chunk and the one behind it have for the chunk (..., C, 2c, D), added up: (..., C, c, D)."""
    before, own = x.chunk(2, -2)
    return torch.cat([own[..., :-1, :, :] + before[..., 1:, :, :], own[..., -1:, :, :]], -3)
