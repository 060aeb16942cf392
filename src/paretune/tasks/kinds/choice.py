"""Which of several continuations or answers fits a text."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from paretune.errors import DataError
from paretune.tasks.kinds.base import Bad, Batch, Encoding, Kind, cell, check_text, list_of, missing, pad, text_of, tokenize

if TYPE_CHECKING:
    from paretune.tasks.definition import Row, Rows, Task


@dataclasses.dataclass(frozen=True)
class Choice(Kind):
    """One score for each choice, a softmax over them; cross-entropy. Every row has the same number of choices.

    The label is the place of the right choice from 0, its letter (A is the first), or its text.
    """

    count: int = 0

    name: ClassVar[str] = "choice"
    auto_class: ClassVar[str] = "AutoModelForMultipleChoice"
    metric: ClassVar[str] = "accuracy"

    def input_columns(self, columns: Mapping[str, str]) -> list[str]:
        return [columns["text"], *columns["choices"].split(",")]

    def read(self, columns: Mapping[str, str], raw: Mapping[str, Any], *, label: bool = True) -> Row:
        column = columns["choices"]
        names = column.split(",")
        choices = [text_of(name, raw) for name in names] if len(names) > 1 else [check_text(column, c) for c in list_of(column, raw, separators="|")]
        if len(choices) < 2 or any(missing(choice) for choice in choices):
            raise Bad(column, raw.get(column), "two or more choices were expected, none of them empty")
        row = {columns["text"]: text_of(columns["text"], raw), column: choices}
        if label:
            row[columns["label"]] = _place(columns["label"], cell(columns["label"], raw), choices)
        return row

    def fitted(self, columns: Mapping[str, str], rows: Sequence[Row]) -> Choice:
        counts = {len(row[columns["choices"]]) for row in rows}
        if len(counts) > 1:
            raise DataError(f"column {columns['choices']!r}: every row needs the same number of choices, and here they have {sorted(counts)}")
        return dataclasses.replace(self, count=counts.pop())

    def texts(self, columns: Mapping[str, str], row: Row) -> list[str]:
        return [row[columns["text"]], *row[columns["choices"]]]

    def key(self, columns: Mapping[str, str], row: Row) -> str:
        return "\x1f".join(" ".join(text.split()) for text in self.texts(columns, row))

    def encode(self, task: Task, rows: Sequence[Row], *, processor: Any, max_length: int | None = None, config: Any = None) -> list[Encoding]:
        """Each value of an encoding is a list with one entry for each choice."""
        choices = [row[task.columns["choices"]] for row in rows]
        first = [row[task.columns["text"]] for row, own in zip(rows, choices, strict=True) for _ in own]
        flat = iter(tokenize(processor, [first, [choice for own in choices for choice in own]], max_length=max_length))
        encodings = []
        for own in choices:
            parts = [next(flat) for _ in own]
            encodings.append({name: [part[name] for part in parts] for name in parts[0]})
        return self.add_labels(task, rows, encodings=encodings)

    def label_value(self, task: Task, label: int) -> int:
        return label

    def collate(self, encodings: Sequence[Encoding], processor: Any, *, width: int = 0) -> Batch:
        """Tensors (B, choices, T)."""
        names = [name for name in encodings[0] if name != "labels"]
        flat = [dict(zip(names, values, strict=True)) for e in encodings for values in zip(*(e[name] for name in names), strict=True)]
        batch = {name: values.view(len(encodings), -1, values.shape[-1]) for name, values in pad(flat, processor, width=width).items()}
        return batch | self.label_tensor(encodings)

    def length(self, encoding: Encoding) -> int:
        return max(map(len, encoding["input_ids"]))

    def compare(self, task: Task, predictions: Sequence[list[float]], *, rows: Rows) -> tuple[list[int], list[int]]:
        return [row[task.columns["label"]] for row in rows], [max(range(len(p)), key=p.__getitem__) for p in predictions]

    def answer(self, task: Task, prediction: list[float]) -> dict[str, Any]:
        best = max(range(len(prediction)), key=prediction.__getitem__)
        return {"label": best, **{f"p_{place}": round(p, 6) for place, p in enumerate(prediction)}}


def _place(column: str, value: Any, choices: Sequence[str]) -> int:
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    letters = string.ascii_uppercase[: len(choices)]
    if text.isdigit() and int(text) < len(choices):
        return int(text)
    if text in choices:
        return list(choices).index(text)
    if len(text) == 1 and text.upper() in letters:
        return letters.index(text.upper())
    raise Bad(column, value, f"the right choice was expected: 0 to {len(choices) - 1}, {letters[0]} to {letters[-1]}, or its text")
