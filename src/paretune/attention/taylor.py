"""Based's attention: the softmax's own weights within a small window, their second-order Taylor expansion everywhere else.

    y_i = Σ_j w_ij v_j / Σ_j w_ij,    w_ij = exp(s_ij) for |i − j| < w,   1 + s'_ij + s'_ij²/2 = φ(q'_i)·φ(k'_j) elsewhere,
    φ(x) = [1, x, x_i x_j for i < j, x_i² / √2],    s = scale · q·k,   s' = q'·k'

What is elsewhere enters through the sums Σ_j φ(k'_j) [v_j, 1]ᵀ, whose size does not grow with the length: the parallel form adds
them up chunk by chunk, the recurrent form token by token. Arora et al. 2024, arXiv:2402.18668, section 4.

The paper's φ has all of vec(x xᵀ) / √2, where each product of two different features stands twice; its inner products are the same.

Shapes: B rows, H heads, T queries, S keys, D features of a head, d of a head's features for φ, f = 1 + d + d (d + 1) / 2 of φ.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from paretune.attention.chunks import beside, chunks, places, places_beside

TINY = 1e-12  # a query that sees no key gets zeros


@dataclasses.dataclass
class Heads:
    """Queries, keys and values of one attention call, in fp32 at least; T ≤ S, the queries are the last T positions."""

    query: Tensor  # (B, H, T, D), times scale
    key: Tensor  # (B, H, S, D)
    value: Tensor  # (B, H, S, D + 1): a padded token's are zeros, and the last feature, of ones, counts the weights
    low_query: Tensor  # (B, H, T, d)
    low_key: Tensor  # (B, H, S, d)
    real: Tensor  # (B, 1, S), where there is no padding


def counted(value: Tensor, real: Tensor) -> Tensor:
    """Values (B, H, S, D) with a one behind each, and zeros at padding (B, 1, S): (B, H, S, D + 1)."""
    return torch.cat([value, torch.ones_like(value[..., :1])], -1) * real[..., None]


def features(x: Tensor) -> Tensor:
    """φ: (..., d) to (..., f), so that φ(x)·φ(y) = 1 + x·y + (x·y)²/2."""
    size = x.shape[-1]
    i, j = torch.triu_indices(size, size, device=x.device)
    one = torch.eye(size, dtype=x.dtype, device=x.device)
    left, right = one[:, i], one[:, j] * (1 + (i != j)).to(x.dtype).div(2).sqrt()  # products gather faster than indices do, above all backward
    return torch.cat([torch.ones_like(x[..., :1]), x, (x @ left) * (x @ right)], -1)


def expansion(low_query: Tensor, low_key: Tensor, *, times: Tensor) -> Tensor:
    """(1 + s' + s'²/2) times (..., T, 1): (..., T, S); without its factor it is exp(s') up to the third order, and never under 1/2."""
    half = (times / 2).sqrt()
    first = torch.cat([low_query, torch.ones_like(low_query[..., :1])], -1) * half
    return (first @ torch.cat([low_key, torch.ones_like(low_key[..., :1])], -1).transpose(-1, -2)).square() + half.square()  # ((s' + 1)² + 1) / 2


def pairwise(heads: Heads, *, window: int, causal: bool, state: Tensor | None = None) -> Tensor:
    """Every pair by itself: for a few queries (B, H, T, D); `state` (B, H, f, D + 1) is of keys that come before all these."""
    queries, keys = heads.query.shape[2], heads.key.shape[2]
    i = torch.arange(keys - queries, keys, device=heads.key.device)[:, None]
    j = torch.arange(keys, device=heads.key.device)
    near, far = _kinds(i - j, window=window, causal=causal)
    real = heads.real[..., None, :]
    some = (far & real).any(-1, keepdim=True)
    if state is not None:
        some = some | _counts(state)
    weights, least = _weights(heads.query, heads.key, heads.low_query, heads.low_key, near=near & real, far=far, some=some)
    out = weights @ heads.value
    return _normalized(out if state is None else out + features(heads.low_query) * least @ state)


def parallel(heads: Heads, *, window: int, causal: bool) -> Tensor:
    """All positions at once (T = S), in chunks of a window's size: O(T (w D + f D)). Returns (B, H, T, D)."""
    length, around = heads.key.shape[2], {"back": 1, "ahead": 0 if causal else 1}
    key, value, low_key = (chunks(x, window) for x in (heads.key, heads.value, heads.low_key))
    own = places(length, window, like=key)
    near, far = _kinds(own[:, :, None] - (seen := places_beside(length, window, **around, like=key))[:, None], window=window, causal=causal)
    real = beside(chunks(heads.real[..., None].to(value.dtype), window), **around)[..., 0].bool()[..., None, :]  # (B, 1, C, 1, L)
    sums = features(low_key).transpose(-1, -2) @ value  # (B, H, C, f, D + 1)
    distant = _before(sums) if causal else _before(sums) + _before(sums.flip(2)).flip(2)
    some = (far & real).any(-1, keepdim=True) | _counts(distant)
    query, low_query = chunks(heads.query, window), chunks(heads.low_query, window)
    weights, least = _weights(query, beside(key, **around), low_query, beside(low_key, **around), near=near & (seen >= 0)[:, None] & real, far=far, some=some)
    out = weights @ beside(value, **around) + features(low_query) * least @ distant
    return _normalized(out).flatten(2, 3)[:, :, :length]


def _before(sums: Tensor) -> Tensor:
    """Of each chunk, the sum over all chunks but its neighbor in front of it: (B, H, C, f, D + 1)."""
    count = sums.shape[2]
    total = sums.cumsum(2)[:, :, : max(0, count - 2)]
    return torch.cat([torch.zeros_like(sums[:, :, : min(2, count)]), total], 2)


def _kinds(distance: Tensor, *, window: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Which pairs have the softmax's weight, and which the expansion, by how far the key is behind the query."""
    near = distance.abs() < window
    return (near & (distance >= 0), distance >= window) if causal else (near, ~near)


def _counts(sums: Tensor) -> Tensor:
    """Is any token in the sums (..., f, D + 1), whose first feature and last value are ones? (..., 1, 1)"""
    return sums[..., :1, -1:] > 0


def _weights(query: Tensor, key: Tensor, low_query: Tensor, low_key: Tensor, *, near: Tensor, far: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """w_ij e^(-m_i) (..., T, S), and e^(-m_i) (..., T, 1), where m_i is the largest exponent, and of a query that sees `some` far key at least 0: sums are finite."""
    scores = (query @ key.transpose(-1, -2)).masked_fill(~near, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    floored = top.clamp(min=0)
    least, top = torch.exp(-floored), torch.where(some | top.isinf(), floored, top)
    return torch.exp(scores - top) + far * expansion(low_query, low_key, times=least), least


def _normalized(out: Tensor) -> Tensor:
    return out[..., :-1] / out[..., -1:].clamp(min=TINY)
