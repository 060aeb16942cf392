from __future__ import annotations

import copy

import pytest
import steps
import tiny
import torch
import work
from torch import nn
from torch.nn import functional as F

import paretune  # noqa: F401 - lets transformers open our folders
from paretune import inference, peft_format, phases, surgery
from paretune.errors import Incompatible
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms.merge import Merge
from paretune.methods.transforms.nf4 import NF4
from paretune.recipe import parse
from paretune.weights import packed
from paretune.weights.numerics import normal_float
from paretune.weights.packed import PackedLinear


def made(linear, **knobs):
    module = NF4(**knobs).empty(linear)
    module.pack(linear)
    return module


@pytest.mark.parametrize("inner", [64, 48, 33])
def test_every_weight_is_a_constant_times_the_nearest_level(inner):
    linear = nn.Linear(inner, 24)
    module = made(linear, block=32, double_quant=False)
    w = linear.weight.detach().flatten()
    levels = normal_float()
    for start in range(0, len(w), 32):
        block = w[start : start + 32]
        wanted = levels[(block[:, None] / block.abs().max() - levels).abs().argmin(1)] * block.abs().max()
        torch.testing.assert_close(module.dequantized().flatten()[start : start + 32], wanted)
    gap = levels.diff().max() / 2  # the widest two levels apart
    assert ((module.dequantized() - linear.weight).abs() <= gap * linear.weight.abs().max() + 1e-7).all()


def test_double_quantization_costs_little_and_saves_three_eighths_of_a_bit():
    linear = nn.Linear(1024, 512)
    single, double = made(linear, double_quant=False), made(linear)
    bits = [8 * sum(t.numel() * t.element_size() for t in m.codes().values()) / linear.weight.numel() for m in (single, double)]
    assert bits[0] == 4.5 and bits[1] == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-3)
    apart = double.method.constants(double.codes()) / single.absmax - 1
    assert apart.abs().mean() < 0.005
    normal = nn.Linear(1024, 512)
    nn.init.normal_(normal.weight)
    error = (made(normal).dequantized() - normal.weight).norm() / normal.weight.norm()
    assert 0.08 < error < 0.1  # the card: a map's weights are off by 9 %


@pytest.mark.parametrize("chunk", [1, 1000, 2**22])
def test_the_product_and_its_gradient_are_those_of_the_dequantized_weight(chunk, monkeypatch):
    monkeypatch.setattr(packed, "CHUNK", chunk)
    module, x = made(nn.Linear(64, 40)), torch.randn(2, 3, 64, requires_grad=True)
    weight = module.dequantized()
    y, wanted = module(x), F.linear(x, weight, module.bias)
    torch.testing.assert_close(y, wanted)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in (y, wanted)))
    with torch.no_grad():
        torch.testing.assert_close(module(x), wanted)
    assert torch.equal(module.dequantized(slice(8, 20)), weight[8:20])
    assert module(x.bfloat16()).dtype == torch.bfloat16


def test_the_backward_pass_keeps_codes_and_no_weight():
    module, x = made(nn.Linear(512, 512)), torch.randn(4, 512, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        module(x).sum().backward()
    assert sum(kept) < 512 * 512 / 8 and x.grad is not None


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_qlora(family, tmp_path):
    """`nf4 | lora(targets="linear")`: only A and B and the head learn, the loss falls, and the folder opens again."""
    model = phases.shrink(work.ready(family), NF4())
    phases.save_model(model, tmp_path / "base")
    model = inference.open_model(tmp_path / "base", work.task(family))  # as a run's next phase opens it
    before = {n: t.clone() for n, t in model.state_dict().items()}
    surgery.attach(model, [LoRA(targets="linear")])
    start = steps.logits(model, family)
    losses = steps.descend(model, family, steps=12, lr=1e-2)
    assert min(losses) < 0.9 * losses[0]
    learned = steps.learning(model)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items() if n not in learned)
    maps = [s for s in LoRA(targets="linear").sites(model) if isinstance(model.get_submodule(s.path), PackedLinear)]
    assert maps and sum("paretune" in n for n in learned) == 2 * len(maps)
    wanted = steps.logits(model, family)
    assert not torch.equal(wanted, start)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(steps.logits(loaded, family), wanted)
    assert torch.equal(steps.logits(copy.deepcopy(model), family), wanted)
    surgery.switch(loaded)
    assert torch.equal(steps.logits(loaded, family), steps.logits(phases.shrink(work.ready(family), NF4()), family))  # each adapter has its own head


