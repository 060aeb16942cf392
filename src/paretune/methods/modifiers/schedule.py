"""How a training phase runs: learning rate, epochs, batch, warm-up, decay, clipping, number format, stopping.

    lr(t) = lr · min(t / (w·T), 1)  then  lr · (1 − (t − w·T) / (T − w·T))   for linear decay over T steps, warm-up share w

The optimizer is AdamW: Loshchilov & Hutter 2017, arXiv:1711.05101.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from paretune.card import Card, knob
from paretune.roles import Modifier

if TYPE_CHECKING:
    from paretune.tasks import Task
    from paretune.training import Events, Loop


BATCHES, STEPS = (32, 16, 8), 50  # what little data gain by smaller ones: `python -m benchmarks.grids batches`


@dataclasses.dataclass(frozen=True, repr=False)
class Schedule(Modifier):
    """The settings of a training phase; every training phase has one, written or filled in from the cards."""

    card = Card(
        title="Training schedule",
        paper="Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization (AdamW)",
        arxiv="1711.05101",
        equation="θ ← θ − lr(t) · (m̂ / (√v̂ + ε) + λ θ)",
        lowers="H",
        why="Good defaults need fewer trials; the rates stand on each adapter's card.",
    )

    lr: float | None = knob(None, "peak learning rate; None takes the lowest of the adapters' cards", low=0.0, search="1e-5..1e-2 log")
    head_lr: float | None = knob(None, "peak learning rate of the task's head; None is lr, but at least 1e-3 and, beside adapters, at most 3e-3", low=0.0)
    epochs: float = knob(3.0, "passes over the training split; a fraction is allowed", low=0.0)
    batch: int | None = knob(None, "examples per optimizer step; None is 32, or 16 or 8 where a training would have fewer than 50 steps", low=1)
    tokens: int | None = knob(None, "tokens of examples per optimizer step, in place of `batch` examples; padding is not counted", low=1)
    pack: bool = knob(False, "texts in one row with hardly any padding, each attending to itself alone; they are not sorted by length then")
    micro_batch: int | None = knob(None, "examples per forward pass, accumulated to `batch`; None is `batch`, cut on a CPU to what stays in its caches", low=1)
    warmup: float = knob(0.06, "share of the steps in which the rate rises from 0", low=0.0, high=1.0)
    decay: str = knob("linear", "how the rate falls after the warm-up", choices=("linear", "cosine", "none"))
    weight_decay: float = knob(0.01, "AdamW's decoupled decay, not applied to vectors", low=0.0)
    clip: float = knob(1.0, "largest norm of the gradient; 0 leaves it, and a step of one pass then lets each gradient go as soon as its weight has moved", low=0.0)
    patience: int = knob(2, "epochs without a better validation score before training stops; they have to be 50 steps, too", low=1)
    dtype: str = knob("auto", "number format of the computation; auto probes which is faster here", choices=("auto", "fp32", "bf16"))
    dropout: bool = knob(True, "the checkpoint's dropout and the adapters' own while training; False: none anywhere, in the head neither")
    cache: bool = knob(True, "what is frozen below all that learns is computed without dropout, and once per example; False: in every epoch, with dropout")
    head: bool = knob(True, "train the task's head")

    def sized(self, task: Task) -> Schedule:
        """The schedule with its batch for this task's training rows; blocks of text are taken to be many, as they are not counted before they are read."""
        if self.batch is not None:
            return self
        enough = (size for size in BATCHES if task.kind.in_blocks or self.epochs * len(task.train) >= STEPS * size)
        return dataclasses.replace(self, batch=next(enough, BATCHES[-1]))

    def events(self, loop: Loop) -> Events:
        """No handlers: the loop itself reads the schedule."""
        from paretune.training import Events

        return Events()
