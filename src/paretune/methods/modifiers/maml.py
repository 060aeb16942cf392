"""Model-agnostic meta-learning: training for a start from which a few steps on a few examples are enough.

    θ' = θ − α ∇L_support(θ), as often as inner_steps says;   the loss of a step is L_query(θ')

Order 2 follows the gradient of this loss through the inner steps; order 1 takes it at θ' and leaves their derivative out.
Finn, Abbeel & Levine 2017, arXiv:1703.03400, sections 2.2 and 5.2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from paretune.card import Card, knob
from paretune.episodes import Batch, Episodes, Size, descend, mean_loss, own
from paretune.roles import Modifier
from paretune.step.probe import Pace
from paretune.training import Events, Loop


@dataclasses.dataclass(frozen=True, repr=False)
class MAML(Modifier):
    """Trains what learns to be adapted quickly, over episodes drawn from the task."""

    card = Card(
        title="Model-agnostic meta-learning (MAML)",
        paper="Finn, Abbeel & Levine 2017, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        arxiv="1703.03400",
        equation="min_θ L_query(θ − α ∇L_support(θ))",
        lowers="D",
        why="New classes need a few examples and a few steps; a training step costs that of its inner steps on top, and about twice as much at order 2.",
        note="The paper's list of tasks is drawn from one: so many of its classes, anew for every episode; several data sets go in as one, labels side by side. "
        "A pretrained model wants a smaller rate than full fine-tuning: schedule(lr=5e-5) (docs/episodes.md). "
        "One episode makes a step, where the paper averages over several. The head learns with its outputs renamed in every episode, so a phase "
        "that trains on the task itself has to follow: full + maml | full + schedule(epochs=1). "
        "Measured on MiniLM (docs/method-steps.md): with an inner step, a step takes 2.4 times full fine-tuning's CPU time, "
        "and at order 2 it takes 4.6 times full fine-tuning's CPU time.",
    )

    order: int = knob(1, "2: the gradient through the inner steps; 1: without their derivative", choices=(1, 2))
    inner_steps: int = knob(1, "steps of adaptation in an episode; 0 is training as without maml", low=0, search="1..5")
    inner_lr: float = knob(0.1, "α, the rate of these steps", low=0.0, search="1e-2..1.0 log")
    ways: int | None = knob(None, "classes of an episode; None is all, five at most", low=2)
    shots: int = knob(4, "examples of each class to adapt on", low=1)
    queries: int = knob(4, "examples of each class to be judged by", low=1)

    def events(self, loop: Loop) -> Events:
        return _MAML(self, loop) if self.inner_steps else Events()


class _MAML(Episodes):
    def __init__(self, knobs: MAML, loop: Loop) -> None:
        super().__init__(loop, method=knobs, size=Size(knobs.ways, knobs.shots, knobs.queries, knobs.inner_steps, knobs.inner_lr))
        self.through = knobs.order == 2

    def pace(self, loop: Loop, pace: Pace) -> Pace:
        """Of the attention kernels only the plain one has a second derivative."""
        return dataclasses.replace(pace, attention="eager") if self.through else pace

    def loss(self, loop: Loop, batch: Batch, *, outputs: Any, loss: Tensor) -> Tensor:
        count = len(batch["labels"])
        weights = descend(loop, batch, weights=own(loop), steps=self.size.steps, lr=self.size.lr, graph=self.through, first=loss / count)
        return mean_loss(loop, self.query, weights=weights) * count
