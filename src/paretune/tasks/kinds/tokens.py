"""One tag for each word of a text: entities, parts of speech."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from paretune.tasks.kinds.base import (
    IGNORED,
    Bad,
    Batch,
    Encoding,
    Kind,
    check_text,
    class_name,
    head_config,
    in_order,
    labeled,
    limit,
    list_of,
    pad_to,
    token_loss,
)  # fmt: skip

if TYPE_CHECKING:
    from paretune.tasks.definition import Row, Rows, Task


@dataclasses.dataclass(frozen=True)
class Tokens(Kind):
    """A softmax over the tags at the first token of each word; cross-entropy over the words."""

    name: ClassVar[str] = "tokens"
    outputs: ClassVar[str] = "tags"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    metric: ClassVar[str] = "accuracy"
    labels_matter: ClassVar[bool] = True

    def read(self, columns: Mapping[str, str], raw: Mapping[str, Any], *, label: bool = True) -> Row:
        row = super().read(columns, raw, label=label)
        words, tags = row[columns["text"]], row.get(columns.get("label", ""))
        if tags is not None and len(words) != len(tags):
            raise Bad(columns["label"], tags, f"{len(tags)} tags for {len(words)} words")
        return row

    def read_input(self, columns: Mapping[str, str], raw: Mapping[str, Any]) -> Row:
        column = columns["text"]
        words = [check_text(column, word) for word in list_of(column, raw)]
        if not words or not all(word.strip() for word in words):
            raise Bad(column, raw.get(column), "a list of words was expected, none of them empty")
        return {column: words}

    def read_label(self, column: str, raw: Mapping[str, Any]) -> list[str]:
        return [class_name(column, tag) for tag in list_of(column, raw)]

    def labels(self, columns: Mapping[str, str], rows: Sequence[Row]) -> tuple[str, ...]:
        return in_order({tag for row in rows for tag in row[columns["label"]]})

    def default_metric(self, labels: Sequence[str]) -> str:
        return "f1_spans" if any(label.startswith("B-") for label in labels) else self.metric

    def texts(self, columns: Mapping[str, str], row: Row) -> list[str]:
        return [" ".join(row[columns["text"]])]

    def key(self, columns: Mapping[str, str], row: Row) -> str:
        return " ".join(row[columns["text"]])

    def config(self, task: Task) -> dict[str, Any]:
        return head_config(task.labels)

    def encode(self, task: Task, rows: Sequence[Row], *, processor: Any, max_length: int | None = None, config: Any = None) -> list[Encoding]:
        """The words joined by spaces. "labels" is -100 but at the first token of a word; 0 there where the row has no tags,
        so that a prediction knows the places."""
        if not rows:
            return []
        length, column = limit(processor, max_length), task.columns.get("label")
        out = processor([self.key(task.columns, row) for row in rows], truncation=length is not None, max_length=length, padding=False)
        encodings = []
        for i, row in enumerate(rows):
            encoding = {name: values[i] for name, values in out.items()}
            words = row[task.columns["text"]]
            marks = [task.labels.index(tag) for tag in row[column]] if column in row else [0] * len(words)
            encoding["labels"] = _at_word_starts(out, i, words, marks)
            encodings.append(encoding)
        return encodings

    def collate(self, encodings: Sequence[Encoding], processor: Any, *, width: int = 0) -> Batch:
        batch = super().collate([{k: v for k, v in e.items() if k != "labels"} for e in encodings], processor, width=width)
        batch["labels"] = pad_to(batch["input_ids"].shape[1], [e["labels"] for e in encodings], filler=IGNORED)
        return batch

    def loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        return token_loss(outputs.logits, batch["labels"])

    def answered(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return labeled(outputs.logits, batch["labels"])

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor], *, outputs: Any, processor: Any = None) -> list[list[str]]:
        """The tags of each example's words; a truncated text has fewer."""
        best, names = outputs.logits.argmax(-1), model.config.id2label
        return [[names[int(tag)] for tag in tags[marks != IGNORED]] for tags, marks in zip(best, batch["labels"], strict=True)]

    def compare(self, task: Task, predictions: Sequence[list[str]], *, rows: Rows) -> tuple[list[Any], list[Any]]:
        """Tags by row for spans, else the tags of all words as numbers. Words cut off by truncation count as "O", or as the first tag."""
        none = "O" if "O" in task.labels else task.labels[0]
        truth = [row[task.columns["label"]] for row in rows]
        predicted = [[*p, *[none] * (len(t) - len(p))] for t, p in zip(truth, predictions, strict=True)]
        if task.metric == "f1_spans":
            return truth, predicted
        number = {tag: i for i, tag in enumerate(task.labels)}
        return [number[tag] for tags in truth for tag in tags], [number[tag] for tags in predicted for tag in tags]

    def scores(self, predictions: Sequence[Any]) -> np.ndarray | None:
        return None

    def answer(self, task: Task, prediction: list[str]) -> dict[str, Any]:
        return {"label": " ".join(prediction)}


def _at_word_starts(out: Any, i: int, words: Sequence[str], marks: Sequence[int]) -> list[int]:
    """Each word's mark at the token that holds its first character, -100 elsewhere."""
    labels, place = [IGNORED] * len(out["input_ids"][i]), 0
    for word, mark in zip(words, marks, strict=True):
        token = out.char_to_token(i, place + len(word) - len(word.lstrip()))
        if token is not None:  # else truncated
            labels[token] = mark
        place += len(word) + 1
    return labels
