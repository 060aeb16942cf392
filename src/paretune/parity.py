"""The gate of an export: what was written answers the run's test rows as the run's model does, or the export fails with the figures.

    drift = ‖z_export − z‖ / ‖z‖   over the logits z of the first of the test rows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paretune import tasks, training
from paretune.errors import Incompatible
from paretune.tasks import Task
from paretune.weights import kernels

DRIFT = {"float": 1e-3, "int8": 0.15, "nf4": 1e-3, "merged": 1e-3}  # the largest drift that an export may have
SCORE = 0.01  # how far its score may be from the model's, as a share of it
HELD = 200  # test rows at most whose logits are compared, for they are held in memory
ROUNDING = 1e-9  # of the difference of two scores: 0.905 - 0.895 is more than 0.01
TITLES = {"float": "float ONNX graph", "int8": "int8 ONNX graph", "nf4": "folder in NF4 for bitsandbytes", "merged": "folder with merged adapters"}
INSTEAD = {"merged": "--keep-adapters"}  # what to try where it is not --to hf


@dataclasses.dataclass(frozen=True)
class Parity:
    """What an export answers, beside what the model answers, on the same rows."""

    form: str  # of TITLES
    rows: int
    drift: float
    score: float
    model_score: float
    notes: tuple[str, ...] = ()  # how the export's numbers differ from the run's
    held: int | None = None  # the first of the rows, whose logits were compared, where they are not all

    def check(self, name: str) -> None:
        """Refuses an export that answers otherwise than its model.

        Raises:
            Incompatible: with the figures and what was tolerated.
        """
        apart, held = abs(self.score - self.model_score), f" (of the first {self.held})" if self.held else ""
        if not self.drift <= DRIFT[self.form] or not apart <= SCORE * max(1.0, abs(self.model_score)) + ROUNDING:
            raise Incompatible(
                f"{name}: the {TITLES[self.form]} answers otherwise than the model: on {self.rows} test rows it scores {self.score:.4f}, "
                f"not {self.model_score:.4f} (tolerated {SCORE:g}), and its logits{held} are off by {self.drift:.2g} "
                f"(tolerated {DRIFT[self.form]:g}); "
                f"{'; '.join((*self.notes, 'nothing was written'))}, export with {INSTEAD.get(self.form, '--to hf')}"
            )


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model says to the test rows: the logits of the first of them, and its predictions."""

    logits: list[Tensor]
    predictions: list[Any]

    @classmethod
    def of(cls, model: nn.Module, task: Task) -> Answers:
        """Reads the task's test rows with a model, in evaluation mode; packed maps compute as their formats say, not by what was fastest here."""
        with kernels.first_ways():
            return cls(training.read(model, task, rows=task.test[:HELD], answers=_logits), training.predict(model, task, rows=task.test))

    def beside(self, export: Answers, task: Task, *, form: str, notes: tuple[str, ...] = ()) -> Parity:
        """How far an export's answers are from these."""
        z, again = (torch.cat([t.flatten() for t in found.logits]) for found in (self, export))
        scores = [tasks.score(task, found.predictions, rows=task.test) for found in (export, self)]
        drift = float((again - z).norm() / z.norm())
        return Parity(form, len(task.test), drift, *scores, notes=notes, held=HELD if len(task.test) > HELD else None)


def require_rows(task: Task, *, name: str) -> None:
    """Refuses a task without test rows.

    Raises:
        Incompatible: naming the run.
    """
    if not len(task.test):
        raise Incompatible(f"{name}: an export is compared with its model on test rows, and there are none; export with --to hf")


def _logits(batch: Mapping[str, Tensor], outputs: Any) -> list[Tensor]:
    """The logits of each example, where its own tokens are."""
    return [z[: int(n)] if z.dim() > 1 else z for z, n in zip(outputs.logits.float(), _lengths(batch, outputs), strict=True)]


def _lengths(batch: Mapping[str, Tensor], outputs: Any) -> list[int]:
    mask = batch.get("attention_mask")
    return [len(z) for z in outputs.logits] if mask is None or mask.dim() > 2 else mask.sum(1).tolist()
