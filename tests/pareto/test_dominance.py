"""Dominance against brute force, hypervolume against boxes and Monte Carlo, the knee against its geometry."""

from __future__ import annotations

import numpy as np
import pytest

from paretune.errors import ParetuneError
from paretune.pareto.dominance import hypervolume, knee, non_dominated


def brute(losses: np.ndarray) -> list[bool]:
    def beats(a: np.ndarray, b: np.ndarray) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))

    return [not any(beats(other, mine) for other in losses) for mine in losses]


@pytest.mark.parametrize("d", [2, 3, 5])
def test_the_mask_is_that_of_comparing_every_two(d: int) -> None:
    rng = np.random.default_rng(d)
    for _ in range(20):
        losses = rng.integers(0, 6, size=(25, d)).astype(float)  # small integers: ties and duplicates happen
        assert non_dominated(losses).tolist() == brute(losses)


def test_a_point_without_a_value_neither_stands_nor_beats() -> None:
    assert non_dominated(np.array([[np.nan, 0.0], [1.0, 1.0], [2.0, 2.0]])).tolist() == [False, True, False]


def test_one_quantity_is_no_dominance() -> None:
    with pytest.raises(ParetuneError, match="two or more"):
        non_dominated(np.zeros((3, 1)))


def test_the_volume_of_one_box_is_the_product_of_its_sides() -> None:
    assert hypervolume(np.array([[1.0, 2.0, 3.0]]), np.array([4.0, 4.0, 4.0])) == pytest.approx(3 * 2 * 1)


def test_two_boxes_by_inclusion_and_exclusion() -> None:
    a, b, worst = np.array([1.0, 3.0, 0.0]), np.array([2.0, 1.0, 2.0]), np.full(3, 5.0)
    union = np.prod(worst - a) + np.prod(worst - b) - np.prod(worst - np.maximum(a, b))
    assert hypervolume(np.array([a, b]), worst) == pytest.approx(union)


def test_points_beyond_the_worst_corner_and_dominated_points_add_nothing() -> None:
    base = np.array([[1.0, 3.0], [3.0, 1.0]])
    more = np.vstack([base, [[3.5, 3.5], [9.0, 0.1]]])
    assert hypervolume(more, np.array([4.0, 4.0])) == hypervolume(base, np.array([4.0, 4.0])) == pytest.approx(5.0)
    assert hypervolume(np.array([[9.0, 9.0]]), np.array([4.0, 4.0])) == 0.0


@pytest.mark.parametrize("d", [2, 3, 4])
def test_the_volume_agrees_with_darts(d: int) -> None:
    rng = np.random.default_rng(d)
    losses, darts = rng.random((12, d)), rng.random((100_000, d))
    share = (losses[None] <= darts[:, None]).all(axis=2).any(axis=1).mean()
    assert hypervolume(losses, np.ones(d)) == pytest.approx(share, abs=5 * np.sqrt(0.25 / len(darts)))


def test_the_worst_corner_needs_every_coordinate() -> None:
    with pytest.raises(ParetuneError, match="worst corner has 1"):
        hypervolume(np.zeros((2, 2)), np.ones(1))


def test_the_knee_is_furthest_from_the_line_between_the_ends() -> None:
    rng = np.random.default_rng(0)
    x = np.sort(rng.random(15)) * 100
    losses = np.stack([x, 1 / (1 + x)], axis=1)
    front = losses[non_dominated(losses)]
    scaled = (front - front.min(axis=0)) / np.ptp(front, axis=0)
    a, b = scaled[0], scaled[-1]
    distance = [abs((b - a)[0] * (a - p)[1] - (b - a)[1] * (a - p)[0]) for p in scaled]
    assert (losses[knee(losses)] == front[int(np.argmax(distance))]).all()


def test_a_knee_needs_a_point() -> None:
    with pytest.raises(ParetuneError, match="no point"):
        knee(np.full((2, 2), np.nan))
