"""In which order and company examples are visited: batches of similar length, a pure function of seed and epoch.

Because order depends on nothing else, a killed training resumes at (epoch, batch) and sees exactly what it would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

CACHED = 2048  # tokens that pass through a model at once on a CPU: more leave its caches (measured by `python -m benchmarks.step`)
POOL = 32  # batches that are sorted by length together; between pools and batches the order is random


def generator(seed: int, epoch: int, *, purpose: int = 0) -> torch.Generator:
    """Random numbers for one epoch and purpose (0 the order, 1 the choice of examples)."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 7 + purpose)


def epoch_batches(lengths: Sequence[int], visited: Sequence[int] | None, *, batch: int, random: torch.Generator) -> list[list[int]]:
    """The batches of one epoch as lists of example indices.

    Examples are shuffled, sorted by length within pools of 32 batches (so that a batch pads little), and the batches
    shuffled again. Each visited example stands in exactly one batch.
    """
    chosen = torch.arange(len(lengths)) if visited is None else torch.tensor(list(visited))
    order = chosen[torch.randperm(len(chosen), generator=random)].tolist()
    pools = [order[i : i + POOL * batch] for i in range(0, len(order), POOL * batch)]
    batches = [pool[i : i + batch] for pool in (sorted(p, key=lengths.__getitem__) for p in pools) for i in range(0, len(pool), batch)]
    return [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Batches of similar length, longest first, for evaluation; the caller puts the answers back in order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def parts(indices: Sequence[int], lengths: Sequence[int], *, tokens: int | None = None) -> list[list[int]]:
    """The indices, from short to long, cut so that a part holds at most so many tokens (`CACHED`) with its padding; a longer example stands alone."""
    cut: list[list[int]] = []
    for i in sorted(indices, key=lengths.__getitem__):
        if not cut or (len(cut[-1]) + 1) * lengths[i] > (tokens or CACHED):
            cut.append([])
        cut[-1].append(i)
    return cut


def steps(examples: int, batch: int, *, share: float = 1.0) -> int:
    """Optimizer steps of (a share of) an epoch."""
    return max(1, math.ceil(math.ceil(examples / batch) * share))
