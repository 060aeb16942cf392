from __future__ import annotations

import copy
import math

import pytest
import steps
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paretune import seams, surgery
from paretune.anatomy import Site
from paretune.errors import TargetError
from paretune.methods.adapters.lora import WORTH, LoRA, LowRank, operations
from paretune.recipe import parse


def adapted(method, family="bert"):
    model = steps.model(family)
    torch.manual_seed(3)
    surgery.attach(model, [method], head=False)
    return model


@pytest.mark.parametrize(
    "knobs, scale",
    [({}, 2.0), ({"r": 4}, 2.0), ({"r": 4, "alpha": 6.0}, 1.5), ({"r": 4, "alpha": 6.0, "rank_stabilized": True}, 3.0), ({"alpha": 0.0}, 0.0)],
)
def test_the_map_is_w_x_plus_scaled_b_a_x(knobs, scale):
    model = adapted(LoRA(targets="query", **knobs))
    steps.disturb(model)
    query = model.bert.encoder.layer[0].attention.self.query
    patch, x = query.paretune.default.lora, torch.randn(2, 5, 16)
    wanted = F.linear(x, query.weight, query.bias) + scale * x @ patch.A.T @ patch.B.T
    torch.testing.assert_close(query(x), wanted)


def test_b_starts_at_zero_and_a_as_the_paper_s_code_has_it():
    patch = adapted(LoRA(r=4, targets="query")).bert.encoder.layer[0].attention.self.query.paretune.default.lora
    bound = math.sqrt(6 / ((1 + 5) * 16))  # Kaiming uniform with a = √5
    assert not patch.B.any() and 0.7 * bound < float(patch.A.detach().abs().max()) <= bound


def test_dropout_acts_on_the_input_of_a_in_training_alone():
    model = adapted(LoRA(targets="query", dropout=0.5))
    steps.disturb(model)
    query = model.bert.encoder.layer[0].attention.self.query
    patch, x = query.paretune.default.lora, torch.randn(64, 16)
    model.eval()
    plain = query(x)
    model.train()
    torch.manual_seed(0)
    found = query(x)
    torch.manual_seed(0)
    wanted = F.linear(x, query.weight, query.bias) + 2 * F.dropout(x, 0.5) @ patch.A.T @ patch.B.T
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, plain)


@pytest.mark.parametrize("targets, maps", [("attention", 8), ("query value", 4), (("query", "up"), 4), ("linear", 12), ("layer.1.*.query", 1)])
def test_the_count_is_r_times_inputs_and_outputs(targets, maps):
    model = adapted(LoRA(r=2, targets=targets))
    sizes = [(p.site.in_features + p.site.out_features) * 2 for _, _, s in surgery.seams_of(model) for _, _, p in s.patches()]
    assert len(sizes) == maps and surgery.count(model) == (sum(sizes), 0)


def test_one_part_of_a_fused_map():
    model = adapted(LoRA(r=2, targets="query"), "gpt2")
    steps.disturb(model)
    fused, x = model.transformer.h[0].attn.c_attn, torch.randn(2, 3, 16)
    patch = fused.paretune.default.lora
    wanted = torch.addmm(fused.bias, x.flatten(0, 1), fused.weight).view(2, 3, 48)
    wanted = torch.cat([wanted[..., :16] + 2 * x @ patch.A.T @ patch.B.T, wanted[..., 16:]], -1)
    torch.testing.assert_close(fused(x), wanted)


def test_targets_that_hit_nothing():
    with pytest.raises(TargetError, match="quary"):
        adapted(LoRA(targets="quary"))


def test_the_gradient_at_the_start_is_b_s_alone():
    model = adapted(LoRA(r=2))
    steps.loss(model, "bert").backward()
    assert all(bool(p.grad.any()) == n.endswith(".B") for n, p in steps.learning(model).items())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_rank_for_each_place_is_a_sum(family, tmp_path):
    """In GPT-2 both places are parts of one module."""
    phase = parse('lora(r=1, targets="query") + lora(r=4, targets="value", alpha=2.0)').check().phases[0]
    model = steps.model(family)
    surgery.attach(model, phase, head=False)
    assert surgery.count(model) == (2 * (1 + 4) * (16 + 16), 0)
    ranks = {p.site.place: (len(p.A), p.scale) for _, _, seam in surgery.seams_of(model) for _, _, p in seam.patches()}
    assert ranks == {"query": (1, 2.0), "value": (4, 0.5)}
    steps.disturb(model)
    wanted = steps.logits(model, family)
    model.save_pretrained(tmp_path)
    assert torch.equal(steps.logits(type(model).from_pretrained(tmp_path), family), wanted)
    surgery.merge(model)
    torch.testing.assert_close(steps.logits(model, family), wanted, rtol=1e-4, atol=1e-5)


