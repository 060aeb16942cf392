"""A fixed subset: training sees one random share of the examples and never the rest.

    S = π[0 : m],   m = keep · n,   the same in every epoch

The baseline of every data selector; Sorscher et al. 2022, arXiv:2206.14486.
"""

from __future__ import annotations

import dataclasses

import torch

from paretune import batches
from paretune.card import Card, knob
from paretune.roles import Modifier
from paretune.training import Events, Loop


@dataclasses.dataclass(frozen=True, repr=False)
class FixedSubset(Modifier):
    """Trains on one random share of the data."""

    card = Card(
        title="Fixed random subset",
        paper="Sorscher et al. 2022, Beyond neural scaling laws: beating power law scaling via data pruning",
        arxiv="2206.14486",
        equation="S = π[0 : m],  m = keep · n",
        lowers="D",
        why="An epoch costs `keep` of a full one, and only that share of the examples needs labels; the rest is never seen.",
        note="The seed of the run chooses the subset.",
    )

    keep: float = knob(0.3, "share of the training examples", low=0.0, high=1.0, search="0.05..1.0 log")

    def events(self, loop: Loop) -> Events:
        return _Subset(self.keep, loop.settings.seed)


class _Subset(Events):
    def __init__(self, keep: float, seed: int) -> None:
        self.keep, self.seed = keep, seed

    def indices(self, epoch: int, n: int, *, generator: torch.Generator) -> list[int] | None:
        size = max(1, round(self.keep * n))
        if size == n:
            return None
        return sorted(torch.randperm(n, generator=batches.generator(self.seed, 0, purpose=3)).tolist()[:size])
