"""The journal of a search: an append-only file of what every trial was, cost and became, failed, cut and killed ones too.

A line is one JSON object: `begun` (with what the trial may spend at most), `beat` (what it has spent so far), `ended`. Lines are only ever added,
under a lock that dies with its process; a line that a killed process left half-written is cut off before the next one is added.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from paretune import store

SPENDABLE = ("train_s", "train_cpu_s", "train_energy_j")  # as in a run's cost; here of the whole process: opening, training, scoring, measuring
FOUND = ("state", "spent", "reason", "run", "metric", "score", "cost", "phases")  # of an entry, what only its end tells
Spent = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be done: a recipe on so many training rows; or the timing or the measuring of a search, without a recipe."""

    kind: str  # "trial", "confirm", "timing" or "measure"
    recipe: str = ""
    rows: int = 0
    seed: int = 0
    params: dict[str, Any] = dataclasses.field(default_factory=dict)  # what was drawn
    key: str = ""  # the id of the run that it comes to


@dataclasses.dataclass(frozen=True)
class Entry(Task):
    """A task that was begun, and what became of it."""

    number: int = 0
    owner: dict[str, Any] = dataclasses.field(default_factory=dict)
    reserved: Spent = dataclasses.field(default_factory=dict)
    state: str = "begun"  # then complete, failed, cut or killed
    spent: Spent = dataclasses.field(default_factory=dict)
    reason: str = ""
    run: str = ""  # the id of its run, once that is finished
    metric: str = ""
    score: float | None = None  # on validation
    cost: dict[str, Any] = dataclasses.field(default_factory=dict)
    phases: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def record(self) -> dict[str, Any]:
        """In the shape of a run's record, for dominance and budgets: the score is that on validation."""
        return {"recipe": self.recipe, "metric": self.metric, "score": self.score, "validation_score": self.score, "cost": self.cost, "phases": self.phases}

    @property
    def alive(self) -> bool:
        """Is its process still at it?"""
        return self.state == "begun" and alive(self.owner)

    @property
    def charged(self) -> Spent:
        """What counts against the budget: of a trial at work all that is reserved for it, of a killed one what it had spent at its last beat."""
        if not self.alive:
            return self.spent
        return {name: max(self.reserved.get(name) or 0.0, self.spent.get(name) or 0.0) for name in SPENDABLE}


def me() -> dict[str, Any]:
    """The process that works on a trial, told from later ones of the same number."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def alive(owner: Mapping[str, Any]) -> bool:
    """Does that process run? Of a process on another machine nothing is known here, and yes is assumed."""
    if owner["host"] != socket.gethostname():
        return True
    try:
        return bool(psutil.Process(owner["pid"]).create_time() == owner["started"])
    except psutil.NoSuchProcess:
        return False


class Journal:
    """The entries of a search in `path`; several processes may write it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[Entry]:
        """All trials in the order in which they began."""
        found: dict[int, Entry] = {}
        for row in self._rows():
            number = row.pop("number")
            row.pop("event"), row.pop("date")
            found[number] = dataclasses.replace(found[number], **row) if number in found else Entry(number=number, **row)
        return list(found.values())

    def begin(self, task: Task, *, reserved: Spent, budget: Mapping[str, float]) -> Entry | None:
        """Begins a task if what is reserved for it fits what the budget leaves, and else gives None; two processes never promise the same rest twice."""
        with self._locked():
            entries = self.entries()
            if not within(reserved, left(entries, budget)):
                return None
            entry = Entry(**dataclasses.asdict(task), number=len(entries), owner=me(), reserved=reserved)
            self._add("begun", {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry) if f.name not in FOUND})
            return entry

    def beat(self, entry: Entry, spent: Spent) -> None:
        """What a trial at work has spent so far."""
        with self._locked():
            self._add("beat", {"number": entry.number, "spent": spent})

    def end(self, entry: Entry) -> Entry:
        """How a trial ended, with all that is known of it."""
        with self._locked():
            self._add("ended", {"number": entry.number, **{name: getattr(entry, name) for name in FOUND}})
        return entry

    def bury(self) -> list[Entry]:
        """The trials whose process was killed; from now on their state says so."""
        dead = [entry for entry in self.entries() if entry.state == "begun" and not entry.alive]
        return [self.end(dataclasses.replace(entry, state="killed", reason="its process was killed")) for entry in dead]

    def _rows(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in _whole_lines(self.path).splitlines()]
        except ValueError as error:
            raise store.StoreError(f"{self.path} is damaged ({error}); move it away and search again in another --out") from None

    def _add(self, event: str, facts: dict[str, Any]) -> None:
        row = {"event": event, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"), **facts}
        with store.writing(self.path), self.path.open("ab") as file:
            file.truncate(len(_whole_lines(self.path)))
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with store.locked(self.path):
            yield


def _whole_lines(path: Path) -> bytes:
    """What the file holds, without the last line where a killed process left it half-written."""
    held = path.read_bytes() if path.is_file() else b""
    return held[: held.rfind(b"\n") + 1]


def total(entries: Sequence[Entry]) -> Spent:
    """What entries were charged together; None of what any of them could not measure."""
    sums: Spent = {}
    for name in SPENDABLE:
        values = [entry.charged.get(name, 0.0) for entry in entries]
        sums[name] = None if None in values else sum(values)
    return sums


def left(entries: Sequence[Entry], budget: Mapping[str, float]) -> dict[str, float]:
    """What a budget leaves after these entries."""
    spent = total(entries)
    return {name: limit - (spent[name] or 0.0) for name, limit in budget.items()}


def within(asked: Spent, rest: Mapping[str, float]) -> bool:
    """Is no more asked than there is?"""
    return all((asked.get(name) or 0.0) <= bound for name, bound in rest.items())
