from __future__ import annotations

import dataclasses

import pytest
import steps
import tiny
import torch
import work
from transformers import BertConfig

import paretune
from paretune import backbones, phases, surgery
from paretune.methods.adapters.adapter import Adapter
from paretune.methods.adapters.bitfit import BitFit
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.lora import LoRA
from paretune.methods.modifiers.schedule import Schedule
from paretune.options import Options
from paretune.step import dropout, probe
from paretune.tasks.kinds import KINDS
from paretune.training import Loop, Settings


def loop(**knobs):
    model = work.ready("bert")
    surgery.attach(model, [LoRA(r=2)])
    return Loop(model, work.text_task(), Schedule(**{"lr": 1e-3, "dtype": "fp32", **knobs}), Settings())


def test_decay_is_for_matrices_and_not_for_vectors():
    groups = loop(weight_decay=0.3).optimizer.param_groups
    decays = {p.dim() > 1: g["weight_decay"] for g in groups for p in g["params"]}
    assert decays == {True: 0.3, False: 0.0}


@pytest.mark.parametrize("epochs, steps_wanted", [(1.0, 3), (2.0, 6), (0.5, 2), (1.5, 5), (0.1, 1)])
def test_epochs_may_be_a_fraction(epochs, steps_wanted):
    model = work.ready("bert")
    surgery.attach(model, [LoRA(r=2)])
    fit = work.fitted(model, work.text_task(), epochs=epochs, batch=8, patience=9)
    assert fit.steps == steps_wanted


def test_a_head_that_is_not_trained_stays():
    model = work.ready("bert")
    surgery.attach(model, [LoRA(r=2)], head=Schedule(head=False).head)
    before = model.classifier.weight.detach().clone()
    work.fitted(model, work.text_task(), head=False)
    assert torch.equal(model.classifier.weight, before)


@pytest.mark.parametrize("kept", [True, False])
def test_dropout_is_the_checkpoint_s_the_head_s_and_the_adapters_own(kept):
    """By what is computed: which shares are drawn with in a training pass, all of them different."""
    model, drawn = work.ready("bert"), set()
    surgery.attach(model, [LoRA(r=2, dropout=0.5)])
    for module, share in ((model.bert.embeddings.dropout, 0.2), (model.bert.encoder.layer[0].output.dropout, 0.3), (model.dropout, 0.4)):
        module.p = share
    with pytest.MonkeyPatch.context() as patch, probe.paced(model, probe.Pace(), dropout=kept):
        for place in (dropout, torch.nn.functional):
            name, own = ("dropped", dropout.dropped) if place is dropout else ("dropout", torch.nn.functional.dropout)
            patch.setattr(place, name, lambda x, p=0.5, *rest, own=own, **how: drawn.add(p) or own(x, p, *rest, **how))
        model.train()(**tiny.inputs("bert"))
    assert {0.2, 0.3, 0.4, 0.5} <= drawn if kept else drawn <= {0.0}


def test_dropout_off_makes_training_independent_of_its_noise():
    found = []
    for seed in (0, 1):
        model = work.ready("bert")
        torch.manual_seed(0)
        surgery.attach(model, [LoRA(r=2)])
        torch.manual_seed(seed)
        losses = []
        schedule = Schedule(lr=1e-3, epochs=1.0, batch=4, dtype="fp32", dropout=False)
        from paretune import training

        training.fit(model, work.text_task(), schedule=schedule, settings=Settings(report=lambda info, to=losses: to.append(info["loss"])))
        found.append(losses)
    assert found[0] == found[1]
    assert work.ready("bert").config.hidden_dropout_prob > 0  # so that there was something to switch off


def test_dropout_is_back_after_training():
    model = work.ready("bert")
    shares = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    surgery.attach(model, [LoRA(r=2)])
    work.fitted(model, work.text_task(), dropout=False, epochs=1.0)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == shares and any(shares)


def test_bf16_leaves_every_frozen_bit_as_it_was():
    model = work.ready("bert")
    surgery.attach(model, [LoRA(r=2)])
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    fit = work.fitted(model, work.text_task(), dtype="bf16")
    assert fit.dtype == "bf16" and all(p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(model.get_parameter(n), t) for n, t in frozen.items())
    assert not any(torch.equal(p, t) for p, t in zip(steps.learning(model).values(), frozen.values(), strict=False) if p.shape == t.shape)


def test_the_default_rate_is_the_lowest_of_the_cards_and_falls_with_the_size():
    base, minilm = BertConfig(), BertConfig(hidden_size=384, num_hidden_layers=6)
    assert phases.default_lr((LoRA(),), base) == LoRA.card.lr
    assert phases.default_lr((LoRA(), BitFit()), minilm) == min(LoRA.card.lr, BitFit.card.lr)
    assert phases.default_lr((Full(),), base) == Full.card.lr
    assert phases.default_lr((Adapter(bottleneck=64),), base) == phases.default_lr((Adapter(bottleneck=8, scale=0.5),), base) == Adapter.card.lr
    assert phases.default_lr((Adapter(bottleneck=512, scale=4.0),), base) == Adapter.card.lr / 32
    assert phases.default_lr((Full(),), minilm) == pytest.approx(4 * Full.card.lr)  # half the layers, half the width


@pytest.mark.parametrize("examples, epochs, batch", [(30, 3.0, 8), (266, 3.0, 8), (267, 3.0, 16), (533, 3.0, 16), (534, 3.0, 32), (534, 1.0, 8)])
def test_little_data_has_small_batches(examples, epochs, batch):
    task = work.text_task(train=examples)
    assert Schedule(epochs=epochs).sized(task).batch == batch
    assert Schedule(epochs=epochs, batch=64).sized(task).batch == 64
    assert Schedule(epochs=epochs).sized(dataclasses.replace(task, kind=KINDS["language"]())).batch == 32, "its examples are blocks, however few the rows"


def test_the_batch_stands_in_the_completed_recipe_and_by_hand_it_is_the_same(tmp_path):
    tiny.model("bert", "base").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    task, found = work.text_task(train=24), backbones.find(str(tmp_path))
    (phase,) = phases.complete(paretune.parse("bitfit"), found, task=task, options=Options()).phases
    assert next(m for m in phase if isinstance(m, Schedule)).batch == 8
    model = paretune.load(str(tmp_path), task)
    fitted = paretune.fit(paretune.adapt(model, "bitfit"), task)
    assert fitted.steps == 3 * 24 // 8


@pytest.mark.parametrize("text, lr, head_lr", [
    ("lora", 3e-3, None), ("ia3", 1e-2, 3e-3), ("head", 1e-2, None), ("head + ia3", 1e-2, 3e-3), ("lora + schedule(lr=1e-2)", 1e-2, 3e-3),
    ("ia3 + schedule(head_lr=1e-2)", 1e-2, 1e-2), ("ia3 + schedule(head=False)", 1e-2, None),
])  # fmt: skip
def test_a_head_beside_adapters_of_a_high_rate_has_its_own(text, lr, head_lr):
    (phase,) = paretune.parse(text).phases
    given = next((m for m in phase if isinstance(m, Schedule)), Schedule())
    found = phases.rated(given, phase, config=BertConfig())
    assert (found.lr, found.head_lr) == (lr, head_lr)
