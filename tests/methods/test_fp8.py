from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paretune.methods.transforms.fp8 import FORMATS, FP8
from paretune.weights.numerics import absmax, scaled

LARGEST = {"e4m3": 448, "e5m2": 57344}
MANTISSA = {"e4m3": 3, "e5m2": 2}
SMALLEST = {"e4m3": 2.0**-6, "e5m2": 2.0**-14}  # normal numbers


def made(linear, **knobs):
    module = FP8(**knobs).empty(linear)
    module.pack(linear)
    return module


def every_value(name):
    """All finite numbers of the format by its definition: (−1)^s 2^(e − bias) (1 + m / 2^M), and m / 2^M at e = 0."""
    m_bits, bias = MANTISSA[name], {"e4m3": 7, "e5m2": 15}[name]
    found = {0.0}
    for e in range(2 ** (7 - m_bits)):
        for m in range(2**m_bits):
            value = 2.0 ** (max(e, 1) - bias) * ((e > 0) + m / 2**m_bits)
            found |= {value, -value} if value <= LARGEST[name] else set()
    return torch.tensor(sorted(found), dtype=torch.float64)


@pytest.mark.parametrize("name", FORMATS)
def test_each_weight_is_the_nearest_number_of_the_format_times_its_row_s_scale(name):
    linear = nn.Linear(40, 12)
    with torch.no_grad():
        linear.weight[0] *= 100
        linear.weight[1] = 0
        linear.weight[2, 5:] *= 1e-4
    module, w = made(linear, format=name), linear.weight.detach()
    s = w.abs().amax(1).double() / LARGEST[name]
    values = every_value(name)
    assert len(values) == {"e4m3": 253, "e5m2": 247}[name] and values.max() == LARGEST[name]
    best = (w.double()[..., None] - s[:, None, None] * values).abs().amin(-1)
    found = (module.dequantized().double() - w).abs()
    assert (found <= best + 1e-6 * w.abs().amax(1, keepdim=True)).all()
    normal = w.abs() >= s[:, None] * SMALLEST[name]
    assert (found <= w.abs() * 2.0 ** -(MANTISSA[name] + 1) * 1.0001)[normal].all()  # what the card says
    assert not module.dequantized()[1].any()


@pytest.mark.parametrize("name, error", [("e4m3", 0.027), ("e5m2", 0.053)])
def test_the_error_of_normal_weights(name, error):
    linear = nn.Linear(512, 128)
    nn.init.normal_(linear.weight)
    module = made(linear, format=name)
    assert (module.dequantized() - linear.weight.detach()).norm() / linear.weight.detach().norm() == pytest.approx(error, abs=0.002)
    assert sum(t.numel() * t.element_size() for t in module.codes().values()) == 512 * 128 + 4 * 128
    x = torch.randn(3, 512)
    assert torch.equal(module(x), F.linear(x, module.dequantized(), module.bias))


def test_small_weights_beside_large_ones_stay_where_int8_loses_them():
    linear = nn.Linear(64, 8)
    with torch.no_grad():
        linear.weight[:, 0] = 100.0
    w = linear.weight.detach()[:, 1:]
    eight = scaled(*absmax(linear.weight.detach()))[:, 1:]
    assert not eight.any() and (made(linear).dequantized()[:, 1:] - w).norm() < 0.2 * w.norm()
