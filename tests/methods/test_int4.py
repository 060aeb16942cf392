from __future__ import annotations

import runpy

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from paretune import phases
from paretune.methods.transforms import int4
from paretune.methods.transforms.int4 import Int4
from paretune.weights.packed import PackedEmbedding


def made(linear, **knobs):
    module = Int4(**knobs).empty(linear)
    module.pack(linear)
    return module


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("width", [64, 50, 33])
def test_codes_by_the_equation(width, symmetric):
    linear = nn.Linear(width, 24)
    module, w = made(linear, group=32, symmetric=symmetric), linear.weight.detach()
    for k, start in enumerate(range(0, width, 32)):
        part = w[:, start : start + 32]
        s = module.scales.view(24, -1)[:, k : k + 1].float()
        exact = part.abs().amax(1, keepdim=True) / 7 if symmetric else (part.amax(1, keepdim=True).clamp(min=0) - part.amin(1, keepdim=True).clamp(max=0)) / 15
        torch.testing.assert_close(s, exact, rtol=2**-8, atol=0)  # stored in bf16
        z = torch.zeros_like(s) if symmetric else -8 - (part.amin(1, keepdim=True).clamp(max=0) / s).round()
        q = ((part / s).round() + z).clamp(-8 + symmetric, 7)
        found = module.dequantized()[:, start : start + 32]
        torch.testing.assert_close(found, s * (q - z))
        assert ((found - part).abs() <= s * (0.5 + 16 / 256)).all()  # half a step, and what rounding s to bf16 cuts off at the ends


def test_bits_a_weight_and_the_error_of_the_card():
    linear = nn.Linear(1024, 256)
    nn.init.normal_(linear.weight)
    for group, bits, error in ((32, 4.75, 0.08), (64, 4.375, 0.092), (128, 4.1875, 0.104)):
        module = made(linear, group=group)
        assert 8 * sum(t.numel() * t.element_size() for t in module.codes().values()) / linear.weight.numel() == bits
        assert (module.dequantized() - linear.weight.detach()).norm() / linear.weight.detach().norm() == pytest.approx(error, abs=0.005)
    assert 8 * sum(t.numel() * t.element_size() for t in made(linear, symmetric=True).codes().values()) / linear.weight.numel() == 4.25


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tokens", [1, 65])
def test_the_kernel_on_codes_is_the_product(tokens, symmetric):
    module, x = made(nn.Linear(128, 96), symmetric=symmetric), torch.randn(2, tokens, 128)[:1]
    y, wanted = module.method.ways(module, x.dtype)["codes"](x), F.linear(x, module.dequantized(), module.bias)
    torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)  # the kernel reads x in bf16
    assert (y - wanted).norm() <= 0.005 * wanted.norm()
    assert torch.equal(module(x), wanted)  # a small map is not worth a probe
    assert torch.equal(module.dequantized(slice(3, 9)), module.dequantized()[3:9])


def test_shapes_that_the_kernel_cannot_take_are_dequantized():
    module, x = made(nn.Linear(50, 20)), torch.randn(1, 50)
    assert "codes" not in Int4().ways(module, x.dtype)
    assert torch.equal(module(x), F.linear(x, module.dequantized(), module.bias))


def test_new_values_reach_the_kernel():
    first, second, x = made(nn.Linear(64, 32)), made(nn.Linear(64, 32)), torch.randn(1, 64)
    one, other = (m.method.ways(m, x.dtype)["codes"] for m in (first, second))
    assert not torch.equal(one(x), other(x))
    first.load_state_dict(second.state_dict())
    assert torch.equal(one(x), other(x))


def test_the_embedding_is_packed_by_row():
    model, plain = tiny.model("bert"), tiny.model("bert").bert.embeddings.word_embeddings.weight
    table = phases.shrink(model, Int4()).bert.embeddings.word_embeddings
    ids = torch.tensor([[tiny.PAD, 9, 4], [9, 9, 60]])
    assert isinstance(table, PackedEmbedding) and torch.equal(table(ids), table.dequantized()[ids])
    assert ((table(ids) - plain[ids]).abs() <= table.scales.float()[ids][..., None] * 0.57).all()
    assert not table(torch.tensor([tiny.PAD])).any()  # padding's row of zeros stays zero


def test_levels_have_values_where_the_file_is_first_read_while_a_model_is_made_without_any():
    with torch.device("meta"):  # as `from_pretrained` of a saved model reads it, in a process that has not packed before
        levels = runpy.run_path(int4.__file__)["LEVELS"]
    assert levels.tolist() == list(range(-8, 8))
