"""Distillation: its losses against their equations, zero where the student is the teacher, a gradient to the student alone, and the cache."""

from __future__ import annotations

import copy
import dataclasses
import re

import numpy
import pytest
import steps
import tiny
import torch
import work
from torch.nn import functional as F

from paretune import phases, surgery, teachers, training
from paretune.errors import Incompatible, RecipeError, StoreError
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.head import Head
from paretune.methods.adapters.lora import LoRA
from paretune.methods.modifiers import distill
from paretune.methods.modifiers.distill import Distill
from paretune.methods.modifiers.schedule import Schedule
from paretune.methods.transforms.keep_layers import KeepLayers
from paretune.roles import After

EVERYTHING = {"logits": 1.0, "hidden": 1.0, "attention": 1.0, "relation": 1.0}


def loop_of(model, task, *, teacher=None, folder=None, report=None):
    """A training phase that has not begun; `teacher` is what `@1` opens."""
    settings = training.Settings(folder=folder, after=None if teacher is None else lambda k: copy.deepcopy(teacher), report=report)
    loop = training.Loop(model, task, Schedule(lr=5e-3, batch=4, dtype="fp32", dropout=False), settings)
    loop.pace, loop._forward = training.probe.Pace(), model
    return loop


def loss_of(loop, knobs, *, indices=(0, 1, 2)):
    """(its share of the loss alone, how many targets) of some training examples."""
    loop.events = [knobs.events(loop)]
    loop.indices = list(indices)
    loop.model.eval()
    return loop.loss(loop._collate(loop.indices))


def taught(family="bert", kind="classification", *, layers=2, seed=3):
    """A student of `layers` layers that learns whole, and another model of the same family as its teacher."""
    student = work.ready(family, kind)
    if layers < 2:
        phases.shrink(student, KeepLayers(layers=(0,)))
    surgery.attach(student, [Full()])
    teacher = tiny.model(family, kind, seed=seed)
    work.processors.put(teacher, work.processor(family))
    return student, teacher


# --- the promises ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "t5"])
@pytest.mark.parametrize("by", ["mse", "cosine"])
def test_the_loss_is_zero_where_the_student_is_the_teacher(family, by):
    model = work.ready(family)
    surgery.attach(model, [LoRA(r=2)])  # exact at the start, so that @0 is the model itself
    loss, _ = loss_of(loop_of(model, work.task(family)), Distill(mix=1.0, **EVERYTHING, hidden_by=by))
    assert abs(float(loss.detach())) < 1e-5
    steps.disturb(model)
    moved, _ = loss_of(loop_of(model, work.task(family)), Distill(mix=1.0, **EVERYTHING, hidden_by=by))
    assert float(moved.detach()) > 1e-3


@pytest.mark.parametrize("term", EVERYTHING)
def test_the_gradient_goes_to_the_student_alone(term):
    student, teacher = taught()
    knobs = Distill(After(1), mix=1.0, **{**dict.fromkeys(EVERYTHING, 0.0), term: 1.0})
    loop = loop_of(student, work.text_task(), teacher=teacher)
    loss_of(loop, knobs)[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in loop.events[0].teacher.model.parameters())
    moved = [p.grad for p in loop.parameters.values() if p.grad is not None and bool((p.grad != 0).any())]
    assert moved and not [n for n, m in student.named_modules() if "~" in n], "nothing stays on the student"


@pytest.mark.parametrize("kind, family", [("classification", "t5"), ("tokens", "bert"), ("causal", "gpt2"), ("seq2seq", "t5")])
def test_answers_of_every_kind_are_compared_target_by_target(kind, family):
    task = {"classification": work.text_task, "tokens": work.token_task}.get(kind, work.generation_task)()
    student, teacher = taught(family, kind)
    loop = loop_of(student, task, teacher=teacher)
    loss, count = loss_of(loop, Distill(After(1), mix=1.0, temperature=3.0))
    batch = loop._collate([0, 1, 2])
    with torch.no_grad():
        z_s, z_t = (torch.cat(task.kind.answered(m(**task.kind.inputs(batch)), batch)) for m in (student, teacher))
    p, q = (z_t.double() / 3).softmax(-1), (z_s.double() / 3).softmax(-1)
    assert len(z_s) == count
    assert torch.allclose(loss.double(), 9 * (p * (p / q).log()).sum(), rtol=1e-3)


