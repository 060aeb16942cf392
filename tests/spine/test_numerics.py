"""The mappings against exact rational arithmetic, and the tables of levels against their definitions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import norm

from paretune.weights import numerics
from paretune.weights.numerics import absmax, blockwise, grouped, levels_of_nibbles, nearest, nibbles, pack_bits, scaled, ungrouped, unpack_bits, zero_point

BITS = (2, 3, 4, 8)


def random_rows(seed, bits):
    """Rows of many shapes: wide and narrow spreads, all of one sign, with an outlier, constant, zero, and with halves of a step."""
    random = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 40, (1,), generator=random))
    rows = torch.randn(12, n, generator=random) * torch.logspace(-6, 6, 12)[:, None]
    rows[1] = rows[1].abs()
    rows[2] = -rows[2].abs()
    rows[3, 0] *= 1000
    rows[4] = 3.25
    rows[5] = -0.1
    rows[6] = 0
    top = 2 ** (bits - 1) - 1
    rows[7] = torch.randint(-2 * top, 2 * top + 1, (n,), generator=random) / 2  # with a largest of ±top every half is exact
    rows[7, 0] = top
    rows[8] = 1e-39  # below fp32's normal numbers
    return rows


def exact(row):
    return [Fraction(float(v)) for v in row]


def slack(bits):
    return Fraction(1, 2) + Fraction(1, 2 ** (24 - bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(5))
def test_absmax_in_rational_arithmetic(seed, bits):
    rows, top = random_rows(seed, bits), 2 ** (bits - 1) - 1
    codes, scales = absmax(rows, bits=bits)
    assert codes.dtype == torch.int8 and scales.shape == rows.shape[:1]
    for row, q, s in zip(rows, codes.tolist(), exact(scales), strict=True):
        w = exact(row)
        largest = max(map(abs, w))
        assert abs(s - largest / top) <= max(largest / top / 2**24, Fraction(numerics.TINY)), "s = a / c, rounded once"
        assert (s == 0) == (largest == 0)
        for value, code in zip(w, q, strict=True):
            assert abs(value - s * code) <= s * slack(bits), "|w − s q| ≤ s / 2"
            assert abs(code) <= top and (value != 0 or code == 0)
            if s and largest > numerics.TINY * top:
                near = abs((value / s) % 1 - Fraction(1, 2)) <= Fraction(1, 2 ** (24 - bits)) and value / s % 1 != Fraction(1, 2)
                assert code == round(value / s) or near, "to the nearest code, halves to the even one"
                assert abs(value) != largest or abs(code) == top, "−a → −c, +a → +c"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(5))
def test_zero_point_in_rational_arithmetic(seed, bits):
    rows, lowest, highest = random_rows(seed, bits), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes, scales, zeros = zero_point(rows, bits=bits)
    for row, q, s, z in zip(rows, codes.tolist(), exact(scales), zeros.tolist(), strict=True):
        w = exact(row)
        low, high = min(*w, Fraction(0)), max(*w, Fraction(0))
        assert abs(s - (high - low) / (2**bits - 1)) <= max(s / 2**22, Fraction(numerics.TINY)) and lowest <= z <= highest
        for value, code in zip(w, q, strict=True):
            assert abs(value - s * (code - z)) <= s * slack(bits), "|w − s (q − z)| ≤ s / 2"
            assert lowest <= code <= highest and (value != 0 or code == z), "zero stays zero"
            if s and high - low > numerics.TINY * 2**bits:
                assert value != low or code == lowest, "min → −c − 1"
                assert value != high or code >= highest - 1 + (low == 0), "max → c, or beside it where both ends lie between codes"


def test_halves_go_to_the_even_code():
    codes, scales = absmax(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]))
    assert scales == 1 and codes.tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_the_view_says_the_granularity():
    w = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    (whole, s), (rows, r) = absmax(w.flatten()), absmax(w)
    groups, g = absmax(grouped(w, 4))
    assert s.shape == () and r.shape == (6,) and g.shape == (6, 3)
    assert s == r.max() and torch.equal(r, g.amax(-1))
    errors = [float((w - back).norm()) for back in (scaled(whole, s).view(6, 10), scaled(rows, r), ungrouped(scaled(groups, g), 10))]
    assert errors == sorted(errors, reverse=True), "a scale for fewer numbers is a finer one"
    assert torch.equal(ungrouped(grouped(w, 4), 10), w) and torch.equal(grouped(w, 5), w.view(6, 2, 5))


def test_scales_may_be_stored_in_fewer_bits_and_the_codes_are_taken_with_them():
    w = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    codes, scales = absmax(w, bits=4, stored=torch.bfloat16)
    assert scales.dtype == torch.bfloat16
    assert ((w - scaled(codes, scales)).abs() <= scales.float()[:, None] * (0.5 + 7 / 256)).all()
    codes, scales, zeros = zero_point(w, bits=4, stored=torch.bfloat16)
    assert ((w - scaled(codes, scales, zeros=zeros)).abs() <= scales.float()[:, None] * (0.5 + 16 / 256)).all()


def test_shapes_follow_without_values():
    """A packed module takes the shapes of its tensors from its format, on torch's meta device."""
    x = torch.empty(3, 70, device="meta")
    assert absmax(grouped(x, 32))[1].shape == (3, 3) and blockwise(x.flatten(), numerics.normal_float(), size=64)[1].shape == (4,)
    assert nibbles(absmax(x)[0]).shape == (3, 35)


