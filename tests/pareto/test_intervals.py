"""Intervals against their equations, and against many repetitions of an experiment whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest, t

from paretune.errors import DataError
from paretune.pareto.front import Front
from paretune.pareto.intervals import bootstrap, difference, of_run, over_seeds, resampled, score_interval, wilson
from paretune.reports import words
from tests.pareto.synthetic import record


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


# --- metrics that are no mean over examples -------------------------------------------------------------------------------------


def test_a_bootstrap_of_the_mean_as_a_metric_is_wilson() -> None:
    right = np.array([1.0] * 450 + [0.0] * 50)
    found, how = resampled(lambda drawn: float(right[drawn].mean()), 500)
    low, high = wilson(450, 500)
    assert found == pytest.approx((low, high), abs=0.15 * (high - low)) and how == "over test examples (bootstrap of the metric)"


def test_a_bootstrap_of_a_correlation_is_fishers() -> None:
    """Fisher 1921: artanh r of normal pairs is normal with the deviation 1 / √(n - 3)."""
    first, noise = np.random.default_rng(0).normal(size=(2, 1000))
    second = 0.6 * first + 0.8 * noise
    found, _ = resampled(lambda drawn: float(np.corrcoef(first[drawn], second[drawn])[0, 1]), 1000)
    z, half = math.atanh(np.corrcoef(first, second)[0, 1]), 1.96 / math.sqrt(997)
    low, high = math.tanh(z - half), math.tanh(z + half)
    assert found == pytest.approx((low, high), abs=0.15 * (high - low))


def test_why_there_is_no_interval_is_said() -> None:
    def defined_in(share: float):
        rng = np.random.default_rng(0)
        return lambda drawn: float(np.mean(drawn)) if len(drawn) and rng.random() < share else math.nan

    assert resampled(lambda drawn: 0.5, 1) == (None, "none: a bootstrap needs two test examples")
    assert resampled(lambda drawn: 1.0, 50) == (None, "none: all 500 draws of test examples score the same")
    none, why = resampled(defined_in(0.8), 50)
    assert none is None and "is not defined in" in why
    rows, lost = resampled(defined_in(0.98), 50)
    assert rows is not None and "of 500 draws undefined" in lost
    assert of_run(None, None, rows=50)[0] is None and "takes too long" in of_run(None, None, rows=50)[1]
    assert of_run([1.0, 0.0, 1.0], lambda drawn: 0.0, rows=3) == (wilson(2, 3), "over test examples (Wilson)")


def test_the_interval_holds_the_score_even_of_a_biased_metric() -> None:
    (low, high), _ = resampled(lambda drawn: len(set(drawn)) / 100, 100)  # every draw has fewer different rows than there are
    assert low < high == 1.0


def test_seeds_without_results_by_example_join_their_intervals_with_their_spread() -> None:
    scores = [-0.1, 0.0, 0.1]  # Matthews may be below zero
    seeds = t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert over_seeds(scores, [None, None, (0.0, 0.2)])[0] == pytest.approx((-seeds, seeds))
    joined, how = over_seeds(scores, [(s - 0.2, s + 0.3) for s in scores])
    assert joined == pytest.approx((-math.hypot(0.2, seeds), math.hypot(0.3, seeds))) and how.endswith("in quadrature")
    assert over_seeds([0.5, 0.5], [(0.4, 0.7)] * 2)[0] == pytest.approx((0.4, 0.7))
    assert over_seeds([0.5, 0.5], [None, None]) == (None, "none: all seeds score the same")


def test_a_point_says_what_its_bar_is_over() -> None:
    plain = {"metric": "f1", "per_example": None, "score_low": 0.4, "score_high": 0.6, "score_interval": "over test examples (bootstrap of the metric)"}
    one = Front([record("full") | plain | {"score": 0.5}]).all[0]
    assert one.interval("score") == (0.4, 0.6) and one.summary["score_interval"] == plain["score_interval"]
    point = Front([record("full", seed) | plain | {"score": score} for seed, score in enumerate((0.45, 0.5, 0.55))]).all[0]
    half = math.hypot(0.1, t.ppf(0.975, 2) * 0.05 / math.sqrt(3))
    assert point.interval("score") == pytest.approx((0.5 - half, 0.5 + half)) and "over seeds" in point.summary["score_interval"]
    bare = Front([record("full") | plain | {"score_low": None, "score_high": None, "score_interval": "none: why"}]).all[0]
    assert bare.interval("score") is None and bare.summary["score_interval"] == "none: why"
    said = words.scoring(Front([record("full") | plain, record("head") | plain | {"score_low": None, "score_interval": "none: why"}]))
    assert said.endswith("bars are 95 % intervals over test examples (bootstrap of the metric); no bar where there is no interval (why)")
