"""A time budget counts all that a recipe does with an example: what a rehearsal of each training says, and the passes that fit a readout."""

from __future__ import annotations

import functools
import itertools
import types

import pytest
import tiny
import work

from paretune import backbones, phases
from paretune.errors import BudgetError
from paretune.options import Options, Training
from paretune.planning import allotment, rehearsal
from paretune.planning.rehearsal import Rehearsed, Took
from paretune.recipe import as_recipe

STEP, FORWARD, ONCE, EPOCHS = 100.0, 1.0, 3.0, 2  # seconds: for an example, for an answer, for a training
TIMING = 7.0  # seconds that finding this out takes


@pytest.fixture
def allot(tmp_path, monkeypatch):
    """What a large budget gives recipes, on a machine whose speeds are known."""
    step, forward = Took(STEP, STEP), Took(FORWARD, FORWARD)
    known = Rehearsed(EPOCHS, once=Took(ONCE, ONCE), encode=Took(), first=step, later=step, watch=forward, answer=forward)
    monkeypatch.setattr(rehearsal, "rehearse", lambda model, plan, *, k: known)
    monkeypatch.setattr(rehearsal, "answer", lambda model, task: forward)
    clock = itertools.count(0.0, TIMING)
    monkeypatch.setattr(allotment, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    for family in ("bert", "gpt2"):
        tiny.model(family, "base").save_pretrained(tmp_path / family)
        tiny.tokenizer().save_pretrained(tmp_path / family)

    def given(*recipes, family="bert", budget_s=1e6):
        backbone, task = backbones.find(str(tmp_path / family)), work.text_task(train=96)
        options = Options(training=Training(epochs=EPOCHS, batch=8, dtype="fp32"))
        complete = functools.partial(phases.complete, backbone=backbone, task=task, options=options)
        return allotment.allot([phases.Plan(complete(as_recipe(r)), task, backbone, 0, tmp_path / "out", options) for r in recipes], budget_s)

    return given


@pytest.mark.parametrize("recipes, trainings, asked", [
    (["full"], 1, 0), (["full | merge", "full | int8"], 1, 0), (["full | keep_layers | full", "full"], 2, 0),
    (["imprint | full"], 1, 1), (["full | prototypes"], 1, 1), (["prototypes(source=\"labels\")"], 0, 0),
])  # fmt: skip
def test_every_phase_is_counted_once_and_readouts_by_their_passes(recipes, trainings, asked, allot):
    found = allot(*recipes)
    assert found.seconds_per_example == trainings * EPOCHS * STEP + asked * FORWARD
    watched, scored = EPOCHS * 6 * FORWARD, 12 * FORWARD  # validation between epochs; validation and test at the end
    fixed = (allotment.PER_RUN_S + scored) * len(recipes) + trainings * (ONCE + watched) + TIMING
    assert found.fixed_s == pytest.approx(fixed, abs=2.0 if not trainings else 1e-9)  # fitting class vectors to labels is really timed


def test_an_answer_of_a_readout_alone_takes_its_time(allot):
    found, other = allot("choices", family="gpt2"), allot("in_context(shots=1)", family="gpt2")
    rows = 12  # validation and test
    assert found.seconds_per_example == other.seconds_per_example == 0.0 and found.max_train == other.max_train == 96
    assert found.fixed_s == pytest.approx(allotment.PER_RUN_S + rows * FORWARD + TIMING, abs=2.0)


def test_without_time_for_all_the_last_are_left_out(allot):
    listed = ["full", "full | int8", "full | merge", "full | int4"]  # one training and four runs
    one = ONCE + EPOCHS * 6 * FORWARD + TIMING + allotment.LEAST * EPOCHS * STEP
    run = allotment.PER_RUN_S + 12 * FORWARD
    for runs in (4, 3, 2):
        found = allot(*listed, budget_s=(one + run * (runs + 0.5)) / allotment.RESERVE)
        assert (found.recipes, found.max_train) == (runs, allotment.LEAST)
    said = found.describe(listed).splitlines()
    assert said[1:] == ["warning: no time for all recipes; left out, from the end of the list: full | merge, full | int4"]
    with pytest.raises(BudgetError, match="a budget of .* s is too short: .* s are needed for 2 of 4 recipes; give more time"):
        allot(*listed, budget_s=(one + run * 1.5) / allotment.RESERVE)
