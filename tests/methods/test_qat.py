"""qat: the paper's gradients, and codes that are the very weights of training."""

from __future__ import annotations

import math

import pytest
import steps
import torch
import work

from paretune import inference, phases, processors, seams, surgery
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.lora import LoRA
from paretune.methods.modifiers.qat import QAT, _Learned
from paretune.methods.transforms.cast import Cast
from paretune.methods.transforms.int4 import Int4
from paretune.methods.transforms.int8 import Int8
from paretune.methods.transforms.int8_weights import Int8Weights
from paretune.methods.transforms.keep_layers import KeepLayers
from paretune.methods.transforms.magnitude import Magnitude
from paretune.methods.transforms.merge import Merge
from paretune.methods.transforms.vocabulary import Vocabulary
from paretune.recipe import parse
from paretune.weights.packed import PackedLinear


def trained(method, adapter, family="bert", settle=True, **how):
    model = work.ready(family)
    torch.manual_seed(0)
    surgery.attach(model, [adapter], name="phase_1")
    fit = work.fitted(model, work.task(family), method, **{"epochs": 0.5, **how})
    if settle:
        surgery.freeze(model)
        surgery.settle(model)
    return model, fit


def rounded(model):
    """The weight that each map with ranges computes with."""
    found = {}
    for path, module, seam in surgery.seams_of(model):
        if seam.ranges() is not None:
            inside = [p for a, _, p in seam.patches() if a != seams.RANGES and not isinstance(p, seams.Selected)]
            weight = seams.effective(module, inside, ranges=seam.ranges())["weight"]
            found[path] = (weight.T if seams.anatomy.is_transposed(module) else weight).detach()
    return found


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_gradients_are_those_of_lsq(bits):
    """Against equations 1 to 3, written out with detached roundings."""
    torch.manual_seed(0)
    groups, log_steps = torch.randn(3, 2, 8, requires_grad=True), torch.full((3, 2), -1.0, requires_grad=True)
    top, s, wanted = 2 ** (bits - 1) - 1, log_steps.exp()[..., None], torch.randn(3, 2, 8)
    v = (groups / s).clamp(-top, top)
    by_hand = torch.autograd.grad((((v + (v.round() - v).detach()) * s) * wanted).sum(), [groups, log_steps])
    mine = torch.autograd.grad((_Learned.apply(groups, log_steps, bits, torch.float32) * wanted).sum(), [groups, log_steps])
    assert torch.allclose(mine[0], by_hand[0], atol=1e-6)
    assert torch.allclose(mine[1], by_hand[1] / math.sqrt(8 * top), atol=1e-5)


