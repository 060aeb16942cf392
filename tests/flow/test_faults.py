"""What goes wrong on real machines: kill -9 at any moment, a full disk, damaged files, two writers, a loss that is no number."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from pareto.synthetic import record, records
from safetensors import SafetensorError

import paretune as pt
from paretune import backbones, checkpoints, flow, inference, phases, runs, store, training
from paretune.cli import flags
from paretune.errors import Diverged, StoreError
from paretune.meters import protocol
from paretune.meters.estimate import Estimate, Power
from paretune.meters.reading import Reading
from paretune.options import Options, Training
from paretune.pareto.front import Front
from paretune.reports import card, page, plot, table

RECIPES = ["lora(r=2)", "lora(r=2) | merge | int8", "full"]
OPTIONS = Options(Training(epochs=3, batch=8, dtype="fp32"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny BERT, 90 rows, and measuring windows so short that they take no time."""
    folder = tmp_path_factory.mktemp("faults")
    tiny.model("bert", "base").save_pretrained(folder / "bert")
    tiny.tokenizer().save_pretrained(folder / "bert")
    rows = [f"the {noun} was so {word} {i},{label}" for i in range(15) for noun in ("movie", "book", "plot") for word, label in (("good", "yes"), ("bad", "no"))]
    (folder / "data.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    short = dataclasses.replace(protocol.QUICK, window_s=0.02, window_n=5, idle_s=0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(protocol.PROTOCOLS, "quick", short)
        patch.setattr(inference, "peak_memory", lambda folders: [Reading(1.0, "MB") for _ in folders])
        patch.setattr("paretune.meters.protocol.same_against_same", lambda call: (0.0, 0.0))
        patch.setattr("paretune.meters.protocol.warm", lambda call, limit_s: 0)
        patch.setattr(training, "Settings", functools.partial(training.Settings, checkpoint_every_s=0.0))
        yield folder


def task(place: Path) -> pt.Task:
    return pt.task(str(place / "data.csv"), text="text", label="label")


def in_a_child(work: Callable[[], object], seconds: float | None) -> bool:
    """Runs the work in a copy of this process and kills that with SIGKILL after so many seconds; did it finish?"""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    ends = time.monotonic() + (seconds if seconds is not None else 120)
    while time.monotonic() < ends:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def killed_until_done(work: Callable[[], object], out: Path, *, kills: int = 12) -> None:
    """Kills the work at random moments until it finishes or was killed so often; then lets it finish."""
    moments, finished = random.Random(0), {}
    for _ in range(kills):
        done = in_a_child(work, moments.uniform(0.1, 1.5))
        for run in store.finished(out):  # every run.json that is there is whole, and none is made twice
            assert finished.setdefault(run.id, run.record["date"]) == run.record["date"]
        if done:
            break
    assert done or in_a_child(work, None)
    assert not list(out.rglob("*.part"))  # the parts of the killed are gone, too


def done_once(out: Path) -> dict[str, tuple[float, list[float] | None, list[int]]]:
    """Per recipe what it answers, and the examples of its phases: of a resumed training each once."""
    return {run.recipe: (run.record["validation_score"], run.per_example(), [p["examples"] for p in run.record["phases"]]) for run in store.finished(out)}


def test_a_frontier_killed_again_and_again_ends_as_if_it_had_not_been(place: Path, tmp_path: Path) -> None:
    whole = flow.frontier(task(place), backbone=str(place / "bert"), recipes=RECIPES, out=tmp_path / "whole", options=OPTIONS)
    out = tmp_path / "killed"
    killed_until_done(lambda: flow.frontier(task(place), backbone=str(place / "bert"), recipes=RECIPES, out=out, resume=True, options=OPTIONS), out)
    assert done_once(out) == done_once(tmp_path / "whole")
    assert len(whole.records) == len(RECIPES)


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(place: Path, tmp_path: Path) -> None:
    pt.run(RECIPES[1], task(place), backbone=str(place / "bert"), out=tmp_path / "whole", options=OPTIONS)
    out = tmp_path / "killed"
    killed_until_done(lambda: pt.run(RECIPES[1], task(place), backbone=str(place / "bert"), out=out, resume=True, options=OPTIONS), out, kills=3)
    assert done_once(out) == done_once(tmp_path / "whole")
    assert all(runs.is_measured(run) for run in store.finished(out))


def test_a_frontier_shares_phases(place: Path, tmp_path: Path) -> None:
    front = flow.frontier(task(place), backbone=str(place / "bert"), recipes=RECIPES, out=tmp_path, options=OPTIONS)
    first = {record["recipe"]: [phase["id"] for phase in record["phases"]] for record in front.records}
    assert first["lora(r=2)"][0] == first["lora(r=2) | merge | int8"][0]
    assert len(list((tmp_path / "phases").glob("*/phase.json"))) == 4  # lora, merge, int8, full
    assert front.ledger.h_trainings == 2
    assert front.ledger.unshared["train_s"] > front.ledger.spent["train_s"]


def test_two_writers_of_one_folder_do_the_work_once(place: Path, tmp_path: Path) -> None:
    work = lambda: flow.frontier(task(place), backbone=str(place / "bert"), recipes=RECIPES, out=tmp_path, resume=True, options=OPTIONS)  # noqa: E731
    other = os.fork()
    if not other:
        try:
            work()
        finally:
            os._exit(0)
    front = work()
    os.waitpid(other, 0)
    assert len(front.records) == len(store.finished(tmp_path)) == len(RECIPES)
    assert not list(tmp_path.rglob("*.part"))
    assert all(runs.is_measured(run) for run in store.finished(tmp_path))


def test_work_begun_before_is_not_taken_over_without_resume(place: Path, tmp_path: Path) -> None:
    pt.run("full", task(place), backbone=str(place / "bert"), out=tmp_path, options=OPTIONS)
    with pytest.raises(StoreError, match="--resume"):
        pt.run("full", task(place), backbone=str(place / "bert"), out=tmp_path, options=OPTIONS)
    again = pt.run("full", task(place), backbone=str(place / "bert"), out=tmp_path, resume=True, options=OPTIONS)
    assert len(store.finished(tmp_path)) == 1 and again.score == store.finished(tmp_path)[0].score


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")])
@pytest.mark.parametrize("writes", [(phases, "save_model"), (checkpoints, "save_file")], ids=["model", "checkpoint"])
def test_a_full_disk_leaves_nothing_half_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, writes: tuple[ModuleType, str]
) -> None:
    def full(*args: object) -> None:
        raise error

    monkeypatch.setattr(*writes, full)
    with pytest.raises(StoreError, match="the disk is full"):
        pt.run("full", task(place), backbone=str(place / "bert"), out=tmp_path, options=OPTIONS)
    assert not [p for name in ("run.json", "phase.json", f"{checkpoints.PREFIX}*", "*.part") for p in tmp_path.rglob(name)]
    monkeypatch.undo()


