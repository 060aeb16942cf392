"""Random subsets: each epoch visits a fresh random share of the training examples.

    epoch e visits the items e·m ... (e+1)·m − 1 of an endless row of random permutations,   m = keep · n

Without replacement across epochs (RS2): after 1/keep epochs every example was seen once, and none twice in an epoch.
Okanovic et al. 2023, arXiv:2305.18424, section 3.
"""

from __future__ import annotations

import dataclasses

import torch

from paretune import batches
from paretune.card import Card, knob
from paretune.roles import Modifier
from paretune.training import Events, Loop


@dataclasses.dataclass(frozen=True, repr=False)
class RandomSubset(Modifier):
    """Trains every epoch on a fresh random share of the data."""

    card = Card(
        title="Repeated random subsets (RS2)",
        paper="Okanovic et al. 2023, Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning",
        arxiv="2305.18424",
        equation="S_e = π[e·m : (e+1)·m],  m = keep · n",
        lowers="D",
        why="An epoch costs `keep` of a full one; over the epochs all examples still come up.",
        note="Without replacement, as the paper recommends; replacement=True draws each epoch's subset independently. "
        "The learning-rate schedule spans the shortened number of steps.",
    )

    keep: float = knob(0.3, "share of the training examples per epoch", low=0.0, high=1.0, search="0.05..1.0 log")
    replacement: bool = knob(False, "draw each epoch's subset anew, whatever was seen before")

    def events(self, loop: Loop) -> Events:
        return _Subsets(self, loop.settings.seed)


class _Subsets(Events):
    """Holds no state: a subset follows from the seed and the epoch, so a resumed training visits the same ones."""

    def __init__(self, knobs: RandomSubset, seed: int) -> None:
        self.knobs, self.seed = knobs, seed

    def indices(self, epoch: int, n: int, *, generator: torch.Generator) -> list[int] | None:
        size = max(1, round(self.knobs.keep * n))
        if size == n:
            return None
        if self.knobs.replacement:
            return sorted(self._permutation(epoch, n)[:size])
        return sorted(self._window(epoch * size, size, n))

    def _window(self, start: int, size: int, n: int) -> list[int]:
        """Items start ... start + size − 1 of the row; what an epoch took from the end of one permutation goes to the end of the next."""
        order = self._permutation(0, n)
        for k in range(1, (start + size - 1) // n + 1):
            over = -(k * n) % size  # so many items of permutation k lie in the epoch that began in permutation k − 1
            taken = set(order[n - (size - over) :]) if over else set()
            fresh = self._permutation(k, n)
            before, order = order, [i for i in fresh if i not in taken] + [i for i in fresh if i in taken]
            if k * n > start:
                return before[start - (k - 1) * n :] + order[: start + size - k * n]
        return order[start % n : start % n + size]

    def _permutation(self, k: int, n: int) -> list[int]:
        return torch.randperm(n, generator=batches.generator(self.seed, k, purpose=2)).tolist()
