"""In which order and company examples are visited: batches of similar length, or of similar size in tokens, a pure function of seed and epoch.

Because order depends on nothing else, a killed training resumes at (epoch, batch) and sees exactly what it would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from paretune.methods.modifiers.schedule import Schedule

CACHED = 1024  # tokens that pass through a model at once on a CPU: more leave its caches (measured by `python -m benchmarks.step`)
POOL = 32  # batches that are sorted by length together; between pools and batches the order is random


def generator(seed: int, epoch: int, *, purpose: int = 0) -> torch.Generator:
    """Random numbers for one epoch and purpose (0 the order, 1 the choice of examples)."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 7 + purpose)


def epoch_batches(lengths: Sequence[int], visited: Sequence[int] | None, *, schedule: Schedule, random: torch.Generator) -> list[list[int]]:
    """The batches of one epoch as lists of example indices.

    Examples are shuffled, sorted by length within pools of 32 batches (so that a batch pads little; packed examples are not sorted), and the
    batches shuffled again. Each visited example stands in exactly one batch.

    Args:
        lengths: of all examples, in tokens.
        visited: the examples of this epoch; None is all.
        schedule: says how many examples, or tokens, a batch has, and whether they are packed.
    """
    chosen = torch.arange(len(lengths)) if visited is None else torch.tensor(list(visited))
    order = chosen[torch.randperm(len(chosen), generator=random)].tolist()
    batch, count = schedule.batch, steps(lengths, order, schedule=schedule)
    if not schedule.pack:
        pool = POOL * batch if schedule.tokens is None else math.ceil(POOL * len(order) / count)
        order = [i for at in range(0, len(order), pool) for i in sorted(order[at : at + pool], key=lengths.__getitem__)]
    batches = [order[i : i + batch] for i in range(0, len(order), batch)] if schedule.tokens is None else _even(order, lengths, count)
    return [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]


def _even(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """The examples in this order, cut where the sum of their tokens passes each of `count` equal shares of all."""
    share, passed = sum(lengths[i] for i in order) / count, 0
    cut: list[list[int]] = [[] for _ in range(count)]
    for i in order:
        cut[min(count - 1, int(passed / share))].append(i)
        passed += lengths[i]
    return [batch for batch in cut if batch]  # an example longer than a share leaves a batch empty


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Batches of similar length, longest first, for evaluation; the caller puts the answers back in order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def width(lengths: Sequence[int], *, most: int) -> int:
    """To how many tokens a batch of these lengths is padded: to a multiple of 4, of 8 beyond 64, of 16 beyond 128, and at most to `most`.

    For every new shape a CPU's library compiles kernels, and keeps them; where lengths are as they come, a short training pays that at nearly every step
    (measured by `python -m benchmarks.step`).
    """
    longest = max(lengths)
    grain = min(16, max(4, 2 ** ((longest - 1).bit_length() - 4)))
    return max(longest, min(most, math.ceil(longest / grain) * grain))


def parts(indices: Sequence[int], lengths: Sequence[int], *, tokens: int | None = None, packed: bool = False) -> list[list[int]]:
    """The indices, from short to long, cut so that a part passes at most so many tokens (`CACHED`); a longer example stands alone."""
    cut: list[list[int]] = []
    size = 0  # of the newest part
    for i in sorted(indices, key=lengths.__getitem__):
        size = size + lengths[i] if packed else (len(cut[-1]) + 1 if cut else 1) * lengths[i]
        if not cut or size > (tokens or CACHED):
            cut.append([])
            size = lengths[i]
        cut[-1].append(i)
    return cut


def passed(indices: Sequence[int], lengths: Sequence[int], *, packed: bool = False) -> int:
    """The tokens that pass through a model for these examples at once: with their padding, or packed without it."""
    each = [lengths[i] for i in indices]
    return sum(each) if packed else len(each) * max(each)


def steps(lengths: Sequence[int], visited: Sequence[int] | None, *, schedule: Schedule, share: float = 1.0) -> int:
    """Optimizer steps of (a share of) an epoch that visits these examples; None is all."""
    chosen = lengths if not visited else [lengths[i] for i in visited]
    whole = math.ceil(len(chosen) / schedule.batch) if schedule.tokens is None else math.ceil(sum(chosen) / schedule.tokens)
    return max(1, math.ceil(whole * share))