REPORTS = {
    "frontier.png": lambda path: plot.save(Front(records()), path),
    "frontier.html": lambda path: page.save(Front(records()), path),
    "runs.csv": lambda path: table.save(Front(records()), path),
    "README.md": lambda path: card.save(record("full"), path.parent),
    "frontier.json": lambda path: store.write_json(path, {}),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_on_a_full_disk_is_one_sentence_and_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_text("the one before")
    (tmp_path / f".{name}.{os.getpid()}.part").symlink_to("/dev/full")  # where every write finds no space
    monkeypatch.setattr(store, "_clear", lambda target: None)
    with pytest.raises(StoreError, match=rf"{name}: the disk is full; nothing was kept of it"):
        REPORTS[name](tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "the one before"


def test_a_command_on_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "command_line", lambda: "paretune run full")
    (tmp_path / "command.txt").symlink_to("/dev/full")
    with pytest.raises(StoreError, match="command.txt: the disk is full"):
        flags.Place("minilm", str(tmp_path), resume=False).record_command()


def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StoreError, match="cannot be written"), store.locked(tmp_path / "out" / "runs" / "x"):
        pass


def test_the_part_of_a_killed_writer_goes_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    left = [tmp_path / f".{name}.{pid}.part" for name, pid in (("model", dead), ("model", os.getppid()), ("model.x", dead))]
    for folder in left:
        folder.mkdir()
        (folder / "weights").write_text("half")
    (tmp_path / f".a.json.{dead}.part").write_text("{")
    with store.written(tmp_path / "model") as part:
        (part / "weights").write_text("whole")
    store.write_json(tmp_path / "a.json", {})
    assert sorted(tmp_path.iterdir()) == sorted([*left[1:], tmp_path / "model", tmp_path / "a.json"])
    assert (tmp_path / "model" / "weights").read_text() == "whole"


