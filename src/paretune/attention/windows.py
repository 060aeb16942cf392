"""Softmax attention in which a query sees a band of keys around it, and the first few keys of all: exact, in linear time.

    y_i = Σ_j p_ij v_j,   p_i = softmax_j(s q_i·k_j + m_ij) over the j with |i − j| ≤ w d and d | i − j, or j < g

Queries are taken in chunks of c. A chunk reads the m = ⌈w/c⌉ blocks of c keys on each side of its own: overlapping views of
one tensor, without a copy, given to torch's fused attention as one batch, the chunks before and behind them as two small
calls; where no chunk has all its blocks, half chunks are calls of their own. Dilation d is d such bands, over every d-th
token. The g global keys stand once behind each block, so that the views hold them. On a CUDA device torch's FlexAttention
computes the same band by blocks of keys. Beltagy et al. 2020, arXiv:2004.05150, section 3.1.

Shapes: B rows, H heads, T queries, S keys, D features, n tokens, L keys that a chunk reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paretune.attention import Attend, Call, efficient
from paretune.errors import Incompatible
from paretune.meters import clock
from paretune.roles import Method

CHUNK = (64, 256)  # fewest and most queries of a chunk: 128 and 256 tie on a CPU, 64 and 512 are slower at 16,384 tokens
HIDDEN = -1  # in the place of a key's position: not to be seen here
LENGTHS = (2, 2.5, 3, 4, 6, 8)  # in windows: where the probe looks for the crossover


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

    def sees_all(self, n: int) -> bool:
        """Does every one of n tokens see all, or all before it?"""
        return n <= self.first or self.dilation == 1 and n <= self.window + 1

    def sees(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Do queries at these positions see keys at those, or HIDDEN? Both of any shapes that broadcast: (T, 1) and (S) give (T, S)."""
        apart = rows - columns
        near = (apart.abs() <= self.window * self.dilation) & (apart % self.dilation == 0)
        seen = (near | (columns < self.first)) & (columns != HIDDEN)
        return seen & (apart >= 0) if self.causal else seen


def banded(
    query: Tensor, key: Tensor, *, value: Tensor, band: Band, mask: Tensor | None = None, scale: float | None = None, dropout: float = 0.0, cap: float | None = None
) -> Tensor:
    """The output (B, T, H, D) of self-attention within a band.

    Args:
        query, key, value: (B, H, n, D), of any strides.
        band: which keys a query sees.
        mask: (1 or B, 1 or H, n, n), True where seen or added to the scores; what is the same for all queries may have stride 0 there.
        scale: s; None is 1/√D.
        dropout: the share of probabilities that are dropped.
        cap: c, by which scores s become c tanh(s / c), as in Gemma 2.
    """
    if query.is_cuda and _fits_flex(query, band=band, mask=mask, dropout=dropout, cap=cap):
        return by_flex(query, key, value=value, band=band, mask=mask, scale=scale)
    how = {"scale": scale, "dropout": dropout, "cap": cap}
    rows = [
        _dilated(query[b], key[b], value=value[b], band=band, mask=None if mask is None else mask[b if len(mask) > 1 else 0], how=how)
        for b in range(len(query))
    ]  # fmt: skip
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def attention(attend: Attend, call: Call, *, bands: Sequence[Band], dense_below: int, by: Method) -> tuple[Tensor, Tensor | None]:
    """A model's self-attention call within bands, one for each equal group of heads.

    Short calls, those of cached tokens and those asked for their weights go the model's own way, with a mask where the band
    hides a key; all others by `banded`.

    Raises:
        Incompatible: for heads that cannot be grouped so, or scores that a family changes in its own way.
    """
    heads, queries, keys = call.query.shape[1], call.query.shape[2], call.key.shape[2]
    if heads % len(bands):
        raise Incompatible(f"{by!r}: {type(call.module).__name__} has {heads} heads, which do not make {len(bands)} equal groups")
    efficient.refuse_further(call, by=by, allowed=("position_bias", "softcap", "sliding_window"))
    if queries == keys and all(band.sees_all(keys) for band in bands):
        return attend(call)
    if queries < keys or keys < dense_below or efficient.asks_weights(call):
        return attend(_hidden(call, bands))
    key, value = efficient.repeated(call)
    mask, how = _summed(call), {"scale": call.more.get("scaling"), "dropout": call.more.get("dropout", 0.0), "cap": call.more.get("softcap")}
    size = heads // len(bands)
    parts = []
    for i, band in enumerate(bands):
        own = slice(i * size, (i + 1) * size)
        said = mask if mask is None or mask.shape[1] == 1 else mask[:, own]
        parts.append(banded(call.query[:, own], key[:, own], value=value[:, own], band=band, mask=said, **how))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0], None


