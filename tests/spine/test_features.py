"""Frozen features: the phase is what it is without them, by fewer passes; and where a phase has none, it is as it was."""

from __future__ import annotations

import dataclasses
import types

import numpy
import pytest
import steps
import torch
import work
from transformers.pytorch_utils import Conv1D

from paretune import batches, store, surgery
from paretune.events import Events
from paretune.features import Features, cuts, shelves
from paretune.methods.adapters.head import Head
from paretune.methods.adapters.lora import LoRA
from paretune.methods.adapters.prompt import Prompt
from paretune.methods.adapters.top_layers import TopLayers
from paretune.methods.modifiers.random_subset import RandomSubset
from paretune.tasks import Rows

ONE_STACK = ("bert", "roberta", "distilbert", "deberta-v2", "gpt2", "llama", "gemma2", "vit")


class Killed(Exception):
    """Stands for a kill."""


class Seen(Events):
    """Keeps the gradients of every step, and counts the examples that the first layer computes."""

    def __init__(self, loop):
        self.gradients, self.examples = [], 0
        inside = next(m for m in loop.model.get_submodule(cuts._layers(loop.model)[0]).modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.Linear | Conv1D))
        inside.register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.examples += len(args[0])

    def before_step(self, loop):
        self.gradients.append({n: p.grad.clone() for n, p in loop.parameters.items() if p.grad is not None})


class Spy:
    """A modifier that only looks."""

    def events(self, loop):
        self.seen, self.loop = Seen(loop), loop
        return self.seen


def adapted(family, method):
    torch.manual_seed(3)
    model = work.ready(family)
    surgery.attach(model, [method])
    return model


def trained(family, method, *modifiers, task=None, **knobs):
    spy = Spy()
    model = adapted(family, method)
    fit = work.fitted(model, task or work.task(family), spy, *modifiers, **{"dropout": False, "epochs": 2.0, **knobs})
    return fit, spy, model


# --- the same training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, method", [*((f, m) for f in ONE_STACK for m in (Head(), TopLayers(k=1))), ("bert", Head(pooling="model"))], ids=str)
def test_every_step_is_that_of_whole_passes_and_what_is_frozen_is_computed_once(family, method):
    kept, spy, model = trained(family, method)
    whole, other, plain = trained(family, method, cache=False)
    assert len(spy.seen.gradients) == len(other.seen.gradients) == kept.steps == 12
    largest = max(float(g.abs().max()) for step in other.seen.gradients for g in step.values())
    for mine, its in zip(spy.seen.gradients, other.seen.gradients, strict=True):
        assert mine.keys() == its.keys()
        for name, gradient in its.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5 * largest)
    assert [e["loss"] for e in kept.epochs] == pytest.approx([e["loss"] for e in whole.epochs], rel=1e-5)
    assert [e["validation_score"] for e in kept.epochs] == [e["validation_score"] for e in whole.epochs]
    assert other.seen.examples == 2 * (24 + 6)
    assert spy.seen.examples == 3 + 24 + 6 + 8, "three find the cut, then each training and validation example once; eight are for counting FLOPs"


def test_a_single_epoch_keeps_nothing():
    fit, spy, _ = trained("bert", TopLayers(k=1), epochs=1.0)
    assert spy.loop.features.train.shelf is None and fit.flops_beside == 0


# --- where f ends ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, method, path, positions", [
    ("bert", Head(), "bert", "first"), ("bert", Head(pooling="model"), "bert.encoder.layer.1", "first"), ("gpt2", Head(), "transformer", "last"),
    ("vit", Head(), "vit", "first"), ("bert", TopLayers(k=1), "bert.encoder.layer.0", "all"), ("vit", TopLayers(k=1), "vit.layers.0", "all"),
    ("albert", Head(), "albert", "first"), ("roberta", LoRA(r=2, targets="*.1.*.query"), "roberta.encoder.layer.0", "all"),
])  # fmt: skip
def test_the_latest_cut_is_taken_and_no_more_kept_than_is_read(family, method, path, positions):
    cut = trained(family, method, epochs=1.0)[1].loop.features.cut
    assert (cut.path, cut.positions) == (path, positions)


@pytest.mark.parametrize("family, method", [
    ("bert", LoRA(r=2)), ("bert", Prompt(length=2)), ("bert", Head(features="weighted_sum")), ("albert", TopLayers(k=1)),
], ids=str)  # fmt: skip
def test_where_all_learns_or_all_is_read_nothing_is_kept(family, method):
    assert trained(family, method, epochs=2.0)[1].loop.features.cut is None


