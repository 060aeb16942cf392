"""How examples are grouped, and what of it shows: nothing but time and memory."""

import math

import pytest
import torch
import work

from paretune import batches, surgery, training
from paretune.methods.adapters.full import Full
from paretune.methods.modifiers.maml import MAML
from paretune.methods.modifiers.schedule import Schedule


def test_parts_hold_every_index_once_and_no_more_tokens_than_caches():
    lengths = [5, 450, 600, 1500, 40, 350, 7, 30]
    parts = batches.parts([7, 3, 1, 0, 5, 2], lengths)
    assert sorted(i for part in parts for i in part) == [0, 1, 2, 3, 5, 7]
    assert [3] in parts, "a longer example stands alone"
    assert all(len(part) * max(lengths[i] for i in part) <= batches.CACHED for part in parts if part != [3])
    assert len(parts) == 4


def test_a_batch_cut_to_caches_learns_what_the_whole_one_does(monkeypatch):
    losses = []
    for tokens in (10**9, 20):
        monkeypatch.setattr(batches, "CACHED", tokens)
        model = work.ready("bert")
        surgery.attach(model, [Full()])
        losses.append([e["loss"] for e in work.fitted(model, work.text_task(), batch=8, dropout=False).epochs])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_batches_come_in_few_widths_and_no_wider_than_the_longest_text():
    assert [batches.width([3, n], most=10_000) for n in (4, 5, 64, 65, 128, 129, 300)] == [4, 8, 64, 72, 128, 144, 304]
    assert batches.width([3, 37], most=38) == 38
    assert batches.width([5], most=5) == 5, "a text alone has no padding"
    assert len({batches.width([n], most=10_000) for n in range(1, 513)}) == 48


def test_a_batch_is_padded_to_its_width_and_learns_the_same(monkeypatch):
    losses, widths = [], []
    for width in (batches.width, lambda lengths, most: max(lengths)):
        monkeypatch.setattr(batches, "width", width)
        model = work.ready("bert")
        surgery.attach(model, [Full()])
        task = work.text_task()
        model.register_forward_pre_hook(lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
        losses.append([e["loss"] for e in work.fitted(model, task, batch=3, dropout=False).epochs])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(set(widths[: len(widths) // 2])) < len(set(widths[len(widths) // 2 :]))


def test_a_budget_of_tokens_makes_steps_of_like_size_and_visits_each_example_once():
    random, lengths = torch.Generator().manual_seed(3), torch.randint(3, 60, (500,), generator=torch.Generator().manual_seed(2)).tolist()
    for pack in (False, True):
        schedule = Schedule(tokens=400, pack=pack)
        made = batches.epoch_batches(lengths, None, schedule=schedule, random=random)
        sizes = [sum(lengths[i] for i in batch) for batch in made]
        assert sorted(i for batch in made for i in batch) == list(range(500))
        assert len(made) == batches.steps(lengths, None, schedule=schedule) == math.ceil(sum(lengths) / 400)
        assert max(abs(size - sum(lengths) / len(made)) for size in sizes) <= 60
        padded = sum(batches.passed(batch, lengths) for batch in made)
        assert padded > 1.3 * sum(lengths) if pack else padded < 1.1 * sum(lengths), "packed texts are not sorted"
    assert sorted(batches.epoch_batches(lengths, [7, 9], schedule=Schedule(tokens=5), random=random)) == [[7], [9]]


def test_a_training_takes_the_steps_of_its_budget_and_tells_of_real_tokens():
    model, task, told = work.ready("bert"), work.text_task(), []
    surgery.attach(model, [Full()])
    fitted = work.fitted(model, task, tokens=40, epochs=1.0, report=told.append)
    tokens = [len(e["input_ids"]) for e in training.encode(task, task.train, model=model)]
    assert fitted.steps == math.ceil(sum(tokens) / 40) and fitted.examples == len(tokens)
    assert told[-1]["tokens_per_s"] / told[-1]["examples_per_s"] == pytest.approx(sum(tokens) / len(tokens))


def test_predictions_do_not_depend_on_the_cut(monkeypatch):
    model, task = work.ready("bert"), work.text_task()
    whole = training.predict(model, task, rows=task.train)
    monkeypatch.setattr(batches, "CACHED", 20)
    for a, b in zip(whole, training.predict(model, task, rows=task.train), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_the_epoch_is_chosen_on_a_quarter_of_the_training_examples():
    found = [training.watched_of(work.text_task(train=train, validation=600)) for train in (24, 1600)]
    assert found == [256, 400]
    assert training.watched_of(work.text_task(train=24, validation=9)) == 9, "no more than there are"


def test_an_episode_is_never_cut(monkeypatch):
    monkeypatch.setattr(batches, "CACHED", 1)
    seen = []
    monkeypatch.setattr(training.Loop, "_collate", lambda loop, indices, own=training.Loop._collate: seen.append(len(indices)) or own(loop, indices))
    model = work.ready("bert")
    surgery.attach(model, [Full()])
    work.fitted(model, work.text_task(train=48), MAML(ways=2, shots=2, queries=2), epochs=1.0)
    assert set(seen[1:]) == {8}, "two classes with two examples to learn from and two to answer; the first is the probe's"