def one_map(outputs=24, inputs=16, *, r=4, dtype=torch.float64, **knobs):
    """An adapted linear map, alone in a model, and its patch."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(inputs, outputs))
    patch = surgery.install(model, "default", method=(method := LoRA(r=r, **knobs)), site=Site("0", "0", in_features=inputs, out_features=outputs))
    surgery.state(model).adapters["default"] = (method,)
    nn.init.normal_(patch.B)
    surgery.switch(model, "default")
    model[0].weight.requires_grad_(False)
    return model.to(dtype)[0], patch


def whole_taken(module, patch, x):
    """Was the product taken with W + s · B A?"""
    taken = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LowRank, "forward", lambda self, x, y: taken.append("thin") or y)
        module(x)
    return not taken


@pytest.mark.parametrize("rows, whole", [(3, False), (4000, True)])
@pytest.mark.parametrize("learns", [False, True])
def test_both_orders_of_the_product_are_equal(rows, whole, learns):
    module, patch = one_map(r=16)
    x = torch.randn(2, rows, 16, dtype=torch.float64, requires_grad=learns)
    with torch.set_grad_enabled(learns):
        assert whole_taken(module, patch, x) is whole
        found, wanted = module(x), F.linear(x, module.weight, module.bias) + patch.scale * x @ patch.A.T @ patch.B.T
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    if learns:
        out = torch.randn_like(found)
        given = x, patch.A, patch.B, module.bias
        for mine, true in zip(*(torch.autograd.grad((y * out).sum(), given) for y in (found, wanted)), strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


def product(y, a, b, *, out_shape, alpha):
    """FLOPs of an addmm in place, which torch does not count, from shapes."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("outputs, inputs, r", [(24, 16, 4), (16, 64, 2), (48, 48, 40)])
@pytest.mark.parametrize("learns", [False, True])
def test_the_order_is_the_one_that_torch_counts_fewer_operations_for(outputs, inputs, r, learns):
    module, patch = one_map(outputs, inputs, r=r)
    for rows in (2, 32, 512, 16384):
        x = torch.randn(rows, inputs, dtype=torch.float64, requires_grad=learns)
        thin, whole = operations(rows, (outputs, inputs), r=r, learns=learns)
        order = whole if whole + WORTH <= thin else thin
        with torch.set_grad_enabled(learns):
            assert whole_taken(module, patch, x) is (order == whole)
            with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counted:
                y = module(x)
                if learns:
                    y.sum().backward()
        beside = 2 * rows * inputs * outputs * (1 + learns)  # x Wᵀ, and its gradient for x
        sums = (order == whole) * outputs * inputs  # W + ΔW, which torch does not count
        assert counted.get_total_flops() == beside + order - sums


def test_the_product_stays_thin_where_w_plus_b_a_is_not_the_whole_map_or_would_be_rounded():
    many = torch.randn(4000, 16)
    module, patch = one_map(dtype=torch.float32)
    with torch.no_grad():
        assert whole_taken(module, patch, many)
        with torch.autocast("cpu", torch.bfloat16):
            assert not whole_taken(module, patch, many)
        seams.seam_of(module).rows = ("default",) * 4000
        assert not whole_taken(module, patch, many)
        for knobs in ({"dropout": 0.1}, {"gate": True}):
            module, patch = one_map(dtype=torch.float32, **knobs)
            assert not (whole_taken(module.train(), patch, many) if "dropout" in knobs else patch.whole(many, module))
        module, patch = one_map(dtype=torch.bfloat16)
        assert not whole_taken(module, patch, many.bfloat16())
        module, patch = one_map(dtype=torch.float32)
        seams.seam_of(module).add("default", "lora", patch=copy.deepcopy(patch))
        assert not whole_taken(module, patch, many), "two of them are one more sum each"
