"""The promises of every adapter, over the whole registry and all tiny families. A refusal is a promise, too: see `matrix.py`."""

from __future__ import annotations

import copy
import itertools

import pytest
import steps
import tiny
import torch
import transformers
import work
from torch.nn import functional as F

import paretune  # noqa: F401 - lets transformers open our folders
from paretune import anatomy, registry, surgery
from paretune.errors import Incompatible
from paretune.roles import Adapter
from paretune.seams import Selected

METHODS = [method for name in registry.names("adapter") for method in steps.variants(name)]
PLAIN = [work.decided(method, "bert") for method in METHODS if not method.knobs()]  # each with its defaults


def adapted(method: Adapter, family: str, *, head: bool = False, name: str = "default", dtype: torch.dtype = torch.float32):
    """The tiny model with the adapter on it."""
    model = work.opened(family).to(dtype)
    torch.manual_seed(7)
    surgery.attach(model, [method], name=name, head=head)
    return model


def refusal(method: Adapter, family: str) -> str:
    try:
        adapted(method, family)
    except Incompatible as error:
        return str(error)
    return ""


def tried() -> dict[tuple[Adapter, str], str]:
    """What each (method, family) is refused for, empty where it is taken: defaults on every family; each other choice
    of a knob on one family in rotation, and where that refuses it on the next ones, until one takes it.
    """
    found, turns = {}, itertools.cycle(range(len(tiny.FAMILIES)))
    for method in METHODS:
        turn = next(turns) if method.knobs() else 0
        for family in (*tiny.FAMILIES[turn:], *tiny.FAMILIES[:turn]):
            case = work.decided(method, family), family
            found[case] = refusal(*case)
            if method.knobs() and not found[case]:
                break
    return found


TRIED = tried()
REFUSED = [case for case, reason in TRIED.items() if reason]
TAKEN = [case for case, reason in TRIED.items() if not reason]
every_case = pytest.mark.parametrize("method, family", [pytest.param(m, f, id=f"{m}-{f}") for m, f in TAKEN])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_each_choice_of_a_knob_runs_on_a_family(method):
    assert any((work.decided(method, family), family) in TAKEN for family in tiny.FAMILIES)


