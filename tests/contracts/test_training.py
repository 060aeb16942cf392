"""The promises of the training loop: exact means, exact resume, the schedule's own formula, and a stop that says why."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import steps
import torch
import work

from paretune import surgery, training
from paretune.errors import Diverged, StoreError
from paretune.meters.clock import Moment
from paretune.meters.meter import Meter
from paretune.meters.reading import Reading, missing
from paretune.meters.spending import PARTLY, Spending, Spent
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.lora import LoRA
from paretune.methods.modifiers.random_subset import RandomSubset
from paretune.tasks import Rows, score

TASKS = {
    "classification": ("bert", "classification", work.text_task),
    "tokens": ("roberta", "tokens", work.token_task),
    "generation": ("gpt2", "causal", work.generation_task),
    "seq2seq": ("t5", "seq2seq", work.generation_task),
    "image": ("vit", "classification", work.image_task),
}


class Killed(Exception):
    """What the tests raise in the middle of a training."""


class Seen(training.Events):
    """Keeps the rate, the loss and the gradients of every step."""

    def __init__(self):
        self.rates, self.gradients = [], []

    def before_step(self, loop):
        self.rates.append(loop.optimizer.param_groups[0]["lr"])
        self.gradients.append({n: p.grad.clone() for n, p in loop.parameters.items() if p.grad is not None})


class Spy:
    """A modifier that only looks."""

    def __init__(self):
        self.seen = Seen()

    def events(self, loop):
        return self.seen


def adapted(family="bert", kind="classification", method=LoRA(r=2)):
    torch.manual_seed(3)
    model = work.ready(family, kind)
    surgery.attach(model, [method])
    return model


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("micro", [1, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(name, micro):
    family, kind, make = TASKS[name]
    found = []
    for size in (None, micro):
        spy = Spy()
        work.fitted(adapted(family, kind, Full()), make(), spy, batch=8, micro_batch=size, epochs=1.0, clip=0.0, dropout=False)
        found.append(spy.seen.gradients[0])
    whole, parts = found
    assert whole.keys() == parts.keys() and len(whole) > 5
    largest = max(float(g.abs().max()) for g in whole.values())
    for key, gradient in whole.items():
        torch.testing.assert_close(parts[key], gradient, rtol=1e-4, atol=1e-5 * largest, msg=lambda m, k=key: f"{k}: {m}")


def test_the_mean_is_over_tokens_and_not_over_parts_of_the_batch():
    """By hand: two examples of unlike length, one in each part."""
    given = work.token_task()
    short, long = Rows([{"words": ["good"], "tags": ["O"]}]), Rows([{"words": ["film"] * 8, "tags": ["N"] * 8}])
    given = dataclasses.replace(given, train=Rows([*short, *long]), validation=Rows())
    spy = Spy()
    work.fitted(adapted("bert", "tokens", Full()), given, spy, batch=2, micro_batch=1, epochs=1.0, clip=0.0, dropout=False)
    model = adapted("bert", "tokens", Full())
    total = 0.0
    for rows in (short, long):
        batch = given.kind.collate(given.encode(rows, work.processor("bert"), config=model.config), work.processor("bert"))
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        total = total + torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum", ignore_index=-100)
    (total / 9).backward()  # nine words in all
    for name, gradient in spy.seen.gradients[0].items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay, shape", [("linear", lambda d: 1 - d), ("cosine", lambda d: (1 + math.cos(math.pi * d)) / 2), ("none", lambda d: 1.0)])
def test_the_rate_is_the_formula(decay, shape):
    spy = Spy()
    fit = work.fitted(adapted(), work.text_task(validation=0), spy, lr=2e-3, epochs=2.5, warmup=0.25, decay=decay)
    total = 6 + 6 + 3  # 24 examples in batches of 4, and half an epoch
    warm = math.ceil(0.25 * total)
    wanted = [2e-3 * (t + 1) / warm if t < warm else 2e-3 * shape((t - warm) / (total - warm)) for t in range(total)]
    assert fit.steps == total == len(spy.seen.rates)
    assert spy.seen.rates == pytest.approx(wanted)


def test_the_gradient_is_clipped_to_its_norm():
    spy = Spy()
    work.fitted(adapted(method=Full()), work.text_task(), spy, clip=0.01, epochs=1.0)
    norms = [math.sqrt(sum(float((g**2).sum()) for g in gradients.values())) for gradients in spy.seen.gradients]
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


# --- resume ---------------------------------------------------------------------------------------------------------------------


def killed_at(step):
    def report(info):
        if info["step"] == step:
            raise Killed

    return report


@pytest.mark.parametrize("modifiers", [(), (RandomSubset(keep=0.7),)], ids=["plain", "random_subset"])
@pytest.mark.parametrize("step", [1, 4, 6, 7, 11])
def test_a_killed_training_resumes_bit_for_bit(step, modifiers, tmp_path):
    knobs = {"epochs": 3.0, "dropout": True}
    straight = adapted()
    wanted = work.fitted(straight, work.text_task(), *modifiers, **knobs)
    model = adapted()
    with pytest.raises(Killed):
        work.fitted(model, work.text_task(), *modifiers, folder=tmp_path, report=killed_at(step), **knobs)
    again = adapted()
    fit = work.fitted(again, work.text_task(), *modifiers, folder=tmp_path, **knobs)
    assert steps.same(steps.tensors(again), steps.tensors(straight))
    assert fit == wanted
    assert not list(tmp_path.iterdir()), "the checkpoints of a finished phase are gone"


class Steps(Meter):
    """A meter on which a step takes 2 s of time, 3 s of CPU time and 5 J; a process starts anywhere on it."""

    def __init__(self, at):
        self.at = at

    def step(self, info):
        self.at += 1

    def now(self):
        return Moment(0.0, 2.0 * self.at, 3.0 * self.at, 0.0, {"j": 5.0 * self.at})

    def between(self, start, end):
        return Reading(end.counters["j"] - start.counters["j"], "J")


class Silent(Steps):
    """The same without energy."""

    def between(self, start, end):
        return missing("J", "no meter here")


@pytest.mark.parametrize(("first", "second"), [(Steps, Steps), (Silent, Steps), (Steps, Silent), (Silent, Silent)])
def test_a_resumed_training_costs_the_sum_of_its_parts(first, second, tmp_path):
    def fit(meter, report):
        settings = training.Settings(folder=tmp_path, checkpoint_every_s=0.0, report=report)
        with Spending(meter) as spending:
            fitted = training.fit(adapted(), work.text_task(), schedule=schedule, settings=dataclasses.replace(settings, spending=spending))
        return fitted, spending.so_far()

    def killed(info):
        before.step(info)
        if info["step"] == 5:  # the work of this step, after the last checkpoint, is lost and done again
            raise Killed

    schedule, before, after = work.Schedule(lr=1e-3, batch=4, epochs=3.0, dtype="fp32"), first(at=0), second(at=100)
    with pytest.raises(Killed):
        fit(before, killed)
    fitted, spent = fit(after, after.step)
    assert after.at - 100 == fitted.steps - 4, "it went on from the checkpoint of step 4"
    assert (spent.wall_s, spent.cpu_s) == (2.0 * fitted.steps, 3.0 * fitted.steps)
    assert spent.energy.value == (5.0 * fitted.steps if first is second is Steps else None)
    assert spent.energy.reason == {2: "", 1: PARTLY + "no meter here", 0: "no meter here"}[[first, second].count(Steps)]


def test_the_peak_of_two_parts_is_the_higher_and_a_part_without_energy_has_one_reason():
    low, high = (Spent(1.0, 2.0, missing("J", "no meter here"), mb) for mb in (300.0, 400.0))
    assert (low + high).peak_mb == (high + low).peak_mb == 400.0
    measured = Spent(1.0, 2.0, Reading(7.0, "J"), 100.0)
    assert Spent.from_json(measured.to_json()) == measured
    assert (measured + low + measured).energy.reason == PARTLY + "no meter here"


def test_a_truncated_checkpoint_is_an_error_that_says_so(tmp_path):
    with pytest.raises(Killed):
        work.fitted(adapted(), work.text_task(), folder=tmp_path, report=killed_at(4))
    (file,) = tmp_path.glob("checkpoint-*/tensors.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StoreError, match="damaged"):
        work.fitted(adapted(), work.text_task(), folder=tmp_path)


def test_the_checkpoint_of_another_training_is_refused(tmp_path):
    with pytest.raises(Killed):
        work.fitted(adapted(), work.text_task(), folder=tmp_path, report=killed_at(4))
    with pytest.raises(StoreError, match="another training"):
        work.fitted(adapted(method=LoRA(r=2, targets="attention")), work.text_task(), folder=tmp_path)


def test_a_checkpoint_holds_no_pickle(tmp_path):
    with pytest.raises(Killed):
        work.fitted(adapted(), work.text_task(), folder=tmp_path, report=killed_at(4))
    assert {p.name for p in tmp_path.glob("checkpoint-*/*")} == {"tensors.safetensors", "cursor.json"}


CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r}); sys.path.insert(0, {here!r})
import test_training, work, steps, torch
from safetensors.torch import save_file
torch.set_num_threads(1)
from pathlib import Path
kill = int(sys.argv[2])
def report(info):
    if info["step"] == kill:
        os.kill(os.getpid(), signal.SIGKILL)
model = test_training.adapted()
work.fitted(model, work.text_task(), folder=Path(sys.argv[1]), report=report, epochs=3.0)
"""


