"""The page about windows says "met" only of what was measured and is so."""

from __future__ import annotations

import json

import pytest
from torch.nn import functional as F

from benchmarks import cells, windows


def record(what, tokens, times, *, backward=True, threads=2):
    seconds = {windows.PLAIN: [1.0, 1.0], windows.AGAIN: [1.0, 1 / 1.05], windows.LONGFORMER: [1 / times, 1 / times]}
    return {"what": what, "tokens": tokens, "backward": backward, "threads": threads, "machine": "this", "rounds": 2, "seconds": seconds}


def verdicts(found):
    return {what: verdict for what, _, _, _, verdict in windows.aims(found, 2)}


def test_an_aim_is_met_by_what_was_measured_alone():
    assert set(verdicts([]).values()) == {"-"}
    found = verdicts([record("attention", 4096, 1.9), record("attention", 8192, 4.0), record("attention", 16384, 9.5, threads=1)])
    assert list(found.values()) == ["met", "not met", "-", "-", "not known"]


def test_never_slower_is_known_once_every_length_was_measured():
    alone = [record("attention", n, 1.0, backward=backward) for n in windows.LENGTHS for backward in (False, True)]
    steps = [record("step", n, 0.97) for n in windows.STEPS]
    at_any = "`longformer` at any length"
    assert verdicts([*alone, *steps[1:]])[at_any] == "not known"
    assert verdicts([*alone, *steps])[at_any] == "met"
    assert verdicts([*alone[1:], *steps, record("attention", 128, 0.9, backward=False)])[at_any] == "not met"


def test_linear_memory_is_told_from_quadratic():
    def found(power):
        return [{"what": f"memory of {what}", "tokens": n, "mb": {windows.LONGFORMER: n**power}} for what in ("attention", "step") for n in windows.LENGTHS]

    assert [row[-1] for row in windows.memories(found(1))[1]] == ["met", "met"]
    assert [row[-1] for row in windows.memories(found(2))[1]] == ["not met", "not met"]
    assert [row[-2] for row in windows.memories(found(1)[:3])[1]] == [cells.NOT_RUN, cells.NOT_RUN]


def test_pays_from_the_length_behind_the_last_that_is_slower():
    found = [record("step", n, times) for n, times in ((512, 1.1), (1024, 1.04), (2048, 1.2), (4096, 2.0))]
    assert windows.pays_from(found, "step", threads=2) == "2,048"
    assert windows.pays_from(found[:2], "step", threads=2) == "not up to 1,024", "within what all pairs differ by from themselves"
    assert windows.pays_from([], "step", threads=2) == cells.NOT_RUN


@pytest.mark.parametrize("what", ["attention", "step"])
def test_every_way_computes_attention(what, monkeypatch):
    calls, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **how: calls.append(args[0].shape) or kernel(*args, **how))
    ways = dict(windows.attentions(300, True) if what == "attention" else windows.trainings(300))
    assert {windows.PLAIN, windows.AGAIN, windows.LONGFORMER, windows.CHUNKS} <= set(ways)
    for name, way in ways.items():
        calls.clear()
        way()
        assert len(calls) >= (1 if what == "attention" else 4), name


def test_the_page_is_made_of_its_file():
    assert windows.PAGE.read_text() == windows.page(json.loads(windows.FILE.read_text())), "run `python -m benchmarks.windows --table`"