def _summed(call: Call) -> Tensor | None:
    """The call's mask and bias by distance as one."""
    mask, bias = call.mask, call.more.get("position_bias")
    if mask is None or bias is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, lowest(bias.dtype)) if mask.dtype == torch.bool else bias + mask


def _hidden(call: Call, bands: Sequence[Band]) -> Call:
    """The call with a mask that hides what the bands hide, and without the keys before all of them."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    begin = keys - queries
    low = max(0, begin - max(b.window * b.dilation for b in bands)) if begin else 0
    mask = None if call.mask is None else call.mask[..., low:]
    more = dict(call.more)
    if more.get("position_bias") is not None:
        more["position_bias"] = more["position_bias"][..., low:]
    bias = _bias(tuple(bands), call.query.shape[1] // len(bands), (begin, keys), (low, keys), call.query.dtype, call.query.device)
    if bias is not None:
        hidden = lowest(bias.dtype)
        mask = bias if mask is None else mask & (bias > hidden) if mask.dtype == torch.bool else mask.masked_fill(bias == hidden, lowest(mask.dtype))
    return call._replace(key=call.key[:, :, low:], value=call.value[:, :, low:], mask=mask, more=more)


@functools.lru_cache(8)
@torch.inference_mode(False)
def _bias(bands: tuple[Band, ...], heads: int, queries: tuple[int, int], keys: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What is added to scores, (1, 1 or H, T, S): 0 where seen, else the lowest number; None where all is seen."""
    rows, columns = (torch.arange(*ends, device=device) for ends in (queries, keys))
    each = [band.sees(rows[:, None], columns) for band in bands]
    seen = each[0][None, None] if len(each) == 1 else torch.stack(each).repeat_interleave(heads, 0)[None]
    return None if seen.all() else torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, lowest(dtype))


def lowest(dtype: torch.dtype) -> float:
    """What hides a key when it is added to its score: far below all scores, and no infinity in any narrower format."""
    return torch.finfo(dtype).min / 2


# --- on a CUDA device -----------------------------------------------------------------------------------------------------------


