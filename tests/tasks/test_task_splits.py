"""Content hashes decide the splits: not the order, not the neighbors."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

import paretune as pt
from paretune import tasks
from paretune.errors import DataError
from paretune.tasks import Task, splits

SPLITS = ("train", "validation", "test")


def save(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(count: int, classes: int = 2, *, start: int = 0) -> list[dict[str, object]]:
    return [{"text": f"example number {i}", "label": f"class {i % classes}"} for i in range(start, start + count)]


def made(path: Path, rows: list[dict[str, object]], **arguments: object) -> Task:
    return pt.task(save(path, rows), text="text", label="label", **arguments)


def sides(task: Task) -> dict[str, str]:
    return {text: split for split in SPLITS for text in task.texts(split)}


def test_the_order_of_the_rows_changes_nothing(tmp_path: Path) -> None:
    rows = rows_of(300, 7)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert sides(made(tmp_path / "a.jsonl", rows)) == sides(made(tmp_path / "b.jsonl", shuffled))


def test_half_of_a_large_file_lands_on_the_same_sides(tmp_path: Path) -> None:
    whole, half = sides(made(tmp_path / "a.jsonl", rows_of(1000))), sides(made(tmp_path / "b.jsonl", rows_of(500)))
    assert half.items() <= whole.items()


def test_the_shares_are_70_15_15() -> None:
    counts = Counter(splits.by_hash([f"text {i}" for i in range(20_000)]))
    assert counts["test"] / 20_000 == pytest.approx(0.15, abs=0.01)  # 4 standard errors
    assert counts["validation"] / 20_000 == pytest.approx(0.15, abs=0.01)


def test_duplicates_never_cross_whatever_their_label_and_spacing(tmp_path: Path) -> None:
    rows = rows_of(60)
    again = [{"text": f"  {str(row['text']).replace(' ', '   ')}", "label": "class 0"} for row in rows]
    task = made(tmp_path / "a.jsonl", rows + again)
    where: dict[str, set[str]] = {}
    for text, split in sides(task).items():
        where.setdefault(" ".join(text.split()), set()).add(split)
    assert len(where) == 60 and all(len(found) == 1 for found in where.values())


@pytest.mark.parametrize(("count", "classes"), [(60, 2), (60, 5), (24, 8), (90, 3)])
def test_a_small_file_has_every_class_on_every_side(count: int, classes: int, tmp_path: Path) -> None:
    task = made(tmp_path / "a.jsonl", rows_of(count, classes))
    for split in SPLITS:
        assert set(task.rows(split).column("label")) == set(task.labels)
    assert len(task.test) == len(task.validation)
    assert len(task.test) == classes * max(1, round(0.15 * count / classes))


def test_a_further_test_file_is_left_whole_and_leaves_the_training_rows(tmp_path: Path) -> None:
    rows, test = rows_of(200), rows_of(50, start=180)
    task = made(tmp_path / "a.jsonl", rows, test=save(tmp_path / "test.jsonl", test))
    assert list(task.test) == test
    assert len(task.train) + len(task.validation) == 180
    assert "20 train rows dropped: their input also stands in test" in task.notes
    assert not set(task.texts("test")) & (set(task.texts("train")) | set(task.texts("validation")))


def test_two_further_files(tmp_path: Path) -> None:
    further = {"validation": save(tmp_path / "v.jsonl", rows_of(20, start=100)), "test": save(tmp_path / "t.jsonl", rows_of(20, start=200))}
    task = made(tmp_path / "a.jsonl", rows_of(50), **further)
    assert [len(task.rows(split)) for split in SPLITS] == [50, 20, 20]


def test_a_split_column(tmp_path: Path) -> None:
    names = ["train"] * 30 + ["dev"] * 10 + ["Test"] * 10
    rows = [row | {"part": name} for row, name in zip(rows_of(50), names, strict=True)]
    task = made(tmp_path / "a.jsonl", rows, split="part")
    assert [len(task.rows(split)) for split in SPLITS] == [30, 10, 10]
    rows[7]["part"] = "tran"
    with pytest.raises(DataError, match=r"row 8, column 'part'.*did you mean train"):
        made(tmp_path / "b.jsonl", rows, split="part")


def test_a_class_that_only_test_knows_is_refused(tmp_path: Path) -> None:
    test = [*rows_of(10, start=100), {"text": "odd", "label": "new"}]
    with pytest.raises(DataError, match="class 'new'.*no training row"):
        made(tmp_path / "a.jsonl", rows_of(50), test=save(tmp_path / "t.jsonl", test))


def test_too_few_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few different inputs"):
        made(tmp_path / "a.jsonl", [{"text": "same", "label": f"{i % 2}"} for i in range(10)])


def test_a_smaller_subset_lies_within_a_larger_one(tmp_path: Path) -> None:
    rows = rows_of(300)
    task, shuffled = made(tmp_path / "a.jsonl", rows), made(tmp_path / "b.jsonl", random.Random(1).sample(rows, 300))
    small, large = set(task.subset(40).texts("train")), set(task.subset(90).texts("train"))
    assert (len(small), len(large)) == (40, 90) and small < large < set(task.texts("train"))
    assert small == set(shuffled.subset(40).texts("train"))
    assert small != set(task.subset(40, seed=1).texts("train"))
    assert task.subset(40).texts("test") == task.texts("test")
    assert task.subset(10_000) is task


def test_five_folds_test_every_text_once(tmp_path: Path) -> None:
    task = made(tmp_path / "a.jsonl", rows_of(400))
    folds = [task.rotate(k) for k in range(5)]
    assert Counter(text for fold in folds for text in fold.texts("test")) == Counter(list(sides(task)))
    for fold in folds:
        assert len(sides(fold)) == 400
        assert len(fold.test) == pytest.approx(80, abs=35)
    assert len({fold.fingerprint for fold in folds}) == 5


def test_the_fingerprint_follows_data_and_meaning_not_the_path(tmp_path: Path) -> None:
    rows = rows_of(50)
    first, moved = made(tmp_path / "a.jsonl", rows), made(tmp_path / "b.jsonl", rows)
    assert first.fingerprint == moved.fingerprint
    assert first.fingerprint != made(tmp_path / "c.jsonl", [*rows[:-1], rows[-1] | {"label": "class 0"}]).fingerprint
    assert first.fingerprint != made(tmp_path / "a.jsonl", rows, metric="f1").fingerprint
    assert first.fingerprint != first.subset(20).fingerprint


def test_a_definition_makes_the_task_again(tmp_path: Path) -> None:
    task = made(tmp_path / "a.jsonl", rows_of(200)).rotate(2).subset(30, seed=3)
    definition = json.loads(json.dumps(task.define()))
    assert tasks.rebuild(definition).fingerprint == task.fingerprint
    empty = tasks.blank(definition)
    assert (empty.kind, empty.columns, empty.labels, empty.metric) == (task.kind, task.columns, task.labels, task.metric)
    assert len(empty.train) == 0
    assert empty.kind.answer(empty, [0.25, 0.75]) == {"label": "class 1", "p_class 0": 0.25, "p_class 1": 0.75}


def test_one_line_for_people(tmp_path: Path) -> None:
    task = made(tmp_path / "reviews.jsonl", rows_of(60))
    assert task.describe() == "reviews: 44 / 8 / 8 texts, 2 classes, majority 50 %, metric accuracy"
