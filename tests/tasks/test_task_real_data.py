"""The real data sets, read as a user would."""

from __future__ import annotations

from pathlib import Path

import pytest

import paretune as pt

CASES = {
    "sst2": ("train.jsonl.gz", {"text": "text", "label": "label", "validation": "validation.jsonl", "test": "test.jsonl"}, "classification", 2),
    "cola": ("train.jsonl.gz", {"text": "text", "label": "label", "metric": "matthews"}, "classification", 2),
    "trec6": ("train.jsonl", {"text": "text", "label": "label", "test": "test.jsonl"}, "classification", 6),
    "banking77": ("train.jsonl.gz", {"text": "text", "label": "label", "test": "test.jsonl"}, "classification", 77),
    "mrpc": ("train.jsonl.gz", {"text": "sentence1,sentence2", "label": "label", "test": "test.jsonl"}, "classification", 2),
    "stsb": ("train.jsonl.gz", {"text": "sentence1,sentence2", "label": "score", "test": "test.jsonl"}, "regression", 0),
    "copa": ("train.jsonl", {"text": "premise,choice1,choice2", "label": "label", "test": "test.jsonl"}, "choice", 0),
    "e2e_nlg": ("train.jsonl.gz", {"text": "mr", "label": "references", "test": "test.jsonl.gz"}, "generation", 0),
    "gsm8k": ("train.jsonl.gz", {"text": "question", "label": "answer", "test": "test.jsonl.gz"}, "generation", 0),
    "books_doyle": ("train.jsonl.gz", {"text": "text", "test": "test.jsonl.gz"}, "language", 0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_data_set(name: str, shared_data: Path) -> None:
    file, arguments, kind, labels = CASES[name]
    further = {k: shared_data / name / v for k, v in arguments.items() if k in ("validation", "test")}
    task = pt.task(shared_data / name / file, **{**arguments, **further})
    assert (task.name, task.kind.name, len(task.labels)) == (name, kind, labels)
    keys = {split: {task.kind.key(task.columns, row) for row in task.rows(split)} for split in ("train", "validation", "test")}
    assert not keys["train"] & keys["test"] and not keys["validation"] & keys["test"] and not keys["train"] & keys["validation"]
    assert all(keys.values())
