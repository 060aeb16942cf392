"""Choices: a language model answers with the choice that it finds most likely, per token.

    β(y) = (1 / |y|) Σ_t log p(y_t | x, y_<t),   answer = argmax_y β(y)

Dividing by the length |y| keeps short choices from winning by being short. Brown et al. 2020, arXiv:2005.14165, section 2.4;
Liu et al. 2022, arXiv:2205.05638, section 3.3. Nothing is fitted. Training behind it (choices | lora) minimizes −β of the right choice.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from paretune.card import Card, knob
from paretune.readouts.speaking import Speaking
from paretune.seams import Patch


@dataclasses.dataclass(frozen=True, repr=False)
class Choices(Speaking):
    """Ranks a task's labels, or a row's own choices, as continuations of its text."""

    card = Card(
        title="Ranked choices",
        paper="Brown et al. 2020, Language Models are Few-Shot Learners",
        arxiv="2005.14165",
        equation="answer = argmax_y (1 / |y|) log p(y | x)",
        lowers="DH",
        why="A language model answers a new task without a head or an example; an inference reads the text once and every choice behind it.",
        note="Few-shot results need a large model. Rows of several hundred labels make an inference dear.",
    )

    template: str = knob("{text}\nLabel: {label}", "a row as the model sees it; {label} stands where its words are scored")
    words: tuple[str, ...] = knob((), "what to answer with, one text for each label in the task's order; none takes the labels' names")
    normalize: bool = knob(True, "divide by the number of tokens")

    def read(self, log_probs: Tensor, lengths: Tensor, *, patch: Patch) -> Tensor:
        total = log_probs.sum(-1)  # log p(y | x)
        return total / lengths if self.normalize else total
