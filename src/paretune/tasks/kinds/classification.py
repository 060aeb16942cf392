"""One class for a text or a pair of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from paretune.tasks.kinds.base import Kind, head_config, in_order

if TYPE_CHECKING:
    from paretune.tasks.definition import Row, Task


@dataclasses.dataclass(frozen=True)
class Classification(Kind):
    """A softmax over the classes; cross-entropy."""

    name: ClassVar[str] = "classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "accuracy"
    pairs: ClassVar[bool] = True
    one_label: ClassVar[bool] = True
    labels_matter: ClassVar[bool] = True

    def labels(self, columns: Mapping[str, str], rows: Sequence[Row]) -> tuple[str, ...]:
        return in_order({row[columns["label"]] for row in rows})

    def config(self, task: Task) -> dict[str, Any]:
        return {**head_config(task.labels), "problem_type": "single_label_classification"}
