"""Any number of labels for a text or a pair of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from paretune.tasks.kinds.base import Bad, Kind, cell, class_name, head_config, in_order, list_of

if TYPE_CHECKING:
    from paretune.tasks.definition import Row, Rows, Task

_YES, _NO = {"1", "true", "yes"}, {"0", "false", "no"}


@dataclasses.dataclass(frozen=True)
class Multilabel(Kind):
    """A sigmoid for each label; binary cross-entropy. A label is given at probability 0.5 and up.

    The labels of a row are a list, a text such as "a|b" or "a;b" (an empty one has none), or several columns of 0 and 1.
    """

    name: ClassVar[str] = "multilabel"
    outputs: ClassVar[str] = "labels"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "f1_micro"
    pairs: ClassVar[bool] = True
    labels_matter: ClassVar[bool] = True

    def label_columns(self, columns: Mapping[str, str]) -> list[str]:
        return columns["label"].split(",")

    def read_label(self, column: str, raw: Mapping[str, Any]) -> list[str]:
        if column in raw:
            return sorted({class_name(column, name) for name in list_of(column, raw, separators="|;,")})
        return [name for name in column.split(",") if _is_set(name, raw)]

    def labels(self, columns: Mapping[str, str], rows: Sequence[Row]) -> tuple[str, ...]:
        several = columns["label"].split(",")
        return tuple(several) if len(several) > 1 else in_order({name for row in rows for name in row[columns["label"]]})

    def config(self, task: Task) -> dict[str, Any]:
        return {**head_config(task.labels), "problem_type": "multi_label_classification"}

    def label_value(self, task: Task, label: list[str]) -> list[float]:
        return [float(name in label) for name in task.labels]

    def loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        labels = batch["labels"].float()
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits.float(), labels, reduction="sum"), labels.numel()

    def answered(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Every label is a target with two classes: sigmoid(z) = softmax(z, 0)."""
        return list(torch.stack([outputs.logits, torch.zeros_like(outputs.logits)], -1))

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor], *, outputs: Any, processor: Any = None) -> list[list[float]]:
        return outputs.logits.float().sigmoid().tolist()

    def compare(self, task: Task, predictions: Sequence[list[float]], *, rows: Rows) -> tuple[list[Any], list[Any]]:
        truth = [[int(name in row[task.columns["label"]]) for name in task.labels] for row in rows]
        return truth, [[int(p >= 0.5) for p in row] for row in predictions]

    def scores(self, predictions: Sequence[Any]) -> np.ndarray:
        return np.asarray(predictions, dtype=float)

    def answer(self, task: Task, prediction: list[float]) -> dict[str, Any]:
        given = [name for name, p in zip(task.labels, prediction, strict=True) if p >= 0.5]
        return {"label": "|".join(given), **{f"p_{name}": round(p, 6) for name, p in zip(task.labels, prediction, strict=True)}}


def _is_set(column: str, raw: Mapping[str, Any]) -> bool:
    value = class_name(column, cell(column, raw)).lower()
    if value not in _YES | _NO:
        raise Bad(column, raw[column], "0 or 1 was expected in a column of a multi-label task")
    return value in _YES
