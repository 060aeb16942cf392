"""A time budget counts all that a recipe does with an example: steps, a teacher's answers, the passes that fit a readout."""

from __future__ import annotations

import functools
import itertools
import types

import pytest
import tiny
import work

from paretune import allotment, backbones, phases
from paretune.options import Options, Training
from paretune.recipe import as_recipe

STEP, FORWARD, EPOCHS = 100.0, 1.0, 2  # seconds per example
TIMING = 7.0  # seconds that finding this out takes


@pytest.fixture
def allot(tmp_path, monkeypatch):
    """What a large budget gives a recipe, on a machine whose speeds are known."""
    monkeypatch.setattr(allotment.probe, "step_seconds", lambda model, kind, *, batch, **how: STEP * len(batch["labels"]))
    def forward(model, task, *, given, pace=None):
        for batch in given:
            model(**task.kind.inputs(batch))
        return FORWARD

    monkeypatch.setattr(allotment, "_forward_s", forward)
    clock = itertools.count(0.0, TIMING)
    monkeypatch.setattr(allotment, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    for family in ("bert", "gpt2"):
        tiny.model(family, "base").save_pretrained(tmp_path / family)
        tiny.tokenizer().save_pretrained(tmp_path / family)

    def given(recipe, family="bert"):
        backbone, task = backbones.find(str(tmp_path / family)), work.text_task(train=96)
        options = Options(training=Training(epochs=EPOCHS, batch=8, dtype="fp32"))
        complete = functools.partial(phases.complete, backbone=backbone, task=task, options=options)
        return allotment.allot([phases.Plan(complete(as_recipe(recipe)), task, backbone, 0, tmp_path / "out", options)], 1e6)

    return given


@pytest.mark.parametrize("recipe, asked", [
    ("full", 0), ("surgical", 0), ("full | full + distill(teacher=@1)", 1), ("full | keep_layers | full + distill(teacher=@1, cache=False)", EPOCHS),
    ("full + distill(teacher=@0, logits=0.0, hidden=1.0)", 1), ("imprint | full", 1), ("full | prototypes", 1), ("prototypes(source=\"labels\")", 0),
])  # fmt: skip
def test_passes_beside_the_steps_are_counted(recipe, asked, allot):
    trainings = sum("full" in phase or "surgical" in phase for phase in recipe.split("|"))
    assert allot(recipe).seconds_per_example == trainings * EPOCHS * STEP + asked * FORWARD


def test_an_answer_of_a_readout_alone_takes_its_time(allot):
    found, other = allot("choices", "gpt2"), allot("in_context(shots=1)", "gpt2")
    rows = 12  # validation and test
    assert found == other and found.seconds_per_example == 0.0 and found.max_train == 96
    assert found.fixed_s == allotment.PER_RUN_S + rows * FORWARD + TIMING
