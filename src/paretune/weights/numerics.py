"""Numbers as codes: the mappings that every packed format is made of, from real numbers to a few bits and back.

A mapping has one scale for each vector along the last dimension, so the view that it is given says the granularity:
`absmax(w.flatten())` is per tensor, `absmax(w)` per row (vector-wise), `absmax(grouped(w, 64))` per group of 64.

absmax, symmetric. Let a = max |x|, and let the largest code be c = 2^(b−1) − 1 (127 for 8 bits). The line through (−a, −c),
(0, 0) and (a, c) has the slope 1/s with s = a / c, so q = round(x / s): zero stays zero, and the code −c − 1 is not used.

zero_point, affine. Let x lie in [l, h], widened to hold 0. The line through (l, −c − 1) and (h, c) has s = (h − l) / (2^b − 1)
and meets the axis at z = −c − 1 − round(l / s), a whole number, so q = round(x / s) + z: zero has the code z and comes back exactly.

In both |x − x̂| ≤ s / 2, since rounding moves x / s by at most 1/2 (in fp32 x / s is off by at most 2^(b−24), so s (1/2 + 2^(b−24))
is what a test may ask for). Rounding is to the nearest code, halves to the even one, as IEEE 754 has it.

A code may stand for any level, too: `nearest` finds it in a sorted table, such as the quantiles of a normal distribution.
Jacob et al. 2017, arXiv:1712.05877 (affine); Dettmers et al. 2022, arXiv:2208.07339, section 2.1; 2023, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = torch.finfo(torch.float32).tiny


def absmax(x: Tensor, *, bits: int = 8, stored: torch.dtype = torch.float32, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes (..., n) int8 in ±(2^(bits−1) − 1), scales (...)): symmetric; `stored` is the number format of the scales, unless they are given."""
    x, top = x.detach().float(), 2 ** (bits - 1) - 1
    scales = _stored(x.abs().amax(-1) / top, stored) if scales is None else scales  # s = a / c
    codes = (x / scales.float().clamp(min=TINY)[..., None]).round().clamp(-top, top)  # q = round(x / s)
    return codes.to(torch.int8), scales


def zero_point(x: Tensor, *, bits: int = 8, stored: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(codes (..., n) int8 in −2^(bits−1) .. 2^(bits−1) − 1, scales (...), zeros (...) int8): affine."""
    x, low_code, high_code = x.detach().float(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    scales = _stored((high - low) / (2**bits - 1), stored)  # s = (h − l) / (2^b − 1)
    s = scales.float().clamp(min=TINY)
    zeros = (low_code - (low / s).round()).clamp(low_code, high_code)  # z = −c − 1 − round(l / s)
    codes = ((x / s[..., None]).round() + zeros[..., None]).clamp(low_code, high_code)  # q = round(x / s) + z
    return codes.to(torch.int8), scales, zeros.to(torch.int8)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they will be stored, so that the codes are taken with them; no number but zero has the scale zero."""
    return torch.where(scales > 0, scales.clamp(min=TINY), 0.0).to(dtype)


def scaled(codes: Tensor, scales: Tensor, *, zeros: Tensor | None = None) -> Tensor:
    """What codes (..., n) stand for, s (q − z), in fp32."""
    if zeros is None:
        return codes * scales.float()[..., None]
    return (codes - zeros.float()[..., None]).mul_(scales.float()[..., None])


def grouped(x: Tensor, size: int) -> Tensor:
    """(..., n) as (..., ⌈n / size⌉, size), the last group filled up with zeros, which change neither mapping."""
    rest = -x.shape[-1] % size
    return (F.pad(x, (0, rest)) if rest else x).unflatten(-1, (-1, size))


def ungrouped(x: Tensor, length: int) -> Tensor:
    """(..., groups, size) as (..., length): undoes `grouped`."""
    return x.flatten(-2)[..., :length]


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The number of the nearest of up to 256 rising levels for each element, uint8; a tie goes to the lower one."""
    return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


def blockwise(x: Tensor, levels: Tensor, *, size: int) -> tuple[Tensor, Tensor]:
    """(level numbers (n,) uint8, largest |x| of each block (⌈n / size⌉,)) of a flat x (n,): x / largest has its levels in [−1, 1]."""
    blocks = grouped(x.detach().float(), size)
    largest = blocks.abs().amax(-1)
    units = (blocks * (1 / largest.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    return ungrouped(nearest(units, levels.to(x.device)), len(x)), largest


def nibbles(codes: Tensor) -> Tensor:
    """Codes (..., n) in 0..15, two to a byte (..., ⌈n / 2⌉), the first one in the high half; int8, as all codes are (`packed` says why)."""
    pairs = F.pad(codes.to(torch.uint8), (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return (pairs[..., 0] << 4 | pairs[..., 1]).view(torch.int8)


def levels_of_nibbles(packed: Tensor, levels: Tensor) -> Tensor:
    """The levels (..., 2n), fp32, that bytes (..., n) of two codes each stand for: one lookup of a pair for each byte."""
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).float().view(torch.int64).flatten()  # a pair as one word
    return pairs.to(packed.device).index_select(0, packed.flatten().view(torch.uint8).int()).view(torch.float32).view(*packed.shape[:-1], -1)


def pack_bits(mask: Tensor) -> Tensor:
    """Bools of any shape as uint8 codes, eight to each, the first in its lowest bit."""
    bits = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(codes: Tensor, count: int) -> Tensor:
    """The first `count` bools that `pack_bits` packed, flat."""
    return ((codes[:, None] >> torch.arange(8, dtype=torch.uint8, device=codes.device)) & 1).flatten()[:count].bool()


@functools.cache
def normal_float() -> Tensor:
    """The 16 levels of NormalFloat4 in [−1, 1]: quantiles of the normal distribution, 8 above zero, 7 below it, and zero.

    Each half has evenly spaced probabilities from 1/2 to 1 − (1/32 + 1/30)/2, so that its outermost level stands for as much mass
    as the others; divided by the largest. The arXiv:2305.14314 code counts probabilities in fp32, and so does this.
    """
    edge = 0.9677083  # all on the CPU by name: these values are kept, and may first be asked for where a model is made without any
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, device="cpu")[:-1].double())
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, device="cpu")[:-1].double())
    levels = torch.cat([above, above.new_zeros(1), below]).sort().values.float()
    return levels / levels.max()


@functools.cache
def dynamic_float(*, signed: bool = True) -> Tensor:
    """The 256 levels of 8-bit dynamic floats in [−1, 1] (Dettmers 2016, arXiv:1511.04561): decades of 1, 2, 4, ..., 64 levels.

    With exponent e = 0 .. 6, the 2^(6−e) levels of a decade are the middles of even steps from 0.1 to 1, times 10^(−e), of either
    sign; then 0 and 1. Without a sign a decade has twice as many, in [0, 1] (arXiv:2110.02861, section 3.1).
    """
    positive: list[float] = []
    for e in range(7):
        steps = torch.linspace(0.1, 1, 2 ** (6 - e + (not signed)) + 1, device="cpu")
        positive += (10.0**-e * (steps[:-1] + steps[1:]) / 2).tolist()
    return torch.tensor(sorted([*positive, *(-p for p in positive if signed), 0.0, 1.0]), device="cpu")
