"""The built-in task: made from the Python that runs, without importing it, without leaking the answer."""

from __future__ import annotations

import platform
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

import paretune as pt
from paretune.errors import DataError
from paretune.tasks import Task, splits, stdlib_topics


@pytest.fixture(scope="module")
def task() -> Task:
    before = set(sys.modules)
    made = pt.task("stdlib-topics")
    assert not {"this", "antigravity", "turtle", "idlelib", "lib2to3"} & (set(sys.modules) - before)
    return made


def all_rows(task: Task) -> list[dict[str, str]]:
    return [row for split in ("train", "validation", "test") for row in task.rows(split)]


def test_what_it_holds(task: Task) -> None:
    rows = all_rows(task)
    assert 3000 < len(rows) < 6500
    assert len(task.labels) == 20
    assert max(Counter(row["module"] for row in rows).values()) / len(rows) < 0.25
    assert all(len(row["text"]) >= 30 for row in rows)
    assert len({row["text"] for row in rows}) == len(rows)
    for split in ("train", "validation", "test"):
        assert set(task.rows(split).column("module")) == set(task.labels)


def test_no_text_names_its_module(task: Task) -> None:
    for row in all_rows(task):
        assert not re.search(rf"\b{re.escape(row['module'])}\b", row["text"]), row


def test_a_text_lands_where_its_hash_says(task: Task) -> None:
    for split in ("train", "validation", "test"):
        keys = [" ".join(text.split()) for text in task.texts(split)]
        assert set(splits.by_hash(keys)) == {split}


def test_the_python_version_is_in_the_fingerprint(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform.python_version() in task.define()["version"]
    assert pt.task("stdlib-topics").fingerprint == task.fingerprint
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    assert pt.task("stdlib-topics").fingerprint != task.fingerprint


def test_only_own_words_are_cut() -> None:
    cut = stdlib_topics._without_name
    assert cut("email.message: the email.message.Message class", ["email", "message"]) == "the class"
    assert cut("Read emails, as xml.sax does.", ["email", "message"]) == "Read emails, as xml.sax does."


def test_no_sources_no_task(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs the sources"):
        stdlib_topics.rows(tmp_path)


def test_it_takes_no_columns() -> None:
    with pytest.raises(DataError, match="built in: it takes no text"):
        pt.task("stdlib-topics", text="text")
