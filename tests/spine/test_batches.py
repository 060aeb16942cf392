"""How examples are grouped, and what of it shows: nothing but time and memory."""

import pytest
import work

from paretune import batches, surgery, training
from paretune.methods.adapters.full import Full
from paretune.methods.modifiers.maml import MAML


def test_parts_hold_every_index_once_and_no_more_tokens_than_caches():
    lengths = [5, 900, 1200, 3000, 40, 700, 7, 60]
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