def test_where_the_first_layer_learns_no_pass_looks_for_a_cut(monkeypatch):
    monkeypatch.setattr(cuts, "_seen", lambda *args: pytest.fail("a pass"))
    assert trained("gpt2", LoRA(r=2))[1].loop.features.cut is None


def test_a_token_task_keeps_every_token():
    model = work.ready("roberta", "tokens")
    surgery.attach(model, [Head(pooling="model")])
    spy = Spy()
    work.fitted(model, work.token_task(), spy)
    assert spy.loop.features.cut.positions == "all"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_language_model_that_writes_answers_is_trained_and_scored_the_same(dtype):
    found = []
    for cache in (True, False):
        model, spy = work.ready("gpt2", "causal"), Spy()
        surgery.attach(model, [TopLayers(k=1)])
        found.append(work.fitted(model, work.generation_task(), spy, dtype=dtype, dropout=False, cache=cache))
        assert (spy.loop.features.cut is None) == (not cache)
    kept, whole = found
    assert [e["loss"] for e in kept.epochs] == pytest.approx([e["loss"] for e in whole.epochs], rel=1e-5 if dtype == "fp32" else 2e-3)
    assert [e["validation_score"] for e in kept.epochs] == [e["validation_score"] for e in whole.epochs]


def test_a_model_that_ranks_answers_makes_whole_passes():
    model, spy = work.ranked(), Spy()
    surgery.attach(model, [TopLayers(k=1)])
    work.fitted(model, work.text_task(), spy, epochs=2.0)
    assert spy.loop.features.cut is None


class Mixing(Seen):
    """Changes the inputs."""

    def inputs(self, loop, batch):
        return batch


class Penalty(Seen):
    """Has a loss of its own."""

    def loss(self, loop, batch, *, outputs, loss):
        return loss


@pytest.mark.parametrize("kind", [Mixing, Penalty])
def test_a_modifier_that_looks_into_the_pass_gets_whole_ones(kind):
    spy = Spy()
    spy.events = lambda loop: setattr(spy, "loop", loop) or setattr(spy, "seen", kind(loop)) or spy.seen
    work.fitted(adapted("bert", Head()), work.text_task(), spy, epochs=2.0)
    assert spy.loop.features.cut is None and spy.seen.examples == 2 * (24 + 6)


class Unfreezing(Seen):
    """Changes a frozen weight between the epochs."""

    def epoch_ends(self, loop):
        with torch.no_grad():
            loop.model.bert.embeddings.word_embeddings.weight.mul_(1.5)


def test_features_of_weights_that_change_are_not_read():
    found = []
    for cache in (True, False):
        spy = Spy()
        spy.events = lambda loop, spy=spy: setattr(spy, "seen", Unfreezing(loop)) or spy.seen
        found.append(work.fitted(adapted("bert", Head()), work.text_task(), spy, epochs=2.0, dropout=False, cache=cache))
    assert [e["loss"] for e in found[0].epochs] == pytest.approx([e["loss"] for e in found[1].epochs], rel=1e-5)


# --- dropout --------------------------------------------------------------------------------------------------------------------