PACKED = [(QAT(), Int8()), (QAT(), Int8Weights()), (QAT(group=8), Int8Weights(group=8)), (QAT(bits=4), Int4(symmetric=True))]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("method, format", PACKED, ids=str)
@pytest.mark.parametrize("adapter", [Full(), LoRA(r=2)], ids=str)
def test_codes_are_the_weights_of_training(adapter, method, format, family):
    model, _ = trained(method, adapter, family, settle=False)
    seen = rounded(model)
    surgery.freeze(model)
    surgery.settle(model)
    phases.shrink(model, Merge())
    assert rounded(model).keys() == seen.keys() and all(torch.equal(w, seen[p]) for p, w in rounded(model).items())
    phases.shrink(model, format)
    packed = {path: m.dequantized() for path, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert packed.keys() == seen.keys()
    assert all(torch.equal(packed[path], seen[path]) for path in seen)


def test_steps_and_weights_learn():
    model, _ = trained(QAT(bits=4), Full(), settle=False)
    plain = steps.model("bert")
    for path, _, seam in surgery.seams_of(model):
        if seam.ranges() is not None:
            fresh = seam.ranges().method.patch(seam.ranges().site)
            fresh.start(plain.get_submodule(path).weight.detach())
            assert not torch.equal(fresh.log_steps, seam.ranges().log_steps)


def test_an_adapter_is_inside_the_weight():
    """y = x Q(W + s B A)ᵀ + b."""
    model, _ = trained(QAT(bits=4), LoRA(r=2, targets="query"))
    path, module, seam = next((p, m, s) for p, m, s in surgery.seams_of(model) if s.ranges() is not None and "phase_1" in s._modules)
    x = torch.randn(2, 5, 16)
    assert torch.equal(module(x), torch.nn.functional.linear(x, rounded(model)[path], module.bias))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_saved_and_loaded_is_the_same(bits, tmp_path):
    model, _ = trained(QAT(bits=bits), LoRA(r=2))
    phases.save_model(model, tmp_path)
    again = inference.open_model(tmp_path, work.text_task())
    assert torch.equal(steps.logits(model, "bert"), steps.logits(again, "bert"))
    assert all(torch.equal(w, rounded(again)[p]) for p, w in rounded(model).items())


def test_unmerged_is_as_before():
    model, _ = trained(QAT(), LoRA(r=2))
    before = steps.logits(model, "bert")
    surgery.merge(model)
    assert torch.allclose(steps.logits(model, "bert"), before, atol=1e-6)
    surgery.unmerge(model)
    assert torch.equal(steps.logits(model, "bert"), before)


REFUSED = ["full + qat | int4", "full + qat | nf4", "full + qat | int8_weights(group=8)", "full + qat(bits=4) | int8", "full + qat(bits=2) | int8",
           "full + qat(bits=4, group=64) | int4", "full + qat(bits=4, group=32) | int4(group=64, symmetric=True)",
           "full + qat | magnitude", "full + qat | cast", "full + qat | lora", "lora + qat | int8", "nf4 | lora + qat", "cast | lora + qat", "share_layers | full + qat",
           "share_layers | full | magnitude | full + qat | int8"]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_other_codes_and_changes_are_refused(text):
    with pytest.raises(Incompatible):
        parse(text).check()


ALLOWED = ["full + qat | int8", "lora + qat | merge | int8_weights", "full + qat(bits=4, group=32) | int4(group=32, symmetric=True)", "qat + full",
           "full + qat | vocabulary | int8", "share_layers | full + qat(bits=32)"]


@pytest.mark.parametrize("text", ALLOWED)
def test_its_own_codes_may_follow(text):
    assert parse(text).check()


def test_a_model_refuses_what_a_recipe_would():
    model, _ = trained(QAT(), LoRA(r=2))
    with pytest.raises(Incompatible, match="merge it first"):
        phases.shrink(model, Int8())
    with pytest.raises(Incompatible, match="use int8 or int8_weights"):
        phases.shrink(model, Int4())
    with pytest.raises(Incompatible, match="further adapter"):
        surgery.attach(model, [LoRA()], name="second", on_top=True)
    with pytest.raises(RecipeError, match="groups of 32"):
        QAT(bits=4, group=0)


@pytest.mark.parametrize("method", [Cast(), KeepLayers(), Magnitude()], ids=str)
def test_a_change_between_training_and_codes_is_refused_by_hand_too(method):
    model, _ = trained(QAT(), Full())
    before = steps.tensors(model)
    with pytest.raises(Incompatible, match=f"which {method!r} would change; pack them first"):
        phases.shrink(model, method, work.text_task())
    assert steps.same(before, steps.tensors(model))


@pytest.mark.parametrize("family, method, format", [("bert", QAT(), Int8()), ("llama", QAT(), Int8()), ("llama", QAT(bits=4), Int4(symmetric=True))], ids=str)
def test_a_trimmed_vocabulary_leaves_codes_those_of_training(family, method, format):
    """An output of its own over the vocabulary loses rows, and their steps go with them."""
    task = work.generation_task() if family == "llama" else work.text_task()
    model = work.ready(family, "causal" if family == "llama" else "classification")
    torch.manual_seed(0)
    surgery.attach(model, [Full()], name="phase_1")
    work.fitted(model, task, method, epochs=0.5)
    surgery.freeze(model)
    surgery.settle(model)
    seen, old = rounded(model), processors.get(model).get_vocab()
    phases.shrink(model, Vocabulary(), task)
    new = processors.get(model).get_vocab()
    kept = [old[piece] for piece in sorted(new, key=new.get)]
    assert len(new) < len(old)
    phases.shrink(model, format)
    packed = {path: m.dequantized() for path, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert packed.keys() == seen.keys() and ("lm_head" in seen) == (family == "llama")
    assert all(torch.equal(packed[path], w[kept] if path == "lm_head" else w) for path, w in seen.items())


class Killed(Exception):
    """The process ends here."""


def test_a_killed_training_resumes_bit_for_bit(tmp_path):
    def kill(progress):
        if progress["step"] == 9:
            raise Killed

    aim, whole = trained(QAT(bits=4), LoRA(r=2), epochs=2.0)
    with pytest.raises(Killed):
        trained(QAT(bits=4), LoRA(r=2), epochs=2.0, folder=tmp_path, report=kill)
    found, again = trained(QAT(bits=4), LoRA(r=2), epochs=2.0, folder=tmp_path)
    assert again == whole and steps.same(steps.tensors(found), steps.tensors(aim))
