"""Reformer: each token attends to those that a hash finds near it.

    h(x) = argmax [x R; −x R],    P_i = {j: h(q_j) = h(q_i), in i's chunk of the order by (h, position), or in the one before},
    o_i = Σ_r exp(z_i^r − z_i) Σ_(j ∈ P_i^r) exp(s_ij − z_i^r) v_j,    s_ij = q_i·q_j / |q_j|,    z_i = log Σ_r exp(z_i^r),
    z_i^r = log Σ_(j ∈ P_i^r) exp(s_ij),    R (D, buckets / 2) of Gaussians, another for each round r

Queries and keys are one: the mean of the model's own two maps. A token attends to itself where no other is left (s_ii is 10⁵ less),
and a pair that several rounds find counts as often, as in the authors' code. Kitaev et al. 2020, arXiv:2001.04451, section 2.

Shapes: B rows, H heads, T tokens, D features of a head, r rounds, C chunks of c tokens in order.
"""

from __future__ import annotations

import dataclasses

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
    query = _chunked(x, order, size)  # (B, H, r, C, c, D)
    key, values = beside(F.normalize(query, dim=-1), back=1), beside(_chunked(value, order, size), back=1)
    scores = (query @ key.transpose(-1, -2)).add_(_bias(order, found=found, size=size, dtype=x.dtype))
    top = scores.detach().amax(-1, keepdim=True)
    weights = (scores - top).exp_()  # the one exponential, for the softmax and for z
    total = weights.sum(-1, keepdim=True)
    out, z = weights @ values / total, top + total.log()
    back = order.argsort(-1)[..., None]
    out, z = (t.flatten(3, 4)[..., : x.shape[2], :].gather(3, back.expand(*back.shape[:-1], t.shape[-1])) for t in (out, z))
    return (torch.softmax(z, 2) * out).sum(2)


def buckets(x: Tensor, R: Tensor, *, size: int, real: Tensor) -> Tensor:
    """Each token's bucket in each round, (B, H, r, T): of as many as its row's tokens fill, one where they fill but one; padding comes last."""
    lengths = real.sum(-1)  # (B)
    halves = (-(-lengths // (2 * size))).clamp(max=R.shape[-1])
    R = R[..., : int(halves.max())]
    rotated = torch.einsum("bhtd,rdk->bhrtk", x.detach(), R.to(x.dtype))
    unused = torch.arange(R.shape[-1], device=x.device) >= halves[:, None]  # (B, halves)
    both = torch.cat([rotated, -rotated], -1).masked_fill(unused.repeat(1, 2)[:, None, None, None], -torch.inf)
    found = both.argmax(-1).masked_fill((lengths <= size)[:, None, None, None], 0)
    return found.masked_fill(~real[:, None, None], 2 * R.shape[-1])


def _chunked(x: Tensor, order: Tensor, size: int) -> Tensor:
    """(B, H, T, D) in the order of each round, in chunks: (B, H, r, C, c, D)."""
    rounds = order.shape[2]
    wide = x[:, :, None].expand(-1, -1, rounds, -1, -1)
    return chunks(wide.gather(3, order[..., None].expand_as(wide)), size)


def _bias(order: Tensor, *, found: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores (B, H, r, C, c, 2c): with the token itself it comes last, other buckets and places beyond the ends never."""
    about = torch.stack([order, found.gather(-1, order)], -1) + 1  # place and bucket, zero beyond the ends
    own = chunks(about, size)
    near = beside(own, back=1)
    (place, bucket), (other, its) = own[..., None, :].unbind(-1), near[..., None, :, :].unbind(-1)
    hidden = bucket != its
    return torch.zeros(hidden.shape, dtype=dtype, device=order.device).masked_fill_(place == other, SELF).masked_fill_(hidden, NEVER)