def test_dropout_stays_in_what_learns_and_is_gone_from_what_is_frozen():
    """By the modules' own say: which of them compute as in training while the model is called."""
    model, said = adapted("bert", TopLayers(k=1)), {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_pre_hook(lambda m, args, path=path: said.setdefault(path, set()).add(m.training) if model.training else None)
    work.fitted(model, work.text_task(validation=0), epochs=2.0, dropout=True)
    assert said["bert.encoder.layer.1.output.dropout"] == {True} == said["dropout"]
    assert said["bert.embeddings.dropout"] == {False} == said["bert.encoder.layer.0.output.dropout"]
    assert model.bert.embeddings.dropout.training == model.training


def said_about(method, *, processes=1, **knobs):
    """The lines that a phase says of what is frozen."""
    said, spy = [], Spy()
    work.fitted(adapted("bert", method), work.text_task(), spy, report=lambda info: said.append(info.get("said")), **knobs)
    if processes > 1:  # what `Features` says where a launcher started several
        said.clear()
        spy.loop.accelerator = types.SimpleNamespace(num_processes=processes, device=torch.device("cpu"))
        Features(spy.loop, [])
    return [text for text in said if text]


@pytest.mark.parametrize("epochs, processes, how", [(1.0, 1, "in every epoch"), (2.0, 1, "once per example"), (2.0, 2, "in every epoch")])
def test_dropout_that_frozen_parts_lose_is_never_lost_in_silence(epochs, processes, how):
    (line,) = said_about(TopLayers(k=1), epochs=epochs, processes=processes, dropout=True)
    assert how in line and "without dropout" in line and "schedule(cache=False)" in line


def test_where_no_dropout_is_lost_none_is_spoken_of():
    assert said_about(TopLayers(k=1), epochs=1.0, dropout=False) == said_about(TopLayers(k=1), epochs=2.0, dropout=True, cache=False) == []
    assert said_about(LoRA(r=2), epochs=2.0, dropout=True) == [], "LoRA in all layers leaves dropout where it was"
    (line,) = said_about(TopLayers(k=1), epochs=2.0, dropout=False)
    assert "once per example" in line and "dropout" not in line


# --- resume ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, modifiers", [(1, ()), (6, ()), (11, ()), (4, (RandomSubset(keep=0.7),))], ids=str)
def test_a_killed_training_goes_on_bit_for_bit_and_finds_its_features(step, modifiers, tmp_path):
    def report(info):
        if info.get("step") == step:
            raise Killed

    def once(folder=None, report=None):
        spy, model = Spy(), adapted("bert", TopLayers(k=1))
        return work.fitted(model, work.text_task(), spy, *modifiers, folder=folder, report=report, epochs=2.0, dropout=True), model, spy

    wanted, straight, plain = once()
    with pytest.raises(Killed):
        once(tmp_path, report)
    fit, again, spy = once(tmp_path)
    assert steps.same(steps.tensors(again), steps.tensors(straight)) and fit.epochs == wanted.epochs
    if not modifiers:  # a kill in the report of a step comes behind the step; validation at the end of the epoch
        known = 4 * min(step, 6) + 6 * (step > 6)
        assert spy.seen.examples == plain.seen.examples - known, "what was kept is not computed again"
    assert not list(tmp_path.iterdir()), "the features of a finished phase are gone"


def test_what_is_kept_is_named_by_all_that_decides_it(tmp_path):
    names = set()
    given = work.text_task()
    others = dataclasses.replace(given, train=Rows([*given.train[1:], given.train[0]]))
    for task, method, seed in ((given, Head(), 0), (given, Head(pooling="cls"), 0), (given, TopLayers(k=1), 0), (others, Head(), 0), (given, Head(), 1)):
        model = adapted("bert", method)
        if seed:
            torch.nn.init.normal_(model.bert.embeddings.word_embeddings.weight)
        spy = Spy()
        work.fitted(model, task, spy)
        cut = spy.loop.features.cut
        names |= {spy.loop.features._name(cut, dtype) for dtype in (torch.float32, torch.bfloat16)}
    assert len(names) == 10


# --- room -----------------------------------------------------------------------------------------------------------------------


def test_without_room_the_phase_is_the_same_and_says_so(tmp_path, monkeypatch):
    _, _, model = trained("bert", TopLayers(k=1))
    said = []
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    poor = adapted("bert", TopLayers(k=1))
    work.fitted(poor, work.text_task(), epochs=2.0, dropout=False, folder=tmp_path, report=lambda info: said.append(info.get("said")))
    assert any(text and "in every epoch" in text and "MB are needed" in text for text in said)
    for name, tensor in steps.tensors(model).items():
        torch.testing.assert_close(steps.tensors(poor)[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_shelf_in_bf16_gives_the_nearest_numbers(tmp_path):
    shelf = shelves.Shelf(tmp_path / "a", [2, 1, 3], width=2, dtype=torch.bfloat16)
    put = {2: torch.randn(3, 2), 0: torch.randn(2, 2)}
    for i, matrix in put.items():
        shelf.put(i, matrix)
    again = shelves.Shelf(tmp_path / "a", [2, 1, 3], width=2, dtype=torch.bfloat16)
    assert not again.holds([0, 1]) and again.holds([2, 0])
    assert torch.equal(again.stacked([2, 0]), torch.cat([put[2], put[0]]).bfloat16())
    assert numpy.load(tmp_path / "a.npy").nbytes == shelves.nbytes([2, 1, 3], width=2, dtype=torch.bfloat16) == 24


def test_the_flops_are_those_of_the_passes():
    """By hand: two layers of linear maps alone cost 2 x in x out a token; the first is skipped once for each example in the second epoch."""
    fit, spy, model = trained("bert", TopLayers(k=1))
    layer = model.bert.encoder.layer[0]
    lengths = sorted(spy.loop.lengths)
    middle = lengths[len(lengths) // 2 - 4 : len(lengths) // 2 + 4]
    padded = batches.width(middle, most=max(lengths))
    maps = sum(m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear))
    each = 2 * maps * padded + 2 * 2 * padded * padded * 16
    assert fit.flops_beside == pytest.approx(-each * 24)
