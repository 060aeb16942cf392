"""Reptile: meta-learning without a query, moving the start towards where each small task's training ends.

    θ̃ = θ after k steps θ ← θ − α ∇L(θ) on an episode;   the gradient of a step is (θ − θ̃) / α = Σ_i g_i

Nichol, Achiam & Schulman 2018, arXiv:1803.02999, section 4: the difference takes the place of a gradient in Adam.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from paretune.card import Card, knob
from paretune.episodes import Batch, Episodes, Size, descend, own
from paretune.roles import Modifier
from paretune.training import Events, Loop


@dataclasses.dataclass(frozen=True, repr=False)
class Reptile(Modifier):
    """Trains what learns towards the ends of many short trainings, over episodes drawn from the task."""

    card = Card(
        title="Reptile",
        paper="Nichol, Achiam & Schulman 2018, On First-Order Meta-Learning Algorithms",
        arxiv="1803.02999",
        equation="θ ← θ − ε (θ − θ̃) / α,  θ̃ = θ after k steps on an episode",
        lowers="D",
        why="New classes need a few examples and a few steps; a training step costs k of plain training, and no second derivative.",
        note="The paper's list of tasks is drawn from one: so many of its classes, anew for every episode; several data sets go in as one, labels side by side. "
        "A pretrained model wants a smaller rate than full fine-tuning: schedule(lr=5e-5) (docs/episodes.md). "
        "Every inner step sees the whole episode; the paper's sees parts of it. The head learns with its outputs renamed in every episode, so a "
        "phase that trains on the task itself has to follow: full + reptile | full + schedule(epochs=1). "
        "Measured on MiniLM (docs/method-steps.md): with three inner steps, a step takes 3.7 times full fine-tuning's CPU time.",
    )

    inner_steps: int = knob(3, "k: steps on an episode; 1 is joint training over episodes, 0 training as without reptile", low=0, search="2..8")
    inner_lr: float = knob(0.1, "α, the rate of these steps", low=1e-8, search="1e-2..1.0 log")
    ways: int | None = knob(None, "classes of an episode; None is all, five at most", low=2)
    shots: int = knob(4, "examples of each class", low=1)

    def events(self, loop: Loop) -> Events:
        return _Reptile(self, loop) if self.inner_steps else Events()


class _Reptile(Episodes):
    def __init__(self, knobs: Reptile, loop: Loop) -> None:
        super().__init__(loop, method=knobs, size=Size(knobs.ways, knobs.shots, 0, knobs.inner_steps, knobs.inner_lr))

    def loss(self, loop: Loop, batch: Batch, *, outputs: Any, loss: Tensor) -> Tensor:
        count = len(batch["labels"])
        starts = own(loop)
        ends = descend(loop, batch, weights=starts, steps=self.size.steps, lr=self.size.lr, first=loss / count)
        pulls = [((w - w.detach()) * (w - ends[n]).detach()).sum() / self.size.lr for n, w in starts.items()]  # zero, with gradient (θ − θ̃) / α
        return loss.detach() + sum(pulls) * count
