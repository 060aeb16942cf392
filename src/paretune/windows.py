"""Softmax attention in which a query sees a band of keys around it, and the first few keys of all: exact, in linear time.

    y_i = Σ_j p_ij v_j,   p_i = softmax_j(s q_i·k_j + m_ij) over the j with |i − j| ≤ w d and d | i − j, or j < g

Queries are taken in chunks of c. A chunk reads the m = ⌈w/c⌉ blocks of c keys on each side of its own: overlapping views of
one tensor, without a copy, given to torch's fused attention as one batch, the chunks before and behind them as two small
calls. Dilation d is d such bands, over every d-th token. The g global keys stand once behind each block, so that the views
hold them. Beltagy et al. 2020, arXiv:2004.05150, section 3.1.

Shapes: B rows, H heads, T queries, S keys, D features, n tokens, L keys that a chunk reads.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = (64, 256)  # fewest and most queries of a chunk: 128 and 256 tie on a CPU, 64 and 512 are slower at 16,384 tokens
HIDDEN = -1  # in the place of a key's position: not to be seen here


@dataclasses.dataclass(frozen=True)
class Band:
    """Which keys a query sees."""

    window: int  # keys on each side
    dilation: int = 1  # the step between them
    causal: bool = False  # the left side alone
    first: int = 0  # how many keys at the start every query sees

    @property
    def chunk(self) -> int:
        """c: queries of a chunk."""
        return min(max(self.window, CHUNK[0]), CHUNK[1])

    @property
    def blocks(self) -> int:
        """m: blocks of keys that a chunk reads on each side of its own."""
        return -(-self.window // self.chunk)

    def sees(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Do queries at positions (T) see keys at positions (S), or HIDDEN? (T, S)"""
        apart = rows[:, None] - columns
        near = (apart.abs() <= self.window * self.dilation) & (apart % self.dilation == 0)
        seen = (near | (columns < self.first)) & (columns != HIDDEN)
        return seen & (apart >= 0) if self.causal else seen


def attend(query: Tensor, key: Tensor, *, value: Tensor, band: Band, mask: Tensor | None = None, scale: float | None = None, dropout: float = 0.0) -> Tensor:
    """The output (B, T, H, D) of self-attention within a band.

    Args:
        query, key, value: (B, H, n, D), of any strides.
        band: which keys a query sees.
        mask: (1 or B, 1 or H, n, n), True where seen or added to the scores; what is the same for all queries may have stride 0 there.
        scale: s; None is 1/√D.
        dropout: the share of probabilities that are dropped.
    """
    how = {"scale": scale, "dropout_p": dropout}
    rows = [
        _dilated(query[b], key[b], value=value[b], band=band, mask=None if mask is None else mask[b if len(mask) > 1 else 0], how=how)
        for b in range(len(query))
    ]  # fmt: skip
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _dilated(query: Tensor, key: Tensor, *, value: Tensor, band: Band, mask: Tensor | None, how: dict) -> Tensor:
    """One row: (H, n, D) to (n, H, D)."""
    n, d = query.shape[1], band.dilation
    first = key[:, : band.first], value[:, : band.first]
    parts = [_banded(query[:, r::d], (key[:, r::d], value[:, r::d]), first=first, offset=r, band=band, mask=mask, how=how) for r in range(min(d, n))]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.cat([torch.arange(r, n, d) for r in range(len(parts))]).argsort().to(query.device)]