# --- the equations --------------------------------------------------------------------------------------------------------------


def test_hinton_s_gradient_is_that_of_the_mean_logits_at_a_high_temperature():
    """Section 2.1: at high T, with logits of mean zero, T² KL is Σ (z^s − z^t)² / 2C."""
    z_s, z_t = (x - x.mean(-1, keepdim=True) for x in torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)))
    found = distill.softened(z_s.double(), z_t.double(), temperature=1e4)
    assert torch.allclose(found, (z_s - z_t).double().square().sum() / 8, rtol=1e-3)


def test_a_regression_compares_numbers():
    assert float(distill.softened(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]]), temperature=7.0)) == 5.0


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_is_inside_is_what_transformers_says(family):
    """Hidden states, attention and value relations from transformers' own outputs and from the maps, example by example without padding."""
    student, teacher = taught(family)
    task, weights = work.text_task(), {"hidden": 0.7, "attention": 0.3, "relation": 0.9}
    loop = loop_of(student, task, teacher=teacher)
    loss, _ = loss_of(loop, Distill(After(1), mix=1.0, logits=0.0, **weights))
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    alone = [task.kind.collate([loop.encodings[i]], work.processor(family)) for i in (0, 1, 2)]
    expected = sum(example(student, teacher, batch, weights, causal=family == "llama") for batch in alone)
    assert torch.allclose(loss, expected, rtol=1e-4)


def example(student, teacher, batch, weights, *, causal):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    (states_s, heads_s, probabilities_s), (states_t, heads_t, probabilities_t) = (look(m, inputs) for m in (student, teacher))
    T = states_s[0].shape[1]
    pairs = torch.ones(T, T).tril() if causal else torch.ones(T, T)
    hidden = sum(F.mse_loss(s, t) for s, t in zip(states_s, states_t, strict=True))
    scores = 0.0
    for (q_s, k_s, _), (q_t, k_t, _) in zip(heads_s, heads_t, strict=True):
        apart = (q_s @ k_s.mT - q_t @ k_t.mT).square()  # (1, H, T, T)
        scores = scores + ((apart * pairs).sum(-1) / pairs.sum(-1)).mean()
    relation = kl(probabilities_t[-1], probabilities_s[-1]) + kl(*(values(h[-1][2], pairs) for h in (heads_t, heads_s)))
    return weights["hidden"] * hidden + weights["attention"] * scores + weights["relation"] * relation