@pytest.mark.parametrize("method, family", REFUSED, ids=[f"{m}-{f}" for m, f in REFUSED])
def test_a_refusal_gives_its_reason_and_changes_nothing(method, family):
    model, plain = work.opened(family), work.opened(family)
    with pytest.raises(Incompatible) as error:
        surgery.attach(model, [method])
    assert len(str(error.value).split()) > 5
    assert steps.same(steps.tensors(model), steps.tensors(plain)) and [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(p.requires_grad for p in model.parameters())


@every_case
def test_exact_at_the_start(method, family):
    if not method.exact_at_start:
        assert method.card.note, "a method that moves the output before training says why on its card"
        return
    model = adapted(method, family)
    assert torch.equal(steps.logits(model, family), steps.logits(work.opened(family), family))


def test_what_has_to_be_exact_at_the_start_says_so():
    asked = [*map(registry.get, ("lora", "adapter", "ia3", "compacter", "diff_pruning", "intrinsic_dimension"))]
    assert all(method().exact_at_start for method in asked) and registry.get("prefix")(zero_start=True).exact_at_start


@every_case
def test_only_what_is_declared_learns(method, family):
    model = adapted(method, family, head=True)
    declared = steps.learning(model)
    steps.disturb(model)  # so that no gradient is zero for a factor that starts at zero
    start = steps.parameters(model)
    steps.loss(model, family).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == declared.keys()
    head = [n for n in declared if n.startswith(tuple(f"{p}." for p in anatomy.head(model)))]
    assert surgery.count(model) == (sum(declared[n].numel() for n in declared if n not in head), sum(declared[n].numel() for n in head))
    model.zero_grad()
    steps.descend(model, family, steps=2)
    assert {n for n, t in steps.parameters(model).items() if not torch.equal(t, start[n])} == declared.keys()


@every_case
def test_the_loss_falls(method, family):
    model = adapted(method, family, head=True)
    losses = steps.descend(model, family, steps=20, lr=5e-3)
    assert losses[-1] < 0.99 * losses[0]


@every_case
def test_switched_off_it_is_the_backbone(method, family):
    model = adapted(method, family, head=True)
    steps.disturb(model)
    on = steps.logits(model, family)
    surgery.switch(model)
    assert torch.equal(steps.logits(model, family), steps.logits(work.opened(family), family))
    surgery.switch(model, "default")
    assert torch.equal(steps.logits(model, family), on)
    assert not torch.equal(on, steps.logits(work.opened(family), family))


@every_case
def test_removed_it_leaves_every_original_tensor(method, family):
    model, plain = adapted(method, family, head=True), work.opened(family)
    steps.disturb(model)
    surgery.remove(model, "default")
    assert steps.same(steps.tensors(model), steps.tensors(plain))
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.config.to_dict() == plain.config.to_dict()


@every_case
def test_the_backbones_keys_stay(method, family):
    model, plain = adapted(method, family, head=True), work.opened(family)
    extra = model.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() <= model.state_dict().keys()
    assert type(model) is type(plain) and all("paretune" in key.split(".") for key in extra)


@every_case
def test_merged_is_unmerged(method, family):
    model = adapted(method, family)
    steps.disturb(model)
    before, wanted = steps.tensors(model), steps.logits(model, family)
    if not method.foldable:
        with pytest.raises(Incompatible, match="cannot be folded"):
            surgery.merge(model)
        assert steps.same(before, steps.tensors(model))
        return
    surgery.merge(model)
    assert model.state_dict().keys() == work.opened(family).state_dict().keys()
    torch.testing.assert_close(steps.logits(model, family), wanted, rtol=1e-4, atol=1e-5)
    surgery.unmerge(model)
    assert steps.same(before, steps.tensors(model))
    assert torch.equal(steps.logits(model, family), wanted)


@every_case
def test_the_cheap_path_is_the_matrix_path(method, family):
    if not method.foldable:
        return
    model = adapted(method, family)
    steps.disturb(model)
    for path, module, seam in surgery.seams_of(model):
        patches = [p for _, _, p in seam.patches() if not isinstance(p, Selected)]
        if not patches:
            continue
        weight, bias = anatomy.weight(module).detach().double(), getattr(module, "bias", None)  # (O, I), (O)
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
        for patch in patches:  # (W + ΔW) x + b + Δb, one patch after the other
            part = list(range(len(weight))) if patch.site.rows is None else list(patch.site.rows)
            d_weight, d_bias = patch.delta(weight[part].float(), bias[part].float())
            weight[part] += d_weight.double()
            bias[part] += 0 if d_bias is None else d_bias.double()
        x = torch.randn(2, 3, weight.shape[1])
        torch.testing.assert_close(module(x).double(), F.linear(x.double(), weight, bias), rtol=1e-4, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}")


@every_case
def test_saved_and_loaded_it_gives_the_same(method, family, tmp_path):
    model = adapted(method, family, head=True)
    steps.disturb(model)
    wanted = steps.logits(model, family)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is type(model)
    assert torch.equal(steps.logits(loaded, family), wanted)
    assert steps.same(steps.tensors(loaded), steps.tensors(model))
    assert surgery.state(loaded).adapters == surgery.state(model).adapters
    surgery.switch(loaded)
    assert torch.equal(steps.logits(loaded, family), steps.logits(work.opened(family), family))


@every_case
def test_bf16(method, family):
    model = adapted(method, family, head=True)
    losses = steps.descend(model, family, steps=12, autocast=True)
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in model.parameters())


@every_case
def test_a_bf16_backbone(method, family, tmp_path):
    model = adapted(method, family, head=True, dtype=torch.bfloat16)
    own = {n: p for n, p in steps.learning(model).items() if "paretune" in n.split(".")}
    assert all(p.dtype == torch.float32 for p in own.values())
    losses = steps.descend(model, family, steps=12)
    assert losses[-1] < losses[0]
    wanted = steps.logits(model, family)
    assert wanted.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert torch.equal(steps.logits(loaded, family), wanted)
    surgery.remove(model, "default")
    assert steps.same(steps.tensors(model), steps.tensors(work.opened(family).to(torch.bfloat16)))


@every_case
def test_gradient_checkpointing_gives_the_same_gradients(method, family):
    _checkpointed(method, family, reentrant=False)


