"""Intervals against their equations, and against many repetitions of an experiment whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from paretune.errors import DataError
from paretune.pareto.intervals import bootstrap, difference, score_interval, wilson


def draw(rng: np.random.Generator, skill: float, easiness: np.ndarray, seeds: int, seed_sd: float = 0.02) -> np.ndarray:
    """0/1 results (seeds, examples): hard examples are hard for every seed, and each seed is a little better or worse."""
    chance = np.clip(skill + easiness[None] + rng.normal(0, seed_sd, (seeds, 1)), 0, 1)
    return (rng.random(chance.shape) < chance).astype(float)


@pytest.mark.parametrize(("right", "total"), [(0, 10), (7, 10), (300, 340), (340, 340)])
def test_wilson_is_scipys(right: int, total: int) -> None:
    assert wilson(right, total) == pytest.approx(tuple(binomtest(right, total).proportion_ci(method="wilson")), abs=1e-12)


def test_one_seed_of_zeros_and_ones_gets_wilson() -> None:
    results = [1.0] * 90 + [0.0] * 10
    assert score_interval([results]) == wilson(90, 100)


def test_without_spread_over_seeds_the_bootstrap_is_the_binomial_one() -> None:
    row = [1.0] * 800 + [0.0] * 200
    low, high = bootstrap([row, row, row])
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.002)


def test_the_same_seed_gives_the_same_interval() -> None:
    results = draw(np.random.default_rng(0), 0.8, np.zeros(100), 3)
    assert bootstrap(results, seed=1) == bootstrap(results, seed=1) != bootstrap(results, seed=2)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng, inside, trials = np.random.default_rng(0), 0, 200
    for _ in range(trials):
        easiness = rng.choice([-0.5, 0.1], p=[1 / 6, 5 / 6], size=300)  # mean 0
        low, high = bootstrap(draw(rng, 0.8, easiness, 3, 0.02), resamples=500)
        inside += low <= 0.8 <= high
    assert 0.91 <= inside / trials <= 0.995  # 0.95 within three standard errors, wide allowed rather than narrow


def test_a_paired_difference_is_narrower_than_an_unpaired_one_and_holds_the_truth() -> None:
    rng, inside, trials = np.random.default_rng(1), 0, 100
    for _ in range(trials):
        easiness = rng.choice([-0.6, 0.15], p=[0.2, 0.8], size=300)
        a, b = draw(rng, 0.82, easiness, 3, 0.01), draw(rng, 0.80, easiness, 3, 0.01)
        _, low, high = difference(a, b, resamples=500)
        inside += low <= 0.02 <= high
        unpaired = difference(a, b[:, rng.permutation(300)], resamples=500)
    assert inside / trials >= 0.9
    assert high - low < unpaired[2] - unpaired[1]


def test_a_recipe_does_not_differ_from_itself() -> None:
    row = [1.0, 0.0, 1.0, 1.0]
    assert difference([row], [row]) == (0.0, 0.0, 0.0)


def test_rows_of_other_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="equally long"):
        bootstrap([[1.0, 0.0], [1.0]])
    with pytest.raises(DataError, match="same test examples"):
        difference([[1.0, 0.0]], [[1.0]])
