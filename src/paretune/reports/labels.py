"""Where labels stand in a picture: near their points, off each other, off the points and inside the frame."""

from __future__ import annotations

import numpy as np

_ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_RADII = (7.0, 14.0, 24.0, 38.0, 56.0, 80.0, 110.0, 150.0)
_SWEEPS, _STARTS = 8, 12
_LABEL, _BLOCK, _OUT, _FAR, _CROSSED = 8.0, 2.0, 2000.0, 1.5, 400.0  # what a pixel of each evil costs, and a crossed label


def place(anchors: np.ndarray, sizes: np.ndarray, *, frame: np.ndarray, obstacles: np.ndarray) -> np.ndarray:
    """The centers (n, 2) of label boxes.

    Each label in turn tries positions on rings around its point and takes the one that overlaps least, crosses no other label with
    its leader and lies nearest; a few sweeps let early ones make room for late ones, and the best of several orders wins.

    Args:
        anchors: (n, 2) the points, in pixels.
        sizes: (n, 2) width and height of the labels, in pixels.
        frame: (4,) left, bottom, right and top, which labels stay inside.
        obstacles: (m, 4) boxes left, bottom, right, top that labels keep off: markers, bars, lines.
    """
    rng = np.random.default_rng(0)
    orders = [_crowded_first(anchors)] + [rng.permutation(len(anchors)) for _ in range(_STARTS - 1)]
    return min((_settle(order, anchors, sizes, frame, obstacles) for order in orders), key=lambda found: found[1])[0]


def _settle(order: np.ndarray, anchors: np.ndarray, sizes: np.ndarray, frame: np.ndarray, obstacles: np.ndarray) -> tuple[np.ndarray, float]:
    """The centers that sweeps in this order end with, and what they cost."""
    rings = np.array([(r * np.cos(a), r * np.sin(a)) for r in _RADII for a in _ANGLES])
    far = _FAR * np.repeat(np.array(_RADII), len(_ANGLES))
    # a ring's position is that of the box's nearest edge, so that wide labels stand beside their point and not on it
    push = np.sign(np.round(rings, 6)) * _sideways(rings) / 2
    centers = np.array(anchors, dtype=float)
    placed, costs = np.zeros(len(anchors), dtype=bool), np.zeros(len(anchors))
    for _ in range(_SWEEPS):
        before = centers.copy()
        for i in order:
            tries = anchors[i] + rings + push * sizes[i]
            boxes = np.hstack([tries - sizes[i] / 2, tries + sizes[i] / 2])  # (tries, 4)
            others = placed & (np.arange(len(anchors)) != i)
            labels = np.hstack([centers[others] - sizes[others] / 2 - 1, centers[others] + sizes[others] / 2 + 1])
            cost = _LABEL * _overlap(boxes, labels) + _BLOCK * _overlap(boxes, obstacles) + _OUT * _outside(boxes, frame) + far
            cost += _CROSSED * _crossed(anchors[i], tries, labels)
            centers[i], costs[i], placed[i] = tries[cost.argmin()], cost.min(), True
        if (before == centers).all():
            break
    return centers, float(costs.sum())


def _sideways(rings: np.ndarray) -> np.ndarray:
    """How much of the box's half size to add in x and in y, so that its edge touches the ring."""
    direction = np.abs(rings) / np.linalg.norm(rings, axis=1, keepdims=True)
    return np.minimum(1.0, direction / direction.max(axis=1, keepdims=True))


def _crowded_first(anchors: np.ndarray) -> np.ndarray:
    gaps = np.linalg.norm(anchors[:, None] - anchors[None], axis=2)
    return np.exp(-gaps / 60).sum(axis=1).argsort(kind="stable")[::-1]


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The area (n,) that each box shares with all the others."""
    if not len(others):
        return np.zeros(len(boxes))
    low, high = np.maximum(boxes[:, None, :2], others[None, :, :2]), np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2).sum(axis=1)


def _crossed(anchor: np.ndarray, tries: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many labels (n,) the straight line from the point to each position runs through, by samples on its way."""
    ways = anchor + np.linspace(0.1, 0.6, 6)[:, None, None] * (tries - anchor)  # (6, n, 2)
    inside = (ways[:, :, None] > labels[None, None, :, :2]).all(axis=3) & (ways[:, :, None] < labels[None, None, :, 2:]).all(axis=3)
    return inside.any(axis=0).sum(axis=1)


def _outside(boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    over = np.hstack([frame[:2] - boxes[:, :2], boxes[:, 2:] - frame[2:]])
    return np.clip(over, 0, None).sum(axis=1)
