"""Dominance: which points no other point beats, how much space they cover, and where the curve bends.

All functions take losses, an array (n, d) in which lower is better in every column (`records.losses` makes it from records).
A point dominates another if it is nowhere worse and somewhere better.
"""

from __future__ import annotations

import numpy as np

from paretune.errors import ParetuneError


def non_dominated(losses: np.ndarray) -> np.ndarray:
    """A mask (n,) of the points that no other point dominates; equal points stand or fall together, a point with a NaN never stands."""
    losses = _table(losses)
    known = ~np.isnan(losses).any(axis=1)
    # (n, n): [i, j] says that j is nowhere worse than i, and somewhere better
    nowhere_worse = (losses[None, :, :] <= losses[:, None, :]).all(axis=2)
    somewhere_better = (losses[None, :, :] < losses[:, None, :]).any(axis=2)
    return known & ~(nowhere_worse & somewhere_better).any(axis=1)


def hypervolume(losses: np.ndarray, worst: np.ndarray) -> float:
    """The volume between the points and the corner `worst` (d,), in the product of the quantities' units.

    Exact, by slicing along the last column (While et al. 2006, "A faster algorithm for calculating hypervolume"): good for
    tens of points in a few dimensions. Points that are not better than `worst` everywhere add nothing.
    """
    losses, worst = _table(losses), np.asarray(worst, dtype=float)
    if worst.shape != losses.shape[1:]:
        raise ParetuneError(f"hypervolume: the worst corner has {worst.size} coordinates, the points {losses.shape[1]}; give one for each quantity")
    return _volume(losses[(losses < worst).all(axis=1)], worst)


def knee(losses: np.ndarray) -> int:
    """The index of the knee: the non-dominated point with the smallest sum of losses, each scaled to 0..1 over the frontier.

    In two dimensions this is the point furthest below the line between the frontier's two ends. Give logarithms where a
    column spans orders of magnitude.
    """
    losses = _table(losses)
    (front,) = np.nonzero(non_dominated(losses))
    if not front.size:
        raise ParetuneError("knee: there is no point that has all of the quantities; choose others")
    low, high = losses[front].min(axis=0), losses[front].max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    return int(front[((losses[front] - low) / span).sum(axis=1).argmin()])


def _table(losses: np.ndarray) -> np.ndarray:
    losses = np.asarray(losses, dtype=float)
    if losses.ndim != 2 or losses.shape[1] < 2:
        raise ParetuneError(f"dominance compares points in two or more quantities, an array (points, quantities); this one is {losses.shape}")
    return losses


def _volume(losses: np.ndarray, worst: np.ndarray) -> float:
    if not len(losses):
        return 0.0
    if losses.shape[1] == 1:
        return float(worst[0] - losses.min())
    losses = losses[losses[:, -1].argsort(kind="stable")]
    heights = np.diff(np.append(losses[:, -1], worst[-1]))
    # a slice at the height of point k holds the points up to k, one dimension down
    return float(sum(h * _volume(losses[: k + 1, :-1], worst[:-1]) for k, h in enumerate(heights) if h > 0))