def test_the_gradients_of_the_adapters_are_those_on_a_float_base_of_the_same_values():
    model = work.ready("bert")
    phases.shrink(model, NF4())
    plain = copy.deepcopy(model)
    packed.unpack(plain)
    found = []
    for one in (model, plain):
        torch.manual_seed(0)
        surgery.attach(one, [LoRA(targets="linear")])
        steps.disturb(one)
        steps.loss(one, "bert").backward()
        found.append({n: p.grad for n, p in steps.learning(one).items()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


def test_checkpointing_and_autocast():
    model = work.ready("bert")
    phases.shrink(model, NF4())
    surgery.attach(model, [LoRA(targets="linear")])
    steps.disturb(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        steps.loss(model, "bert").backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in steps.learning(model).values())


def test_merge_leaves_dequantized_weights_in_bf16():
    model = work.ready("bert")
    phases.shrink(model, NF4())
    surgery.attach(model, [LoRA(r=2, targets="linear")], head=False)
    steps.disturb(model)
    query = model.bert.encoder.layer[0].attention.self.query
    wanted = query.dequantized() + query.paretune.default.lora.delta(query.dequantized(), None)[0]
    exact = steps.logits(model, "bert")
    phases.shrink(model, Merge())
    query = model.bert.encoder.layer[0].attention.self.query
    assert type(query) is nn.Linear and torch.equal(query.weight, wanted.bfloat16())
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    torch.testing.assert_close(steps.logits(model, "bert").float(), exact, rtol=0.05, atol=0.02)
    with pytest.raises(Incompatible):
        surgery.unmerge(model)


def test_a_merge_that_is_refused_changes_nothing():
    model = work.ready("bert")
    phases.shrink(model, NF4())
    surgery.attach(model, [LoRA(r=2)], name="a", head=False)
    before = steps.tensors(model)
    with pytest.raises(Incompatible, match="holds codes"):  # the verb that can be undone
        surgery.merge(model)
    surgery.attach(model, [LoRA(r=2)], name="b", head=False)
    surgery.remove(model, "b")
    with pytest.raises(Incompatible, match="not active"):
        surgery.attach(model, [LoRA(r=2)], name="c", head=False)
        phases.shrink(model, Merge())
    surgery.remove(model, "c")
    assert steps.same(before, steps.tensors(model))


COMPOSE = ["nf4 | lora", "nf4 | ia3", "nf4 | lora | merge | nf4", "nf4 | vocabulary", "cast | nf4 | lora", "lora | nf4 | lora"]


@pytest.mark.parametrize("text", COMPOSE)
def test_recipes_that_compose(text):
    assert str(parse(text).check()) == text


@pytest.mark.parametrize("text", ["nf4 | full", "nf4 | bitfit", "nf4 | dora", "nf4 | cast", "nf4 | nf4", "nf4 | int8", "nf4 | lora | merge | lora"])
def test_recipes_that_are_refused(text):
    with pytest.raises(Incompatible):
        parse(text).check()


def test_embeddings_and_head_stay_float():
    model = phases.shrink(tiny.model("bert"), NF4())
    assert isinstance(model.bert.embeddings.word_embeddings, nn.Embedding) and isinstance(model.classifier, nn.Linear)


def test_an_adapter_that_was_trained_on_it_is_saved_for_peft(tmp_path):
    """PEFT's files hold the adapter alone, so it goes on a float base of the same values, too."""
    model = work.ready("bert")
    phases.shrink(model, NF4())
    plain = copy.deepcopy(model)
    packed.unpack(plain)
    surgery.attach(model, [LoRA(r=2, targets="linear")], head=False)
    steps.disturb(model)
    peft_format.save(model, tmp_path, base="tiny")
    peft_format.read_peft(plain, tmp_path, same_backbone=False)
    torch.testing.assert_close(steps.logits(plain, "bert"), steps.logits(model, "bert"), rtol=1e-4, atol=1e-6)
