"""What all packed formats share: tensors that others stop at, moves and copies, gradients, and the way back to floats."""

from __future__ import annotations

import copy
import pickle

import pytest
import steps
import tiny
import torch
import transformers
import work
from torch import nn

from paretune import anatomy, hub, phases, registry, surgery
from paretune.errors import Incompatible
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms.nf4 import NF4
from paretune.recipe import parse
from paretune.weights import packed
from paretune.weights.packed import Packed, PackedEmbedding, PackedLinear, Packing

FORMATS = [cls() for name in registry.names("transform") if issubclass(cls := registry.get(name), Packing)]
every_format = pytest.mark.parametrize("method", FORMATS, ids=str)


def made(method, linear):
    module = method.empty(linear)
    module.pack(linear)
    return module


@every_format
def test_codes_are_flat_int8_tensors_and_scales_are_beside_them(method):
    module = made(method, nn.Linear(64, 48))
    codes = module.codes()
    assert codes["weight"].dtype == torch.int8 and codes["weight"].dim() == 1  # T5 brings its hidden states to any other format of a weight
    assert codes.keys() <= module.state_dict().keys() and not list(module.parameters())
    assert sum(t.numel() * t.element_size() for t in codes.values()) < 64 * 48 * 4 / 3
    empty = method.empty(nn.Linear(64, 48))
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {n: (t.shape, t.dtype) for n, t in module.state_dict().items()}


@every_format
def test_a_part_of_the_rows_is_a_part_of_the_weight(method):
    for width in (64, 50):
        module = made(method, nn.Linear(width, 48))
        whole = module.dequantized()
        assert whole.shape == (48, width) and whole.dtype == torch.float32 and torch.equal(anatomy.weight(module), whole)
        assert torch.equal(module.dequantized(slice(7, 20)), whole[7:20])
        assert torch.equal(module.dequantized(torch.tensor([5, 5, 0])), whole[[5, 5, 0]])


@every_format
def test_a_change_of_number_format_changes_answers_and_no_code(method):
    module, x = made(method, nn.Linear(64, 48)), torch.randn(70, 64)
    before, wanted = module.codes(), module(x)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in half.codes().items())
    assert half(x.bfloat16()).dtype == torch.bfloat16 and half.bias.dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), wanted, rtol=0.05, atol=0.05)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), wanted)


@every_format
def test_the_gradient_is_that_of_the_dequantized_weight(method):
    module, x = made(method, nn.Linear(64, 48)), torch.randn(3, 64, requires_grad=True)
    dy = torch.randn(3, 48)
    (dx,) = torch.autograd.grad(module(x), x, dy)
    torch.testing.assert_close(dx, dy @ module.dequantized())
    with torch.no_grad():
        assert torch.equal(module(x), module(x.detach().requires_grad_()).detach())  # training sees what inference computes


@every_format
def test_rows_of_zeros_and_single_values_come_back(method):
    linear = nn.Linear(64, 48)
    with torch.no_grad():
        linear.weight[:40] = 0
        linear.weight[40:] = -0.5
    found = made(method, linear).dequantized()
    assert not found[:40].any() or method.spelling() == "nf4"  # a doubly quantized constant is zero within its own error
    torch.testing.assert_close(found, linear.weight.detach(), rtol=0.01, atol=0.002)


@every_format
def test_unpacked_it_is_a_plain_model_of_the_same_values(method):
    model = phases.shrink(work.ready("bert"), method, work.task("bert"))
    maps = {path: m.dequantized() for path, m in model.named_modules() if isinstance(m, Packed)}
    assert packed.unpack(model) and not packed.unpack(model)
    assert "quantization_config" not in model.config.to_dict() and not any(isinstance(m, Packed) for m in model.modules())
    assert [type(m) for m in model.modules()] == [type(m) for m in tiny.model("bert").modules()]
    assert all(torch.equal(model.get_submodule(path).weight, weight) for path, weight in maps.items())


@every_format
def test_adapters_come_after_it_only_where_gradients_may(method):
    if method.carries:
        assert parse(f"{method} | lora | merge").check()
        with pytest.raises(Incompatible, match="float weights to train on"):
            parse(f"{method} | full").check()
    else:
        with pytest.raises(Incompatible, match="float weights to train on"):
            parse(f"{method} | lora").check()
    with pytest.raises(Incompatible):
        parse(f"{method} | {method}").check()


def test_an_embedding_answers_in_the_model_s_number_format():
    for method in (m for m in FORMATS if m.embeddings):
        model = steps.model("bert").to(torch.bfloat16)
        method.apply(model)
        table = model.bert.embeddings.word_embeddings
        assert isinstance(table, PackedEmbedding) and table(torch.tensor([[4, 9]])).dtype == torch.bfloat16
        assert steps.logits(model, "bert").dtype == torch.bfloat16


def test_one_adapter_per_row_works_on_a_packed_base():
    model = work.ready("bert")
    phases.shrink(model, registry.get("nf4")())
    alone = []
    for name, seed in (("a", 1), ("b", 2)):
        surgery.attach(model, [LoRA(r=2, targets="linear")], name=name, head=False)
        steps.disturb(model, seed=seed)
        alone.append(steps.logits(model, "bert"))
    with surgery.rows(model, ["b", "a", "b"]):
        together = steps.logits(model, "bert")
    torch.testing.assert_close(together, torch.stack([alone[1][0], alone[0][1], alone[1][2]]), rtol=1e-5, atol=1e-6)
    assert any(isinstance(m, PackedLinear) for m in model.modules())


def test_more_layers_are_not_looked_over_more_often(monkeypatch, tmp_path):
    """A model is packed and opened in as many looks over all of it, and as many forms of its tensors, however many maps it has."""
    looks, forms, record, encode = [], [], hub.record, NF4.encode
    monkeypatch.setattr(hub, "record", lambda model: looks.append(1) or record(model))
    monkeypatch.setattr(NF4, "encode", lambda self, weight, *more: forms.append(weight.is_meta) or encode(self, weight, *more))
    found = []
    for layers in (2, 8):
        packed._form.cache_clear()
        model = phases.shrink(tiny.model("llama", "causal", config={"num_hidden_layers": layers}), "nf4")
        model.save_pretrained(tmp_path / str(layers))
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(layers))
        found.append((len(looks), sum(forms), forms.count(False)))
        looks.clear(), forms.clear()
    (few, shapes, maps), (more, again, all_maps) = found
    assert few == more and shapes == again < maps and all_maps - maps == 6 * 7
