from __future__ import annotations

import pytest
import torch
import work
from torch import nn

from paretune import phases
from paretune.meters import flops
from paretune.methods.transforms.llm_int8 import LLMInt8
from paretune.weights.packed import PackedLinear


def made(linear, **knobs):
    module = LLMInt8(**knobs).empty(linear)
    module.pack(linear)
    return module


def by_the_equation(module, x):
    """In whole numbers; outlier features apart, in 64-bit floats."""
    outliers = (x.abs() >= module.method.threshold).any(0) if module.method.threshold else torch.zeros(x.shape[1], dtype=torch.bool)
    q = module.weight.view(module.shape).long()
    regular = x.double().clone()
    regular[:, outliers] = 0
    a = regular.abs().amax(1, keepdim=True)
    u = (127 * regular / a.clamp(min=1e-30)).round().long()
    y = a / 127 * (u @ q.T) * module.scales.double()
    return y + x[:, outliers].double() @ (q[:, outliers] * module.scales.double()[:, None]).T + module.bias.double(), outliers


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_the_forward_is_the_equation(tokens, threshold):
    module, x = made(nn.Linear(48, 20), threshold=threshold), torch.randn(tokens, 48)
    x[0, 7], x[-1, 30] = 9.0, -20.0
    wanted, outliers = by_the_equation(module, x)
    assert outliers.sum() == (2 if threshold else 0)
    torch.testing.assert_close(module(x).double(), wanted, rtol=0.01, atol=0.05)  # outliers go through bf16
    plain = torch.randn(tokens, 48).clamp(-5, 5)
    torch.testing.assert_close(module(plain).double(), by_the_equation(module, plain)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(module(x.view(1, tokens, 48))[0], module(x))


def test_outliers_apart_the_rest_keeps_its_precision():
    linear, x = nn.Linear(256, 64), torch.randn(16, 256)
    x[:, 11] *= 60
    exact = linear(x).detach()
    errors = {t: float((made(linear, threshold=t)(x) - exact).norm() / exact.norm()) for t in (0.0, 6.0)}
    assert errors[6.0] < 0.01 < 0.03 < errors[0.0]


def test_both_products_are_counted():
    module, x = made(nn.Linear(64, 96)), torch.randn(5, 64).clamp(-5, 5)
    x[2, 7] = x[3, 11] = 50.0
    assert flops.forward(lambda: module(x), module).value == 2 * 5 * 96 * (64 + 2)


def test_a_row_of_zeros_and_half_precision():
    module = made(nn.Linear(48, 20))
    assert torch.equal(module(torch.zeros(2, 48)), module.bias.expand(2, -1))
    assert module(torch.randn(2, 48).bfloat16()).dtype == torch.bfloat16


def test_the_facts_are_the_shares_of_outlier_features():
    model, task = work.ready("bert"), work.task("bert")
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias[3] = 50.0  # one feature of sixteen is an outlier for whoever reads the embeddings
    method = LLMInt8()
    phases.shrink(model, method, task)
    shares = method.facts(work.processor("bert"), model, task=task)
    maps = [path for path, m in model.named_modules() if isinstance(m, PackedLinear)]
    assert shares.keys() == {f"outlier_share {path}" for path in maps}
    assert all(shares[f"outlier_share bert.encoder.layer.0.attention.self.{n}"] == 1 / 16 for n in ("query", "key", "value"))
    assert all(m.watch is None for m in model.modules() if isinstance(m, PackedLinear))
    off = LLMInt8(threshold=0.0)
    model = phases.shrink(work.ready("bert"), off, task)
    assert not any(off.facts(work.processor("bert"), model, task=task).values())