def _banded(query: Tensor, keys: tuple[Tensor, Tensor], *, first: tuple[Tensor, Tensor], offset: int, band: Band, mask: Tensor | None, how: dict) -> Tensor:
    """Attention of every d-th token, counted from `offset`, to each other and to the first of all: (H, n, D) to (n, H, D)."""
    n, c, m = query.shape[1], band.chunk, band.blocks
    behind = 0 if band.causal else m
    begin = m + -(-band.first // (c * band.dilation))  # the chunks in between all see the same pattern: no key twice, none missing
    end = n // c - behind
    inner = end > begin
    out = []
    for start, stop in ((0, begin * c), (end * c, n)) if inner else ((0, n),):
        low, high = max(0, start - m * c), min(n, stop + behind * c)
        layout = _edge(band, offset, (start, stop), (low, high), query.dtype, query.device)
        k, v = (t[:, low:high] if not band.first else torch.cat([t[:, low:high], f], 1) for t, f in zip(keys, first, strict=True))
        bias = layout.bias if mask is None else layout.with_mask(mask)
        out.append(F.scaled_dot_product_attention(query[None, :, start:stop], k[None], v[None], attn_mask=bias, **how)[0].transpose(0, 1))
        if inner and not start:
            out.append(_inner(query, keys, first=first, offset=offset, band=band, mask=mask, between=(begin, end), how=how))
    return torch.cat(out) if inner else out[0]


def _inner(
    query: Tensor, keys: tuple[Tensor, Tensor], *, first: tuple[Tensor, Tensor], offset: int, band: Band, mask: Tensor | None, between: tuple[int, int], how: dict
) -> Tensor:
    """The chunks that have all their blocks, as one batch: (chunks·c, H, D)."""
    (begin, end), c, m = between, band.chunk, band.blocks
    low, high = (begin - m) * c, (end if band.causal else end + m) * c
    layout = _middle(band, offset, between, query.dtype, query.device)
    q = query[:, begin * c : end * c].unflatten(1, (-1, c)).transpose(0, 1)  # (chunks, H, c, D)
    k, v = (_interleaved(t[:, low:high], f, c).unfold(1, layout.span, c + band.first) for t, f in zip(keys, first, strict=True))  # (H, chunks, D, L)
    bias = layout.bias if mask is None else layout.with_mask(mask)
    out = F.scaled_dot_product_attention(q, k.permute(1, 0, 3, 2), v.permute(1, 0, 3, 2), attn_mask=bias, **how)
    return out.transpose(1, 2).flatten(0, 1)  # no copy: torch lays the output out as (chunks, c, H, D)


def _interleaved(keys: Tensor, first: Tensor, c: int) -> Tensor:
    """The first keys of all behind each block of c: (H, blocks·(c + g), D); without any the keys as they are."""
    if not first.shape[1]:
        return keys
    blocks = keys.unflatten(1, (-1, c))
    return torch.cat([blocks, first[:, None].expand(-1, blocks.shape[1], -1, -1)], 2).flatten(1, 2)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the queries and keys of one call stand, and which of them see each other."""

    rows: Tensor  # positions of queries: (T), or (chunks, c)
    columns: Tensor  # positions of keys, or HIDDEN: (S), or (chunks, L)
    bias: Tensor  # 0 where seen, else the lowest number: (T, S) or (c, L)

    @property
    def span(self) -> int:
        return self.columns.shape[-1]

    def with_mask(self, mask: Tensor) -> Tensor:
        """What is added to scores where a mask (1 or H, n, n) says more: (1 or chunks, 1 or H, T, S)."""
        rows = self.rows if mask.stride(1) else self.rows[..., :1]  # a mask of keys alone is read once
        said = mask[:, rows[..., None], self.columns.clamp_min(0)[..., None, :]]
        said = said.transpose(0, 1) if self.rows.dim() == 2 else said[None]
        lowest = torch.finfo(self.bias.dtype).min
        if said.dtype == torch.bool:
            return self.bias.masked_fill(~said, lowest)
        return said.to(self.bias.dtype).masked_fill(self.bias < 0, lowest)


def _layout(band: Band, rows: Tensor, *, columns: Tensor, dtype: torch.dtype) -> _Layout:
    row, column = (rows[0], columns[0]) if rows.dim() == 2 else (rows, columns)
    bias = torch.zeros(len(row), len(column), dtype=dtype, device=rows.device)
    return _Layout(rows, columns, bias.masked_fill_(~band.sees(row, column), torch.finfo(dtype).min))


@functools.lru_cache(32)
@torch.inference_mode(False)
def _edge(band: Band, offset: int, queries: tuple[int, int], keys: tuple[int, int], dtype: torch.dtype, device: torch.device) -> _Layout:
    rows, columns = (offset + band.dilation * torch.arange(*ends, device=device) for ends in (queries, keys))
    if band.first:
        columns = torch.cat([columns.masked_fill(columns < band.first, HIDDEN), torch.arange(band.first, device=device)])
    return _layout(band, rows, columns=columns, dtype=dtype)


@functools.lru_cache(32)
@torch.inference_mode(False)
def _middle(band: Band, offset: int, between: tuple[int, int], dtype: torch.dtype, device: torch.device) -> _Layout:
    (begin, end), c, m, g = between, band.chunk, band.blocks, band.first
    low, high, read = (begin - m) * c, (end if band.causal else end + m) * c, m + 1 if band.causal else 2 * m + 1
    columns = offset + band.dilation * torch.arange(low, high, device=device).unflatten(0, (-1, c))  # (blocks, c)
    columns = torch.cat([columns, torch.arange(g, device=device).expand(len(columns), g)], 1).flatten()
    columns = columns.unfold(0, read * (c + g), c + g).clone()  # (chunks, L)
    again = columns[:, c + g :]
    again[again < g] = HIDDEN  # the first keys of all stand behind every block, and are seen once
    rows = offset + band.dilation * torch.arange(begin * c, end * c, device=device).unflatten(0, (-1, c))
    return _layout(band, rows, columns=columns, dtype=dtype)
