"""One number for a text or a pair of texts."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from paretune.tasks.kinds.base import Bad, Encoding, Kind, cell

if TYPE_CHECKING:
    from paretune.tasks.definition import Row, Rows, Task


@dataclasses.dataclass(frozen=True)
class Regression(Kind):
    """One output z, of which an answer is σ z + μ: μ and σ are of the training labels of a new head, and stand in its model's config.

    The loss is the squared error of z, in which prices and years are as easy to learn as stars. A checkpoint's own head answers in its own units: μ = 0, σ = 1.
    """

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

    def scale(self, task: Task) -> dict[str, float]:
        labels = [row[task.columns["label"]] for row in task.train]
        if len(labels) < 2:
            return {}
        return {"label_mean": statistics.fmean(labels), "label_std": statistics.pstdev(labels) or 1.0}

    def encode(self, task: Task, rows: Sequence[Row], *, processor: Any, max_length: int | None = None, config: Any = None) -> list[Encoding]:
        mean, std = _scale(config)
        encodings = super().encode(task, rows, processor=processor, max_length=max_length, config=config)
        return [e | {"labels": (e["labels"] - mean) / std} if "labels" in e else e for e in encodings]

    def label_value(self, task: Task, label: float) -> float:
        return label

    def loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        labels = batch["labels"].float()
        return torch.nn.functional.mse_loss(outputs.logits.float().squeeze(-1), labels, reduction="sum"), len(labels)

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor], *, outputs: Any, processor: Any = None) -> list[float]:
        mean, std = _scale(model.config)
        return (std * outputs.logits.double().squeeze(-1) + mean).tolist()

    def compare(self, task: Task, predictions: Sequence[float], *, rows: Rows) -> tuple[list[float], list[float]]:
        return [row[task.columns["label"]] for row in rows], list(predictions)

    def scores(self, predictions: Sequence[Any]) -> None:
        return None

    def answer(self, task: Task, prediction: float) -> dict[str, Any]:
        return {"label": round(prediction, 6)}


def _scale(config: Any) -> tuple[float, float]:
    """(μ, σ)."""
    return getattr(config, "label_mean", 0.0), getattr(config, "label_std", 1.0)
