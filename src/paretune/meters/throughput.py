"""Throughput: examples a second at the best batch size."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from paretune.meters import memory
from paretune.meters.reading import Reading, missing, spread

ALWAYS = 8  # the batch sizes up to this one are tried however slow the model is, and whatever the ones before gave


@memory.kept_between_calls()
def best_throughput(
    run: Callable[[int], Any], *, largest: int = 256, seconds: float = 0.5, gain: float = 0.03, limit_s: float = math.inf
) -> tuple[Reading, int]:
    """The best throughput over batch sizes 1, 2, 4, ..., and the batch size that has it.

    The search ends when memory is full, or, from `ALWAYS` on, when two sizes in a row are no better than the best before them by `gain` or after
    `limit_s`.

    Args:
        run: runs one batch of that many examples and returns when it is done.
        largest: the largest size tried.
        seconds: time spent on each size, three runs at least.
        gain: the relative gain that counts as better.
        limit_s: no further size is begun after so many seconds.

    Returns:
        Examples per second with its interval, and the batch size; None and 0 when not even one example fits.
    """
    best, at, poorer = missing("1/s", "one example did not fit in memory"), 0, 0
    size, until = 1, time.perf_counter() + limit_s
    while size <= largest and (size <= ALWAYS or poorer < 2 and time.perf_counter() < until):
        try:
            rates = _rates(run, size, seconds)
        except (MemoryError, torch.OutOfMemoryError):
            break
        rate = statistics.median(rates)
        if best.value is None or rate > best.value * (1 + gain):
            low, high = spread(rates) or (rate, rate)
            source = f"median of {len(rates)} runs of batch {size}"
            best, at, poorer = Reading(rate, "1/s", min(low, rate), max(high, rate), source=source), size, 0
        else:
            poorer += 1
        size *= 2
    return best, at


def _rates(run: Callable[[int], Any], size: int, seconds: float) -> list[float]:
    run(size)
    rates, until = [], time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        run(size)
        rates.append(size / (time.perf_counter() - start))
    return rates
