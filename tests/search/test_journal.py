"""The journal: nothing of it is lost by kill -9, a torn line is mended, two processes never promise the same rest twice."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest

from paretune.errors import StoreError
from paretune.searches.journal import Entry, Journal, Task, left, total, within


def costing(seconds: float) -> dict[str, float]:
    return {"train_s": seconds, "train_cpu_s": seconds, "train_energy_j": 2 * seconds}


def child(work) -> int:
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    return pid


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "trials.jsonl")


def test_a_trial_is_found_again_as_it_was_told(journal):
    entry = journal.begin(Task("trial", "lora", 100, 3, {"lora.r": 4}, "id"), reserved=costing(5), budget={})
    journal.beat(entry, costing(1))
    ended = journal.end(dataclasses.replace(entry, state="complete", spent=costing(2), score=0.5, metric="accuracy", cost={"stored_mb": 1.0}))
    assert Journal(journal.path).entries() == [ended]
    assert [json.loads(line)["event"] for line in journal.path.read_text().splitlines()] == ["begun", "beat", "ended"]


def test_lines_are_only_added(journal):
    seen = b""
    for k in range(4):
        entry = journal.begin(Task("trial", f"r{k}"), reserved={}, budget={})
        journal.end(dataclasses.replace(entry, state="failed" if k % 2 else "complete", spent=costing(k)))
        assert journal.path.read_bytes().startswith(seen)
        seen = journal.path.read_bytes()
    assert total(journal.entries()) == costing(0 + 1 + 2 + 3)  # failed ones are paid, too


@pytest.mark.parametrize("torn", [b"{", b'{"event": "ended", "num', b"\xff\xfe"])
def test_a_torn_last_line_is_cut_off_before_the_next(journal, torn):
    journal.begin(Task("trial", "a"), reserved={}, budget={})
    with journal.path.open("ab") as file:
        file.write(torn)
    journal.begin(Task("trial", "b"), reserved={}, budget={})
    assert [e.recipe for e in Journal(journal.path).entries()] == ["a", "b"]
    assert all(json.loads(line) for line in journal.path.read_text().splitlines())


def test_damage_within_the_file_is_an_error(journal):
    journal.path.write_text("not json\n")
    with pytest.raises(StoreError, match="damaged"):
        journal.entries()


def test_kill_9_leaves_no_lock_and_no_trial_at_work(journal):
    def work() -> None:
        entry = journal.begin(Task("trial", "killed"), reserved=costing(50), budget={})
        journal.beat(entry, costing(7))
        with journal._locked():  # killed while it holds the lock
            time.sleep(60)

    pid = child(work)
    while not (journal.path.is_file() and b"beat" in journal.path.read_bytes()):
        time.sleep(0.01)
    (at_work,) = journal.entries()
    assert at_work.alive and at_work.charged["train_s"] == 50  # all that is reserved, as long as it may still be spent
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    started = time.monotonic()
    (buried,) = journal.bury()
    assert time.monotonic() - started < 2  # the lock died with its process
    assert (buried.state, buried.charged) == ("killed", costing(7))
    assert journal.bury() == []


def test_processes_never_promise_the_same_rest_twice(journal):
    pids = [child(lambda: [journal.begin(Task("trial", "x"), reserved=costing(10), budget={"train_s": 75}) for _ in range(4)] and time.sleep(5)) for _ in range(3)]
    ends = time.monotonic() + 20
    while time.monotonic() < ends and len(journal.entries()) < 7:
        time.sleep(0.05)
    time.sleep(0.3)
    assert len(journal.entries()) == 7  # twelve asked, seven times 10 fit into 75
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_what_cannot_be_measured_is_no_zero_in_the_sum():
    known = Entry("trial", state="complete", spent=costing(1))
    silent = Entry("trial", state="complete", spent={**costing(1), "train_energy_j": None})
    assert total([known, silent]) == {"train_s": 2, "train_cpu_s": 2, "train_energy_j": None}
    assert left([known], {"train_s": 5.0}) == {"train_s": 4.0}
    assert within(costing(4), {"train_s": 4.0}) and not within(costing(4), {"train_s": 3.9})
