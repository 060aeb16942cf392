"""`make demo` in a reduced form: its own command line, on the real model and the real text, with two recipes and few examples."""

from __future__ import annotations

import csv
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from paretune import cli, tasks
from paretune.meters import protocol, throughput

MAKEFILE = Path(__file__).parents[2] / "Makefile"
FEWER = ["--recipe", "head", "--recipe", "head | vocabulary | int8", "--max-train", "96", "--epochs", "1"]


def demo() -> list[str]:
    """The arguments that `make demo` gives to paretune, without the time budget, which times the machine."""
    recipe = MAKEFILE.read_text().split("\ndemo:")[1].split("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(re.search(r"bin/paretune (.*)", recipe)[1].replace("$(DEMO_OUT)", "OUT"))
    at = words.index("--time-budget")
    return words[:at] + words[at + 2 :]


def test_the_demo_draws_the_frontier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(protocol.PROTOCOLS, "quick", dataclasses.replace(protocol.QUICK, window_s=0.2, window_n=20, idle_s=0.05))
    most = throughput.best_throughput
    monkeypatch.setattr(throughput, "best_throughput", lambda run, largest, seconds, limit_s: most(run, largest=2, seconds=0.05))
    whole = tasks.task
    few = lambda *given, **stated: _cut(whole(*given, **stated))  # noqa: E731
    monkeypatch.setattr(tasks, "task", few)
    with pytest.raises(SystemExit) as ended:
        cli.main([str(tmp_path) if word == "OUT" else word for word in demo()] + FEWER)
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert {row["recipe"] for row in rows} == {"head", "head | vocabulary | int8"}
    small, large = sorted(rows, key=lambda row: float(row["stored_mb"]))
    assert small["recipe"] == "head | vocabulary | int8" and float(large["stored_mb"]) > 4 * float(small["stored_mb"])
    assert all(float(row["score"]) > 0.2 for row in rows)  # the majority class is 0.16; a head sees features that tell topics apart
    assert all(float(row["peak_memory_mb"]) > 20 for row in rows)
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert all(row["recipe"] in (tmp_path / "frontier.html").read_text() for row in rows)
    assert "under stored_mb <= 20: head | vocabulary | int8" in said.out and "estimated" in said.out


def _cut(task: tasks.Task) -> tasks.Task:
    """Fewer rows to score: what the full splits would add is time."""
    return dataclasses.replace(task, validation=task.validation[:64], test=task.test[:128])
