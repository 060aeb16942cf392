"""Cheap to expensive: many recipes on few rows, the better ones on more, and none whose best hope is beaten already.

Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934) by non-dominated ranks, for several objectives (Schmucker et al. 2021, arXiv:2106.12639):

    rows on rung k = R / η^(K - k),  k = 0..K        promote: among the best ⌊n / η⌋ of a rung's n recipes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from paretune.pareto import dominance

ETA = 3  # each rung has so many times the rows of the one below
RUNGS = 3  # at most
LEAST = 64  # training rows of the lowest rung, at least: fewer say nothing
STEPS = 8  # optimizer steps that they make, at least: after fewer a model guesses yet


def rungs(rows: int, *, epochs: float, batch: int) -> tuple[int, ...]:
    """Training rows of each rung, fewest first; the last has all."""
    found = [rows]
    while len(found) < RUNGS and found[0] // ETA >= max(LEAST, STEPS * batch / epochs):
        found.insert(0, found[0] // ETA)
    return tuple(found)


def order(losses: np.ndarray, missed: Sequence[float]) -> list[int]:
    """Indices from best to worst: those that keep all limits first (then by how much they miss them), by non-dominated fronts, by the first loss.

    Args:
        losses: (n, d), lower is better; the first column is the score's.
        missed: of each, by how much it misses its limits, 0 where it keeps them.
    """
    ranks = np.zeros(len(losses), dtype=int)
    rest, rank = list(range(len(losses))), 0
    while rest:
        mask = dominance.non_dominated(losses[rest])
        front = [i for i, stands in zip(rest, mask, strict=True) if stands] or rest  # what has a NaN stands on no front
        for i in front:
            ranks[i] = rank
        rest, rank = [i for i in rest if i not in front], rank + 1
    return sorted(range(len(losses)), key=lambda i: (missed[i], ranks[i], losses[i][0]))


def promotable(best_first: Sequence[str], above: Sequence[str], *, hopeless: Sequence[str] = ()) -> str | None:
    """The best recipe of a rung that may go up and has not: one of the ⌊n / η⌋ best; None where there is none."""
    return next((name for name in best_first[: len(best_first) // ETA] if name not in above and name not in hopeless), None)


def hope(scores: Mapping[int, float], rows: int, *, noise: float = 0.0) -> float:
    """The most that a score can be hoped to reach at `rows`, by its scores at fewer: no doubling of the data buys more than the last one did.

        s(n) ≤ s(n₂) + (s(n₂) - s(n₁))⁺ · log(n / n₂) / log(n₂ / n₁) + noise

    Learning curves that follow a power law a - b n^(-c) keep this bound. One score alone bounds nothing: infinity.
    The score is one of which more is better; `noise` is what chance may have taken from it.
    """
    if len(scores) < 2:
        return float("inf")
    (n1, s1), (n2, s2) = sorted(scores.items())[-2:]
    return s2 + max(0.0, s2 - s1) * float(np.log(rows / n2) / np.log(n2 / n1)) + noise


def beaten(hope: np.ndarray, reached: np.ndarray) -> bool:
    """Is what a recipe can hope for (d,) dominated by one of the losses (n, d) that were reached with all rows?"""
    return bool(len(reached)) and bool(((reached <= hope).all(axis=1) & (reached < hope).any(axis=1)).any())