def look(model, inputs):
    """Hidden states by hooks on layers, heads from an attention function of our own, probabilities from transformers."""
    heads = []

    def spy(module, query, key, value, mask, **kwargs):
        groups = query.shape[1] // key.shape[1]
        heads.append((query * query.shape[-1] ** -0.5, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
        return original(module, query, key, value, mask, **kwargs)

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table

    original = table["sdpa"]
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    table["sdpa"] = spy
    try:
        model(**inputs)
    finally:
        table["sdpa"] = original
        model.set_attn_implementation("eager")
    states = list(out.hidden_states)
    if hasattr(model, "model"):  # Llama's last is behind the final norm
        model.model.layers[-1].register_forward_hook(lambda _, args, y: states.append(y[0] if isinstance(y, tuple) else y))
        model(**inputs)
        states[-2:] = [states[-1]]
    return states, heads, out.attentions


def kl(p, q):
    return (p * ((p + 1e-30).log() - (q + 1e-30).log())).sum(-1).mean()


def values(v, pairs):
    return (v @ v.mT * v.shape[-1] ** -0.5).masked_fill(pairs == 0, -torch.inf).softmax(-1)


def test_padding_changes_nothing():
    student, teacher = taught()
    loop = loop_of(student, work.text_task(), teacher=teacher)
    knobs = Distill(After(1), mix=1.0, **EVERYTHING)
    together, _ = loss_of(loop, knobs, indices=range(6))
    assert len({len(e["input_ids"]) for e in loop.encodings[:6]}) > 1
    alone = sum(loss_of(loop, knobs, indices=[i])[0] for i in range(6))
    assert torch.allclose(together, alone, rtol=1e-4)


# --- layers and widths ----------------------------------------------------------------------------------------------------------


def test_layers_are_matched_as_tinybert_does():
    assert Distill(hidden=1.0).pairs(4, 12) == [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]  # section 4.2: g(m) = 3m
    assert Distill(hidden=1.0, layers="last").pairs(3, 6) == [(3, 6)]
    assert Distill(hidden=1.0, layers=[1, 5]).pairs(2, 6) == [(0, 0), (1, 2), (2, 6)]
    for wrong in ([1], [1, 6]):
        with pytest.raises(Incompatible, match="0 to 5, for each of the student's 2"):
            Distill(hidden=1.0, layers=wrong).pairs(2, 6)
    with pytest.raises(RecipeError, match="even"):
        Distill(hidden=1.0, layers="odd")


def test_a_wider_teacher_is_met_by_a_map_that_learns_and_stays_out_of_the_model(tmp_path):
    wide = tiny.model("bert", config={"hidden_size": 24, "num_hidden_layers": 4}, seed=3)
    work.processors.put(wide, tiny.tokenizer())
    model = work.ready("bert")
    surgery.attach(model, [Full()])
    keys = list(model.state_dict())
    loop = loop_of(model, work.text_task(), teacher=wide, folder=tmp_path)
    loop.events = [Distill(After(1), mix=1.0, logits=0.0, hidden=1.0).events(loop)]
    start = {n: p.detach().clone() for n, p in loop.parameters.items() if n.startswith("distill.")}
    assert {n: tuple(p.shape) for n, p in start.items()} == {"distill.embeddings": (24, 16), "distill.layers": (24, 16)}
    fit = loop.run()
    assert fit.epochs[-1]["loss"] < fit.epochs[0]["loss"]
    assert all(not torch.equal(p, loop.parameters[n]) for n, p in start.items()) and list(model.state_dict()) == keys


def test_what_cannot_be_compared_is_refused():
    student, _ = taught()
    task = work.text_task()
    with pytest.raises(Incompatible, match="4 logits and the student 3"):
        loss_of(loop_of(student, task, teacher=ready_teacher(labels=4)), Distill(After(1)))
    with pytest.raises(Incompatible, match="2 heads, the student 4"):
        loss_of(loop_of(student, task, teacher=ready_teacher(config={"num_attention_heads": 2})), Distill(After(1), attention=1.0))
    with pytest.raises(Incompatible, match="encoder and a decoder"):
        loss_of(loop_of(taught("t5")[0], task), Distill(hidden=1.0))
    with pytest.raises(Incompatible, match="in none; give the teacher's folder"):
        loss_of(loop_of(student, task), Distill(After(2)))
    with pytest.raises(RecipeError, match="nothing is compared"):
        Distill(logits=0.0)
    alone = work.ready("bert")
    surgery.attach(alone, [Head()])
    with pytest.raises(Incompatible, match="let more learn"):
        loss_of(loop_of(alone, task), Distill(logits=0.0, hidden=1.0, mix=1.0))


def ready_teacher(**how):
    teacher = tiny.model("bert", seed=3, **how)
    work.processors.put(teacher, tiny.tokenizer())
    return teacher


# --- the cache ------------------------------------------------------------------------------------------------------------------


def test_each_example_goes_through_the_teacher_once(tmp_path):
    student, teacher = taught()
    loop = loop_of(student, work.text_task(), teacher=teacher, folder=tmp_path)
    loop.events = [Distill(After(1), **EVERYTHING).events(loop)]
    asked, ask = [], loop.events[0].teacher._ask
    loop.events[0].teacher._ask = lambda indices: asked.extend(indices) or ask(indices)
    loop.run()
    assert sorted([0, *asked]) == list(range(24))  # the first one was asked before, for its shape


def test_the_cache_changes_nothing_and_is_found_again(tmp_path):
    def trained(**how):
        student, teacher = taught()
        said = []
        loop = loop_of(student, work.text_task(), teacher=teacher, report=said.append, **({"folder": tmp_path} if how.pop("folder", False) else {}))
        loop.events = [Distill(After(1), hidden=1.0, **how).events(loop)]
        asked = []
        ask = loop.events[0].teacher._ask
        loop.events[0].teacher._ask = lambda indices: asked.extend(indices) or ask(indices)
        loop.run()
        return steps.tensors(student), asked, [line["said"] for line in said if "said" in line]

    live, asked, _ = trained(cache=False)
    assert len(asked) == 3 * 24
    kept, _, said = trained(folder=True)
    again, asked, _ = trained(folder=True)
    assert asked == [] and all(torch.allclose(kept[n], live[n], atol=1e-4) for n in live)
    assert steps.same(kept, again)
    bytes_ = sum(f.stat().st_size for f in tmp_path.rglob("*.npy") if "rows" not in f.name)
    value, unit = re.fullmatch(r".* take ([\d.,]+) (k?B)", said[0]).groups()
    assert float(value) * {"B": 1, "kB": 1e3}[unit] == pytest.approx(bytes_, rel=0.05)  # the files have headers, too


def test_other_data_or_lengths_make_another_cache(tmp_path):
    student, teacher = taught()
    for task in (work.text_task(), work.text_task(train=20)):
        loop_of(student, task, teacher=teacher, folder=tmp_path).events = [Distill(After(1)).events(loop_of(student, task, teacher=teacher, folder=tmp_path))]
    assert len(list((tmp_path / "teacher").iterdir())) == 2


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    student, teacher = taught()
    monkeypatch.setattr(teachers.store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(StoreError, match=r"MB are needed.*distill\(cache=False\)"):
        Distill(After(1)).events(loop_of(student, work.text_task(), teacher=teacher, folder=tmp_path))
    assert not (tmp_path / "teacher").exists()


def test_a_shelf_gives_what_was_put(tmp_path):
    shelf = teachers.Shelf(tmp_path / "a", [2, 0, 3], width=2)
    shelf.put(2, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    again = teachers.Shelf(tmp_path / "a", [2, 0, 3], width=2)
    assert [again.has(i) for i in range(3)] == [False, False, True]
    assert numpy.array_equal(again.get(2).numpy(), [[1.0, 2.0], [3.0, 4.0]])


class Killed(Exception):
    """Stands for a kill."""


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    def trained(folder, *, until=None):
        student, teacher = taught()
        steps_done = []

        def report(info):
            steps_done.append(info)
            if len([i for i in steps_done if "step" in i]) == until:
                raise Killed

        loop = loop_of(student, work.text_task(), teacher=teacher, folder=folder, report=report)
        loop.settings = dataclasses.replace(loop.settings, checkpoint_every_s=0.0)
        loop.events = [Distill(After(1), **EVERYTHING).events(loop)]
        loop.run()
        return steps.tensors(student)

    torch.manual_seed(0)
    whole = trained(tmp_path / "whole")
    torch.manual_seed(0)
    with pytest.raises(Killed):
        trained(tmp_path / "cut", until=9)
    torch.manual_seed(1)  # the state of the generator comes from the checkpoint
    assert steps.same(trained(tmp_path / "cut"), whole)


@pytest.mark.parametrize("cache, passes", [(True, 24), (False, 2 * 24)])
def test_the_teacher_s_passes_are_counted_among_the_training_s_flops(cache, passes):
    student, teacher = taught()
    loop = loop_of(student, work.text_task(), teacher=teacher)
    loop.schedule = dataclasses.replace(loop.schedule, epochs=2.0)
    loop.events = [Distill(After(1), cache=cache).events(loop)]
    assert loop.run().flops_beside == pytest.approx(passes * training.forward_flops(teacher, loop.task))


@pytest.mark.parametrize("family, width", [("gpt2", 16), ("gemma2", tiny.SIZE)])  # Gemma 2 caps its logits behind the map
def test_a_language_model_keeps_the_hidden_state_before_its_logits(family, width):
    student, teacher = work.ready("gpt2", "causal"), tiny.model(family, "causal", seed=3)
    work.processors.put(teacher, tiny.tokenizer())
    surgery.attach(student, [Full()])
    loop = loop_of(student, work.generation_task(), teacher=teacher)
    kept, _ = loss_of(loop, Distill(After(1), mix=1.0))
    assert loop.events[0].teacher.shelves["logits"].values.shape[1] == width
    live, _ = loss_of(loop, Distill(After(1), mix=1.0, cache=False))
    assert torch.allclose(kept, live, rtol=1e-4)