def by_flex(query: Tensor, key: Tensor, *, value: Tensor, band: Band, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """As `banded`, by torch's FlexAttention, with masks of truth values: compiled on a CUDA device; elsewhere written out by torch, for tests, without gradients."""
    from torch.nn.attention.flex_attention import flex_attention

    n, low = query.shape[2], lowest(query.dtype)
    if mask is not None and not mask.stride(2):
        mask = mask[:, :, :1]  # a mask of keys alone is read once

    def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert mask is not None
        seen = mask[tuple(at if size > 1 else 0 for at, size in zip((b, h, i, j), mask.shape, strict=True))]
        return torch.where(seen, score, low)

    run = _compiled(flex_attention) if query.is_cuda else flex_attention
    return run(query, key, value, score_mod=None if mask is None else score, block_mask=_blocks_seen(band, n, query.device), scale=scale).transpose(1, 2)


def _fits_flex(query: Tensor, *, band: Band, mask: Tensor | None, dropout: float, cap: float | None) -> bool:
    """Can FlexAttention say it as well? It drops no probabilities; dilated bands, capped scores and what is added to scores are left to chunks."""
    plain = band.dilation == 1 and not dropout and cap is None and (mask is None or mask.dtype == torch.bool)
    return plain and query.shape[-1] >= 16 and query.dtype != torch.float64


@functools.lru_cache(32)
@torch.inference_mode(False)
def _blocks_seen(band: Band, n: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(lambda b, h, i, j: band.sees(i, j), None, None, n, n, device=device)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


# --- from which length on -------------------------------------------------------------------------------------------------------


@functools.cache
def crossover(window: int, device: str = "cpu") -> int:
    """From how many tokens on the band takes less than all pairs with a mask, forward and backward: timed here, once per process."""
    band = Band(window)
    for times in LENGTHS:
        n = int(times * max(window, band.chunk))
        query, key, value = (torch.randn(1, n, 2, 64, device=device).transpose(1, 2).requires_grad_() for _ in range(3))
        at = torch.arange(n, device=device)
        mask = torch.zeros(n, n, device=device).masked_fill_(~band.sees(at[:, None], at), lowest(torch.float32))
        ways = (  # called before the next turn
            lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask),  # noqa: B023
            lambda: banded(query, key, value=value, band=band),  # noqa: B023
        )  # fmt: skip
        with clock.one_thread():
            seconds = [[_seconds(way, (query, key, value)) for way in ways] for _ in range(4)]
        masked, chunked = map(min, zip(*seconds[1:], strict=True))
        if chunked < masked:
            return n
    return 2 * n


def _seconds(way: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> float:
    """Of forward and backward: of processor time on a CPU, whoever else is at work there."""
    now = clock.ticks(inputs[0].device.type)
    started = now()
    with torch.enable_grad():
        float(torch.autograd.grad(way().sum(), inputs)[0].sum())  # waits for the device
    return now() - started


# --- in chunks ------------------------------------------------------------------------------------------------------------------


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
    for start, stop in ((0, begin * c), (end * c, n)) if inner else _halves(n, band):
        low, high = max(0, start - band.window), min(n, stop if band.causal else stop + band.window)
        layout = _edge(band, offset, (start, stop), (low, high), query.dtype, query.device)
        k, v = (t[:, low:high] if not band.first else torch.cat([t[:, low:high], f], 1) for t, f in zip(keys, first, strict=True))
        bias = layout.bias if mask is None else layout.with_mask(mask)
        out.append(_softmax(query[None, :, start:stop], k[None], v[None], bias, **how)[0].transpose(0, 1))
        if inner and not start:
            out.append(_inner(query, keys, first=first, offset=offset, band=band, mask=mask, between=(begin, end), how=how))
    return torch.cat(out) if len(out) > 1 else out[0]


def _halves(n: int, band: Band) -> list[tuple[int, int]]:
    """Where the calls for n queries begin and end: half a chunk each, where that leaves keys out; a call costs what it costs, so that shorter ones are one."""
    size = max(band.chunk // 2, CHUNK[0]) if n > 2 * max(band.window, band.chunk) else n
    return [(start, min(n, start + size)) for start in range(0, n, size)]


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
    out = _softmax(q, k.permute(1, 0, 3, 2), v.permute(1, 0, 3, 2), bias, **how)
    return out.transpose(1, 2).flatten(0, 1)  # no copy: torch lays the output out as (chunks, c, H, D)


def _softmax(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, scale: float | None, dropout: float, cap: float | None) -> Tensor:
    """softmax(s Q Kᵀ + bias) V by torch's fused kernel, which caps no scores: those that a family caps are written out."""
    if cap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, dropout_p=dropout)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = cap * torch.tanh(scores / cap) + bias
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return F.dropout(weights, dropout) @ value


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
        low = lowest(self.bias.dtype)
        if said.dtype == torch.bool:
            return self.bias.masked_fill(~said, low)
        return said.to(self.bias.dtype).clamp_min(low).masked_fill(self.bias < 0, low)  # fp32's lowest number is -inf in bf16, of which a row makes NaN


def _layout(band: Band, rows: Tensor, *, columns: Tensor, dtype: torch.dtype) -> _Layout:
    row, column = (rows[0], columns[0]) if rows.dim() == 2 else (rows, columns)
    bias = torch.zeros(len(row), len(column), dtype=dtype, device=rows.device)
    return _Layout(rows, columns, bias.masked_fill_(~band.sees(row[:, None], column), lowest(dtype)))


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