# Reentrant checkpoints pass no gradient through a block whose inputs ask for none (torch warns so), and transformers
# lets only token embeddings ask for it; images and sound need the other kind, which is transformers' default.
@pytest.mark.parametrize("method", PLAIN, ids=str)
def test_reentrant_checkpointing_gives_the_same_gradients(method):
    _checkpointed(method, "bert", reentrant=True)


def _checkpointed(method: Adapter, family: str, *, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(method, family, head=True)
        steps.disturb(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        torch.manual_seed(0)  # of the dropout
        steps.loss(model, family).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@every_case
def test_one_adapter_per_row_is_each_alone(method, family):
    model = adapted(method, family, name="a")
    steps.disturb(model, seed=1)
    surgery.attach(model, [method], name="b", head=False)
    steps.disturb(model, seed=2)
    plain = {}
    for name in ("a", "b"):
        surgery.switch(model, name)
        plain[name] = steps.logits(model, family)
    surgery.switch(model)
    plain[None] = steps.logits(model, family)
    names = ["b", None, "a"]
    if not method.additive or any(isinstance(p, Selected) for _, _, seam in surgery.seams_of(model) for _, _, p in seam.patches()):
        with pytest.raises(Incompatible, match="single rows"), surgery.rows(model, names):
            pass
        return
    with surgery.rows(model, names):
        together = steps.logits(model, family)
    for row, name in enumerate(names):
        torch.testing.assert_close(together[row], plain[name][row], rtol=1e-5, atol=1e-6)
    assert surgery.state(model).active == ()


@every_case
def test_two_adapters_do_not_disturb_each_other(method, family):
    model = adapted(method, family, head=True, name="a")
    steps.disturb(model, seed=1)
    with_a = steps.logits(model, family)
    surgery.attach(model, [method], name="b")
    assert not any(".paretune.a." in n for n in steps.learning(model))
    start = steps.logits(model, family)
    steps.descend(model, family, steps=3)
    with_b = steps.logits(model, family)
    assert not torch.equal(start, with_b)
    for name, wanted in (("a", with_a), ("b", with_b), ("a", with_a)):
        surgery.switch(model, name)
        assert torch.equal(steps.logits(model, family), wanted)
    surgery.remove(model, "b")
    assert torch.equal(steps.logits(model, family), with_a)
    surgery.remove(model, "a")
    assert steps.same(steps.tensors(model), steps.tensors(work.opened(family)))


@every_case
def test_a_deep_copy_is_equal_and_its_own(method, family):
    model = adapted(method, family, head=True)
    steps.disturb(model)
    wanted, before = steps.logits(model, family), steps.tensors(model)
    twin = copy.deepcopy(model)
    assert torch.equal(steps.logits(twin, family), wanted) and steps.same(steps.tensors(twin), before)
    steps.descend(twin, family, steps=2)
    surgery.remove(twin, "default")
    assert steps.same(steps.tensors(model), before) and torch.equal(steps.logits(model, family), wanted)


@pytest.mark.parametrize("method", PLAIN, ids=str)
def test_each_adapter_has_its_own_head(method):
    family = "bert"
    model = adapted(method, family, head=True, name="a")
    before = model.classifier.weight.detach().clone()
    steps.descend(model, family, steps=2)
    of_a = model.classifier.weight.detach().clone()
    surgery.attach(model, [method], name="b")
    assert torch.equal(model.classifier.weight, before) and model.classifier.weight.requires_grad
    steps.descend(model, family, steps=3)
    of_b = model.classifier.weight.detach().clone()
    surgery.switch(model, "a")
    assert torch.equal(model.classifier.weight, of_a)
    surgery.switch(model, "b")
    assert torch.equal(model.classifier.weight, of_b) and not torch.equal(of_a, of_b)


@pytest.mark.parametrize("method", [m for m in PLAIN if m.foldable], ids=str)
def test_the_trainer_of_transformers_takes_it(method, tmp_path):
    model = adapted(method, "bert", head=True)
    rows = [{"input_ids": [0, 5 + i, 2], "attention_mask": [1, 1, 1], "labels": i % 3} for i in range(6)]
    settings = transformers.TrainingArguments(tmp_path, max_steps=3, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no")
    trainer = transformers.Trainer(model, settings, train_dataset=rows)
    trainer.train()
    straight = steps.tensors(model)
    again = adapted(method, "bert", head=True)
    transformers.Trainer(again, settings, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in steps.tensors(again).items():
        torch.testing.assert_close(tensor, straight[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