def test_kill_9_and_resume(tmp_path):
    code = CHILD.format(tests=str(Path(__file__).parents[1]), here=str(Path(__file__).parent))
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path), "9"], env=os.environ, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert list(tmp_path.glob("checkpoint-*"))
    straight, again = adapted(), adapted()
    wanted = work.fitted(straight, work.text_task(), epochs=3.0)
    assert work.fitted(again, work.text_task(), folder=tmp_path, epochs=3.0) == wanted
    assert steps.same(steps.tensors(again), steps.tensors(straight))


# --- stopping -------------------------------------------------------------------------------------------------------------------


class Explodes(training.Events):
    """A loss that is not a number from the third step on."""

    def loss(self, loop, batch, outputs, loss):
        return loss * float("nan") if loop.step == 2 else loss


def test_a_loss_that_is_no_number_stops_with_step_and_recipe():
    spy = Spy()
    spy.seen = Explodes()
    with pytest.raises(Diverged, match=r"the test's recipe: the loss is nan at step 3 of 12.*schedule\(lr=") as error:
        work.fitted(adapted(), work.text_task(), spy)
    assert "learning rate 0.0045;" in str(error.value)


class Worse(training.Events):
    """Wrecks the weights after the first epoch."""

    def epoch_ends(self, loop):
        if loop.epoch >= 1:
            with torch.no_grad():
                for parameter in loop.parameters.values():
                    parameter.fill_(-1.0)


def test_it_stops_early_and_keeps_the_best_epoch(monkeypatch):
    monkeypatch.setattr(training, "PATIENT", 0)
    spy, model = Spy(), adapted(method=Full())
    spy.seen = Worse()
    fit = work.fitted(model, work.text_task(train=24, validation=9), spy, epochs=8.0, lr=2e-2, patience=2)
    scores = [e["validation_score"] for e in fit.epochs]
    assert fit.best_epoch == max(i for i, s in enumerate(scores) if s == max(scores)), "the later of two as good"
    assert len(scores) == scores.index(max(scores)) + 1 + 2 < 8, "an epoch that is only as good is no reason to go on"
    given = work.text_task(validation=9)
    assert score(given, training.predict(model, given, rows=given.validation), rows=given.validation) == max(scores)


def test_short_epochs_do_not_stop_it_before_fifty_steps():
    spy = Spy()
    spy.seen = Worse()
    fit = work.fitted(adapted(method=Full()), work.text_task(train=24, validation=9), spy, epochs=40.0, lr=2e-2, patience=2, batch=8)
    scores, each = [e["validation_score"] for e in fit.epochs], 3  # steps
    assert (len(scores) - 1 - scores.index(max(scores))) * each == 51
