"""In-context learning: labeled examples stand in the prompt, and a causal model scores each label's words behind the row.

    p_k = softmax_k log p(label k | shots, x),   q = softmax(W p),   W = diag(p_cf)⁻¹

p_cf is the mean of p over inputs without content ("N/A", "[MASK]", ""): what the prompt favors whatever the row says.
Brown et al. 2020, arXiv:2005.14165; calibration is Zhao et al. 2021, arXiv:2102.09690, section 5.
"""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor, nn

from paretune import training
from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.readouts.speaking import Speaking
from paretune.roles import Examples
from paretune.seams import Patch
from paretune.tasks import Task

CONTENT_FREE = ("N/A", "[MASK]", "")


@dataclasses.dataclass(frozen=True, repr=False)
class InContext(Speaking):
    """Answers from a prompt of a few labeled examples."""

    card = Card(
        title="In-context learning",
        paper="Zhao et al. 2021, Calibrate Before Use: Improving Few-Shot Performance of Language Models",
        arxiv="2102.09690",
        equation="q = softmax(W p),  W = diag(p_cf)^-1",
        lowers="DH",
        why="Nothing is trained and a handful of labels is enough; but each inference reads the whole prompt again.",
        note="The shots are drawn with all classes in turn. A label of several tokens is scored by their joint probability.",
    )

    shots: int = knob(4, "labeled examples in the prompt", low=0, search="0..32")
    calibrate: bool = knob(True, "undo what the prompt favors without any input")
    order: str = knob("random", "of the shots: permuted by the seed, class after class, or classes in turn", choices=("random", "sorted", "in_turn"))
    seed: int = knob(0, "of which examples are drawn, and their random order", low=0)
    template: str = knob("{text}\nLabel: {label}", "one example; the row's own ends where {label} stands")
    words: tuple[str, ...] = knob((), "what to answer with, one text for each label in the task's order; none takes the labels' names")

    def read(self, log_probs: Tensor, lengths: Tensor, *, patch: Patch) -> Tensor:
        joint = log_probs.sum(-1)
        return joint.softmax(-1) * patch.calibration if self.calibrate else joint  # W p

    def begins(self) -> bool:
        return super().begins() and not self.shots

    def check(self, model: nn.Module, examples: Examples) -> None:
        super().check(model, examples)
        if getattr(model.config, "is_encoder_decoder", False):
            raise Incompatible(f"{self!r}: prompts of examples are for decoders, and {type(model).__name__} has an encoder; use choices")
        if not examples.task.labels:
            raise Incompatible(f"{self!r}: the rows of {examples.task.name} have choices of their own and no common labels; use choices")

    def prefix(self, task: Task) -> tuple[str, int]:
        words = self.label_words(task)
        chosen = self._drawn(task)
        shots = [self.template.replace("{text}", self.row_text(task, row)).replace("{label}", words[k]) for k, row in chosen]
        return "".join(f"{shot}\n\n" for shot in shots), len(shots)

    def _drawn(self, task: Task) -> list[tuple[int, dict]]:
        """(class, row) of the shots in the order of the prompt."""
        pick = random.Random(self.seed)
        column = task.columns["label"]
        of_class = [[row for row in task.train if row[column] == label] for label in task.labels]
        for rows in of_class:
            pick.shuffle(rows)
        in_turn = [(k, rows[turn]) for turn in range(self.shots) for k, rows in enumerate(of_class) if turn < len(rows)][: self.shots]
        if self.order == "random":
            pick.shuffle(in_turn)
        return sorted(in_turn, key=lambda shot: shot[0]) if self.order == "sorted" else in_turn

    def fit(self, model: nn.Module, examples: Examples) -> int:
        shots = super().fit(model, examples)
        task, patch = examples.task, self.ranked(model)
        p_cf = torch.ones(len(task.labels), device=model.device)
        patch.hold({**dict(patch.named_buffers()), "calibration": p_cf})
        if self.calibrate:
            empty = [{task.columns[role]: text for role in ("text", "pair") if role in task.columns} for text in CONTENT_FREE]
            p = training.read(model, task, rows=empty, answers=lambda _, outputs: list(outputs.logits))
            patch.hold({**dict(patch.named_buffers()), "calibration": 1 / torch.stack(p).mean(0)})
        return shots
