from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from paretune import phases
from paretune.errors import Incompatible
from paretune.methods.transforms.int8_weights import Int8Weights
from paretune.recipe import parse
from paretune.weights.packed import PackedEmbedding, PackedLinear


def made(linear, **knobs):
    module = Int8Weights(**knobs).empty(linear)
    module.pack(linear)
    return module


@pytest.mark.parametrize("group, width", [(0, 48), (16, 48), (16, 40), (64, 48)])
def test_each_group_of_inputs_has_its_scale(group, width):
    linear = nn.Linear(width, 24)
    module, w = made(linear, group=group), linear.weight.detach()
    for start in range(0, width, group or width):
        part = w[:, start : start + (group or width)]
        s = part.abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(module.dequantized()[:, start : start + (group or width)], (part / s).round() * s)
    assert module.scales.numel() == 24 * -(-width // (group or width))


def test_a_finer_scale_is_a_smaller_error():
    linear = nn.Linear(256, 64)
    nn.init.normal_(linear.weight)
    w = linear.weight.detach()
    errors = [float((made(linear, group=g).dequantized() - w).norm() / w.norm()) for g in (0, 128, 32)]
    assert errors == sorted(errors, reverse=True) and errors[0] < Int8Weights.error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 49])
def test_the_kernel_on_codes_is_the_product(tokens, dtype):
    module, x = made(nn.Linear(64, 96)), torch.randn(2, tokens, 64).to(dtype)
    y = module.method.ways(module, dtype)["codes"](x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.linear(x, module.dequantized().to(dtype), module.bias.to(dtype)), rtol=0.02, atol=0.02)  # the kernel reads x in bf16


@pytest.mark.parametrize("start", [1, 8, 16, 32])
def test_codes_may_lie_at_any_address(start):
    """A file's bytes do; the kernel's vector loads end the process there, if the processor has them."""
    module, x = made(nn.Linear(64, 96)), torch.randn(32, 64)
    codes = module.weight
    module.weight = torch.empty(codes.numel() + start, dtype=torch.int8)[start:].copy_(codes)
    y = module.method.ways(module, x.dtype)["codes"](x)
    torch.testing.assert_close(y, F.linear(x, module.dequantized(), module.bias), rtol=0.02, atol=0.02)


def test_groups_and_odd_shapes_are_dequantized():
    assert "codes" not in Int8Weights().ways(made(nn.Linear(60, 96)), torch.float32)
    assert "codes" not in Int8Weights().ways(made(nn.Linear(64, 50)), torch.float32)
    assert "codes" not in Int8Weights(group=32).ways(made(nn.Linear(64, 96), group=32), torch.float32)
    assert "codes" in Int8Weights(group=64).ways(made(nn.Linear(64, 96), group=64), torch.float32)


def test_the_embedding_may_be_packed_or_not():
    model, plain = tiny.model("bert"), tiny.model("bert").bert.embeddings.word_embeddings.weight
    table = phases.shrink(model, Int8Weights()).bert.embeddings.word_embeddings
    ids = torch.arange(tiny.SIZE)[None]
    assert isinstance(table, PackedEmbedding)
    assert ((table(ids)[0] - plain).abs() <= table.scales[:, None] / 2 * 1.00001).all()
    model = phases.shrink(tiny.model("bert"), Int8Weights(embeddings=False))
    assert isinstance(model.bert.embeddings.word_embeddings, nn.Embedding)
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 12


def test_an_adapter_learns_on_it_and_the_vocabulary_stays():
    assert parse("int8_weights | lora").check() and parse("int8_weights(embeddings=False) | vocabulary").check()
    with pytest.raises(Incompatible, match="packed the embeddings"):
        parse("int8_weights | vocabulary").check()
