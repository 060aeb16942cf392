"""One number for a text or a pair of texts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from paretune.tasks.kinds.base import Bad, Kind, cell

if TYPE_CHECKING:
    from paretune.tasks.definition import Rows, Task


@dataclasses.dataclass(frozen=True)
class Regression(Kind):
    """One output; squared error in the units of the label."""

    name: ClassVar[str] = "regression"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "pearson"
    pairs: ClassVar[bool] = True

    def read_label(self, column: str, raw: Mapping[str, Any]) -> float:
        value = cell(column, raw)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise Bad(column, value, "a number was expected") from None
        if not math.isfinite(number):
            raise Bad(column, value, "a finite number was expected")
        return number

    def config(self, task: Task) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def label_value(self, task: Task, label: float) -> float:
        return label

    def loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        labels = batch["labels"].float()
        return torch.nn.functional.mse_loss(outputs.logits.float().squeeze(-1), labels, reduction="sum"), len(labels)

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor], *, outputs: Any, processor: Any = None) -> list[float]:
        return outputs.logits.float().squeeze(-1).tolist()

    def compare(self, task: Task, predictions: Sequence[float], *, rows: Rows) -> tuple[list[float], list[float]]:
        return [row[task.columns["label"]] for row in rows], list(predictions)

    def scores(self, predictions: Sequence[Any]) -> None:
        return None

    def answer(self, task: Task, prediction: float) -> dict[str, Any]:
        return {"label": round(prediction, 6)}
