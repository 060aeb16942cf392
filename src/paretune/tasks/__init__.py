"""Tasks: data in, three splits, a metric. `pt.task("reviews.csv", text="review", label="stars")`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paretune.errors import DataError
from paretune.tasks import folders, loading, metrics, reading
from paretune.tasks.columns import bad_cell
from paretune.tasks.definition import Row, Rows, Task
from paretune.tasks.kinds import Bad, Kind, kind_class

__all__ = ["Kind", "Row", "Rows", "Task", "blank", "inputs", "per_example", "rebuild", "redrawn", "score", "task"]


def task(
    source: str | Path,
    *,
    text: str | None = None,
    label: str | None = None,
    kind: str | None = None,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    split: str | None = None,
    metric: str | None = None,
) -> Task:
    """A task from data.

    Args:
        source: a csv, tsv, jsonl, json, parquet or txt file (also .gz); a folder saved by `datasets`; a folder of images or wav files,
            one sub-folder per class; a hub id (`"owner/name"`, with a configuration `"owner/name:config"`); or a name of `built_in.TASKS`, as "stdlib-topics".
        text: the input column; "a,b" for a pair; "question,choices" or "question,choice1,choice2" for multiple choice.
        label: the answer's column; several columns of 0 and 1 make a multi-label task; none makes language modeling.
        kind: a name of `tasks.kinds.KINDS`; read off the values where not stated.
        validation: a further file; else made from the source.
        test: a further file; else made from the source. Training rows whose input stands in it are dropped.
        split: the column that holds "train", "validation" or "test".
        metric: a name of `tasks.metrics.names()`; else the kind's own.

    Raises:
        DataError: for data that cannot be used; names row, column and value.
    """
    further = {name: None if path is None else str(path) for name, path in (("validation", validation), ("test", test))}
    return loading.load(loading.Request(str(source), text=text, label=label, kind=kind, split=split, metric=metric, **further))


def rebuild(definition: dict[str, Any]) -> Task:
    """The task of a run.json again, from its source; compare the fingerprints to be sure that the data is the same."""
    build = dict(definition["build"])
    steps = build.pop("then", [])
    made = task(build.pop("source"), **build)
    for step, *values in steps:
        made = made.subset(values[0], seed=values[1]) if step == "subset" else made.rotate(values[0], of=values[1])
    return made


def blank(definition: dict[str, Any]) -> Task:
    """The task of a run.json without its rows: all that predicting needs."""
    options = {k: v for k, v in definition["options"].items() if k != "kind"}
    return Task(
        definition["name"], kind_class(definition["kind"])(**options), dict(definition["columns"]), tuple(definition["labels"]), definition["metric"],
        train=Rows(), validation=Rows(), test=Rows(), source=definition["source"], version=definition["version"],
        notes=tuple(definition["notes"]), build=dict(definition["build"]),
    )  # fmt: skip


def inputs(task: Task, path: str | Path) -> Iterator[Row]:
    """The rows of a new file (or the images or sounds of a folder), one after the other, with the task's input columns; a label column is not needed.

    Raises:
        DataError: as `task`.
    """
    path = Path(path)
    numbered = enumerate(folders.media_files(path), start=1) if path.is_dir() else reading.stream(path)
    for place, (number, raw) in enumerate(numbered):
        if place == 0:
            for column in task.kind.input_columns(task.columns):
                reading.require(column, "input", columns=list(raw), name=path.name)
        try:
            yield task.kind.read(task.columns, raw | {"": str(path.parent)}, label=False)
        except Bad as bad:
            raise bad_cell(bad, f"{path.name}, row {number}") from None


def score(task: Task, predictions: Sequence[Any], *, rows: Sequence[Row]) -> float:
    """The task's metric over `predictions`, as `kind.predict` gave them for `rows`, in the same order."""
    _same_length(predictions, rows, task)
    truth, predicted = task.kind.compare(task, predictions, rows=rows)
    return metrics.evaluate(task.metric, truth, predicted=predicted, scores=task.kind.scores(predictions))


def per_example(task: Task, predictions: Sequence[Any], *, rows: Sequence[Row]) -> list[float] | None:
    """The score of each row, as 1.0 for a right answer and 0.0 for a wrong one; None for a metric that is not the mean over rows."""
    if task.kind.name == "tokens":
        return None  # texts of several words weigh by their length
    truth, predicted = _by_row(task, predictions, rows=rows)
    return metrics.each(task.metric, truth, predicted=predicted)


def redrawn(task: Task, predictions: Sequence[Any], *, rows: Sequence[Row]) -> metrics.Redrawn | None:
    """The task's metric as a function of the numbers of drawn rows, as a bootstrap needs it: see `metrics.redrawn`."""
    truth, predicted = _by_row(task, predictions, rows=rows)
    return metrics.redrawn(task.metric, truth, predicted=predicted, scores=task.kind.scores(predictions))


def _by_row(task: Task, predictions: Sequence[Any], *, rows: Sequence[Row]) -> tuple[list[list[Any]], list[list[Any]]]:
    """(truth, predicted) of each row: one answer, or one for each word."""
    _same_length(predictions, rows, task)
    pairs = [task.kind.compare(task, [p], rows=rows[i : i + 1]) for i, p in enumerate(predictions)]
    return [truth for truth, _ in pairs], [predicted for _, predicted in pairs]


def _same_length(predictions: Sequence[Any], rows: Sequence[Row], task: Task) -> None:
    if not predictions:
        raise DataError(f"{task.name}: there is nothing to score: no rows")
    assert task.kind.in_blocks or len(predictions) == len(rows), (len(predictions), len(rows))
