"""Prototypes: a class is the mean of its examples' embeddings, an answer the nearest one; no training at all.

    p(k | z) = softmax_k(−|z − c_k|²),   c_k = mean of class k's z;   −|z − c_k|² = 2 c_k·z − |c_k|² − |z|²

The last term is the same for all classes, so the model's own last map holds the readout exactly: W = 2 c, b = −|c|².
Zero-shot, c_k is the embedding of the class's name or description, at length one. Snell et al. 2017, arXiv:1703.05175.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn
from torch.nn import functional as F

from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.readouts.heads import ClassVectors, embed
from paretune.roles import Examples


@dataclasses.dataclass(frozen=True, repr=False)
class Prototypes(ClassVectors):
    """Reads the class whose mean embedding is nearest."""

    card = Card(
        title="Prototypes (class means)",
        paper="Snell, Swersky & Zemel 2017, Prototypical Networks for Few-shot Learning",
        arxiv="1703.05175",
        equation="p(k | z) = softmax(-|z - c_k|²),  c_k = mean of class k",
        lowers="DEH",
        why="A few examples of a class are enough, or its name; fitting is one forward pass over them and has nothing to tune.",
        note="The paper also trains the embedding over episodes; here it is the backbone's, or that of an earlier phase, as in lora | prototypes. "
        "In a head of several maps the embedding is what the last one reads.",
    )

    source: str = knob("examples", "what a class vector is made of", choices=("examples", "labels"))
    descriptions: tuple[str, ...] = knob((), 'texts for source="labels", one for each label in the task\'s order; none takes the names')
    pooling: str = knob("auto", "over tokens; auto is mean in text encoders, else the model's own", choices=("auto", "model", "cls", "mean"))

    @property
    def zero_shot(self) -> bool:  # type: ignore[override]
        return self.source == "labels"

    def vectors(self, means: Tensor) -> tuple[Tensor, Tensor]:
        c = F.normalize(means, dim=-1) if self.zero_shot else means
        return 2 * c, -c.square().sum(-1)  # −|z − c|² + |z|²

    def check(self, model: nn.Module, examples: Examples) -> None:
        super().check(model, examples)
        task = examples.task
        if self.zero_shot and [role for role in task.columns if role != "label"] != ["text"]:
            raise Incompatible(f"{self!r}: names and descriptions are texts, and the rows of {task.name} are not one text each; use source=\"examples\"")
        if self.descriptions and (not self.zero_shot or len(self.descriptions) != len(task.labels)):
            raise Incompatible(
                f'{self!r}: descriptions go with source="labels", one for each of the {len(task.labels)} labels of {task.name}, not {len(self.descriptions)}'
            )

    def means(self, model: nn.Module, examples: Examples) -> tuple[Tensor, int]:
        if not self.zero_shot:
            return super().means(model, examples)
        task = examples.task
        texts = self.descriptions or [label.replace("_", " ") for label in task.labels]
        return embed(model, task, rows=[{task.columns["text"]: text} for text in texts]), 0
