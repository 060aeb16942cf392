"""Many rows: a faster way of answering takes over where it pays and answers alike, and else nothing changes."""

from __future__ import annotations

import contextlib
import csv

import pytest
import tiny
import torch

from paretune import flow, inference, options, phases, registry, runs, serving, tasks
from paretune.cli import main
from paretune.errors import Incompatible
from paretune.serving import Server, Way

ROWS = [f"row {n}" for n in range(100)]
ONCE = options.Options(training=options.Training(epochs=1, batch=8))


class Clock:
    """A clock that a way of answering moves on."""

    def __init__(self):
        self.now = 0.0
        self.asked = []

    def way(self, name, seconds, *, answer=lambda row: row, extra=0.0, left=None):
        def answers(rows):
            self.now += seconds * len(rows)
            self.asked.append((name, len(rows)))
            return [{"label": answer(row), "p": 0.5} for row in rows]

        def ready(entered):
            entered.callback((left if left is not None else []).append, name)
            return answers

        return answers, Way(name, ready, extra)

    def server(self, *ways, told):
        return Server(self.way("saved", 1.0)[0], ways=[way for _, way in ways], told=told.append, clock=lambda: self.now)


def test_a_trial_waits_until_it_costs_a_tenth_of_the_time_spent():
    clock, told = Clock(), []
    with clock.server(clock.way("quick", 0.5, extra=500.0), told=told) as server:
        for _ in range(15):
            assert server(ROWS) == [{"label": row, "p": 0.5} for row in ROWS]
        assert not told and {name for name, _ in clock.asked} == {"saved"}, "0.1 x 1,500 s is not more than 100 s and 500 s for making it ready"
        for _ in range(46):
            server(ROWS)
        assert told == ["from row 6,101 on quick, 2.0 times as fast: 100 of 100 answers stay within 0.01"]
        assert clock.asked[-3:] == [("saved", 100), ("quick", serving.FIRST), ("quick", 100)]
        server(ROWS)
        assert clock.asked[-1] == ("quick", 100)


@pytest.mark.parametrize("seconds, answer", [(0.95, lambda row: row), (0.1, lambda row: "other" if row in ROWS[:2] else row)], ids=["not faster", "otherwise"])
def test_a_way_that_is_not_faster_or_answers_otherwise_is_left(seconds, answer):
    clock, told, left = Clock(), [], []
    with clock.server(clock.way("another", seconds, answer=answer, left=left), told=told) as server:
        for _ in range(30):
            server(ROWS)
    assert not told and left == ["another"] and clock.asked[-1] == ("saved", 100)
    assert [name for name, _ in clock.asked].count("another") == 2, "it is tried once"


def test_one_answer_in_a_hundred_may_differ_and_what_a_way_entered_stands_until_the_end():
    clock, told, left = Clock(), [], []
    with clock.server(clock.way("quick", 0.1, answer=lambda row: "other" if row == ROWS[0] else row, left=left), told=told) as server:
        for _ in range(20):
            server(ROWS)
        assert "99 of 100" in told[0] and not left
    assert left == ["quick"]


@pytest.mark.parametrize("error", [Incompatible("no graph has that"), RuntimeError("out of memory"), OSError("no space left")], ids=str)
def test_a_way_that_fails_is_told_and_passed_over(error):
    def refused(entered):
        raise error

    clock, told = Clock(), []
    with clock.server((None, Way("none", refused)), clock.way("quick", 0.1), told=told) as server:
        for _ in range(20):
            server(ROWS)
    assert told[0] == f"none: not here ({error}); answers go on as before" and "quick" in told[1] and len(told) == 2


@pytest.mark.parametrize("again, same", [({"label": "a", "p": 0.508}, True), ({"label": "a", "p": 0.52}, False), ({"label": "b", "p": 0.5}, False)])
def test_alike_is_the_same_label_and_nearly_the_same_numbers(again, same):
    assert serving.alike({"label": "a", "p": 0.5}, again) is same


def test_numbers_as_labels_may_differ_by_a_share_of_their_spread():
    answers = [{"label": 1000.0}, {"label": 1002.0}]
    assert serving.spread(answers) == 1.0 and serving.spread([{"label": "a", "p": 0.5}]) == 1.0
    assert serving.alike(answers[0], {"label": 1000.009}, spread=1.0) and not serving.alike(answers[0], {"label": 1000.02}, spread=1.0)
    assert serving.alike({"perplexity": 1000.0}, {"perplexity": 1009.0}) and not serving.alike({"perplexity": 1000.0}, {"perplexity": 1011.0})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a tiny BERT."""
    place = tmp_path_factory.mktemp("place")
    tiny.model("bert", "base").save_pretrained(place / "bert")
    tiny.tokenizer().save_pretrained(place / "bert")
    with (place / "films.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["text", "label"])
        rows.writerows([f"the {noun} was {word} {n}", label] for n, noun in enumerate(["film", "book", "plot"] * 4) for word, label in (("good", 1), ("bad", 0)))
    task = tasks.task(str(place / "films.csv"), text="text", label="label")
    return runs.make(flow._plan(flow.as_recipe("lora(r=2)"), task, str(place / "bert"), place / "out", 0, ONCE), "lora(r=2)")


def test_the_other_ways_of_a_run_answer_alike_and_leave_its_model_as_it_was(run):
    task = inference.task_of(run)
    model = inference.open_model(run.model, task)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{"text": text} for text in ("the good film", "a bad plot", "the book")]
    answers = serving.plain(model, task)(rows)
    ways = serving.ways(run, model, task=task)
    assert [way.name for way in ways] == ["in bf16", "as a graph of onnxruntime"]
    for way in ways:
        with contextlib.ExitStack() as entered:
            again = way.ready(entered)(rows)
            assert all(map(serving.alike, answers, again))
            assert again != answers or way.name != "in bf16", "six digits show its rounding"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert serving.plain(model, task)(rows) == answers


@pytest.mark.parametrize("recipe", ["cast", "int8"])
def test_other_formats_have_no_other_ways(run, recipe):
    task = inference.task_of(run)
    model = phases.shrink(phases.shrink(inference.open_model(run.model, task), registry.get("merge")()), recipe)
    assert serving.ways(run, model, task=task) == []


def test_the_command_line_says_what_took_over_and_exact_keeps_to_the_model(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "new.csv").write_text("text\n" + "the good film\na bad plot\n" * 40)
    monkeypatch.setattr(inference, "CHUNK", 8)
    monkeypatch.setattr(serving, "SHARE", 2.0)
    monkeypatch.setattr(serving, "FASTER", 0.0)
    monkeypatch.setattr(serving, "ways", lambda run, model, *, task: [Way("by magic", lambda entered: serving.plain(model, task))])
    said = {}
    for flags in ((), ("--exact",)):
        with pytest.raises(SystemExit, match="0"):
            main(["predict", str(run.folder), str(tmp_path / "new.csv"), "--out", str(tmp_path / "answers.csv"), *flags])
        said[flags] = capsys.readouterr().err
        assert len((tmp_path / "answers.csv").read_text().splitlines()) == 81
    assert "from row 9 on by magic" in said[()] and "by magic" not in said["--exact",]