def test_normal_float_has_the_quantiles_of_its_definition():
    """Dettmers et al. 2023, section 3: evenly spaced probabilities in each half, from 1 − (1/32 + 1/30) / 2 to 1/2, and a zero."""
    levels = numerics.normal_float().double()
    edge = 1 - (1 / 32 + 1 / 30) / 2
    largest = norm.ppf(edge)
    above = [norm.ppf(0.5 + (edge - 0.5) * i / 8) / largest for i in range(1, 9)]
    below = [norm.ppf(0.5 - (edge - 0.5) * i / 7) / largest for i in range(1, 8)]
    assert torch.allclose(levels, torch.tensor(sorted([*above, 0, *below]), dtype=torch.float64), atol=2e-7)
    assert levels[7] == 0 and levels[0] == -1 and levels[15] == 1


def test_dynamic_floats_are_decades_of_growing_fineness():
    levels = numerics.dynamic_float()
    assert len(levels.unique()) == 256 and levels[127] == 0 and levels[-1] == 1 and levels[0] == pytest.approx(-1 + 0.9 / 128)
    for e in range(7):
        inside = levels[(levels > 0.1 * 10**-e) & (levels < 10**-e)]
        assert len(inside) == 2 ** (6 - e)
        assert torch.allclose(inside.diff(), torch.tensor(0.9 * 10.0**-e / 2 ** (6 - e)), rtol=1e-3)


def test_blockwise_takes_the_nearest_level():
    levels = numerics.normal_float()
    x = torch.randn(70, generator=torch.Generator().manual_seed(0))
    x[:16] = 0
    codes, largest = blockwise(x, levels, size=16)
    assert largest.shape == (5,) and largest[0] == 0 and (codes[:16] == 7).all()
    for i, value in enumerate(x.tolist()):
        errors = [abs(value - float(largest[i // 16] * v)) for v in levels]
        assert errors[codes[i]] <= min(errors) * (1 + 1e-5)
    middle = (levels[3] + levels[4]) / 2
    assert nearest(torch.stack([middle, torch.nextafter(middle, torch.tensor(1.0))]), levels).tolist() == [3, 4]


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_two_codes_to_a_byte_and_back(n):
    codes = torch.randint(0, 16, (3, n), generator=torch.Generator().manual_seed(n))
    packed, levels = nibbles(codes), torch.randn(16)
    assert packed.shape == (3, math.ceil(n / 2)) and packed.dtype == torch.int8
    assert torch.equal(packed[:, 0].view(torch.uint8).long() >> 4, codes[:, 0])
    assert torch.equal(levels_of_nibbles(packed, levels)[:, :n], levels[codes])


@pytest.mark.parametrize("shape", [(8,), (3, 5), (16, 16), (1,)])
def test_bits_are_packed_as_numpy_packs_them(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    assert torch.equal(pack_bits(mask), torch.from_numpy(np.packbits(mask.numpy(), bitorder="little")))
    assert torch.equal(unpack_bits(pack_bits(mask), mask.numel()).view(shape), mask)


@pytest.mark.parametrize("levels", [numerics.normal_float, numerics.dynamic_float])
def test_levels_have_values_where_a_model_without_any_asks_first(levels):
    """`from_pretrained` makes modules on the meta device; levels that were first asked for there are kept for the whole process."""
    levels.cache_clear()
    with torch.device("meta"):
        levels()
    assert levels().device.type == "cpu"