def test_a_resumed_run_costs_what_both_its_parts_did(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(info: dict[str, object]) -> None:
        time.sleep(0.1)
        if info["step"] == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(phases.energy, "find", lambda *_, **__: Estimate(Power(idle_w=2.0, busy_w=6.0), threads=1))
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        pt.run("lora(r=2)", task(place), backbone=str(place / "bert"), out=tmp_path, options=dataclasses.replace(OPTIONS, report=slow))
    run = pt.run("lora(r=2)", task(place), backbone=str(place / "bert"), out=tmp_path, resume=True, options=OPTIONS)
    both = time.perf_counter() - began
    (phase,) = run.record["phases"]
    assert 0.1 * 11 < phase["train_s"] < both
    assert phase["train_energy_j"] == pytest.approx(2.0 * phase["train_s"] + 4.0 * phase["train_cpu_s"])
    assert run.record["cost"]["train_s"] == phase["train_s"]


def test_too_little_space_is_said_before_the_work_is_lost(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="MB are needed and"):
        store.require_space(tmp_path / "not" / "there" / "yet", 1e12)


@pytest.mark.parametrize("name", ["tensors.safetensors", "cursor.json"])
def test_a_truncated_checkpoint_is_named(place: Path, tmp_path: Path, name: str) -> None:
    stop = {"at": 0}

    def interrupt(info: dict[str, object]) -> None:
        stop["at"] += 1
        if stop["at"] == 12:
            raise KeyboardInterrupt

    options = dataclasses.replace(OPTIONS, report=interrupt)
    with pytest.raises(KeyboardInterrupt):
        pt.run("full", task(place), backbone=str(place / "bert"), out=tmp_path, options=options)
    (file,) = tmp_path.rglob(f"{checkpoints.PREFIX}*/{name}")
    assert file.parent.name.endswith("0011")  # one after each step, within an epoch, too
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(StoreError, match=f"{file.parent.name}.*damaged"):
        pt.run("full", task(place), backbone=str(place / "bert"), out=tmp_path, resume=True, options=OPTIONS)


def test_a_damaged_run_is_named(place: Path, tmp_path: Path) -> None:
    run = pt.run("full", task(place), backbone=str(place / "bert"), out=tmp_path, options=OPTIONS)
    weights = run.folder / "model" / "model.safetensors"
    weights.unlink()  # the file is shared with phases/, and must not be written through
    weights.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises((StoreError, SafetensorError)):
        run.predict(["the movie was good"])
    (run.folder / "run.json").write_text(json.dumps(run.record)[:100])
    with pytest.raises(StoreError, match="damaged"):
        store.Run.read(run.folder)


def test_a_loss_that_is_no_number_stops_with_step_and_recipe(place: Path, tmp_path: Path) -> None:
    recipe = "full + schedule(lr=1e30, clip=0, epochs=3, dtype=\"fp32\")"
    with pytest.raises(Diverged, match=r"full.*the loss is nan at step \d+"):
        pt.run(recipe, task(place), backbone=str(place / "bert"), out=tmp_path)
    assert not list(tmp_path.rglob("run.json"))


def test_weights_that_are_not_the_known_ones_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, folder, _, hub_id = backbones.PACKAGED["minilm"]
    monkeypatch.setitem(backbones.PACKAGED, "minilm", (package, folder, "0" * 64, hub_id))
    backbones.find.cache_clear()
    with pytest.raises(pt.BackboneError, match="not the known"):
        backbones.find("minilm")
    backbones.find.cache_clear()


assert torch.get_num_threads() == 1  # a fork of a process whose thread pool has started would hang
