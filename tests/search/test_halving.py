"""Successive halving, its ranks and its bound, against definitions and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from paretune.searches import halving
from paretune.searches.aims import Aims
from paretune.searches.journal import Entry


def test_rungs_divide_by_three_and_stay_above_the_least():
    assert halving.rungs(9000, epochs=3, batch=32) == (1000, 3000, 9000)
    assert halving.rungs(300, epochs=3, batch=32) == (100, 300)
    assert halving.rungs(300, epochs=1, batch=32) == (300,)  # 100 rows would make three steps
    assert halving.rungs(100, epochs=3, batch=1) == (100,)


def test_the_order_is_by_limits_then_fronts_then_score():
    rng = np.random.default_rng(0)
    losses, missed = rng.integers(0, 5, (40, 2)).astype(float), rng.choice([0.0, 0.0, 0.3], 40)

    def rank(i: int, among: frozenset[int]) -> int:
        """How many fronts are peeled off before i stands on one; by the definition of dominance."""
        beaten = {j for j in among if any((losses[k] <= losses[j]).all() and (losses[k] < losses[j]).any() for k in among)}
        return 0 if i not in beaten else 1 + rank(i, frozenset(beaten))

    keys = [(missed[i], rank(i, frozenset(range(40))), losses[i][0]) for i in range(40)]
    ordered = halving.order(losses, missed)
    assert [keys[i] for i in ordered] == sorted(keys)


def test_a_third_of_a_rung_goes_up_the_best_first():
    names = list("abcdefg")
    assert halving.promotable(names, []) == "a"
    assert halving.promotable(names, ["a"]) == "b"
    assert halving.promotable(names, ["a", "b"]) is None  # ⌊7 / 3⌋ = 2
    assert halving.promotable(names, ["a"], hopeless=["b"]) is None
    assert halving.promotable(names[:2], []) is None


@pytest.mark.parametrize("power", [0.1, 0.5, 1.0, 2.0])
def test_no_power_law_exceeds_what_is_hoped_of_it(power):
    def curve(n: float) -> float:
        return 0.93 - 2.0 * n**-power

    bound = halving.hope({100: curve(100), 300: curve(300)}, 2700)
    assert bound >= curve(2700)
    assert bound == pytest.approx(curve(300) + 2 * (curve(300) - curve(100)))  # two factors of 3 are left, one was seen
    assert halving.hope({100: 0.5}, 900) == math.inf
    assert halving.hope({100: 0.6, 300: 0.5}, 900, noise=0.01) == pytest.approx(0.51)  # a curve that fell is hoped to stay


def entry(recipe: str, rows: int, score: float, stored_mb: float) -> Entry:
    return Entry("trial", recipe, rows, state="complete", metric="accuracy", score=score, cost={"stored_mb": stored_mb, "reasons": {}})


def test_a_recipe_whose_best_hope_is_beaten_goes_no_further():
    aims = Aims("accuracy", ("stored_mb",), None, validation=10_000)  # noise 0.01
    best = entry("best", 900, 0.9, 50.0)
    slow = [entry("slow", 100, 0.60, 60.0), entry("slow", 300, 0.65, 60.0)]  # hope 0.71
    steep = [entry("steep", 100, 0.50, 60.0), entry("steep", 300, 0.72, 60.0)]  # hope 0.95
    small = [entry("small", 100, 0.60, 20.0), entry("small", 300, 0.65, 20.0)]  # cheaper than the best
    fresh = [entry("fresh", 100, 0.10, 60.0)]  # one score bounds nothing
    assert aims.hopeless([best, *slow, *steep, *small, *fresh], 900) == ["slow"]
    assert aims.hopeless([*slow, *steep], 900) == []  # nothing has seen all rows
    assert Aims("perplexity", ("stored_mb",)).hopeless([best, *slow], 900) == []
