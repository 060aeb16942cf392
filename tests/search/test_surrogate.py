"""The model that proposes: its hypervolume against the exact one, its predictions against closed forms, its proposals against chance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from paretune.pareto import dominance
from paretune.searches import surrogate
from paretune.searches.space import read
from paretune.searches.surrogate import Answer

SPACE = read("{none, keep_layers()} | {lora(r={2, 8, 32}, targets={linear, attention}), adapter(bottleneck=[8..64 log])} + schedule(lr=[1e-4..1e-2 log])")


@pytest.mark.parametrize("d", [2, 3])
def test_the_mean_over_directions_is_the_exact_hypervolume(d):
    chance = np.random.default_rng(0)
    points = chance.random((6, d))
    ways = surrogate.directions(200_000, d, chance=chance)
    factor = math.pi ** (d / 2) / (2**d * math.gamma(d / 2 + 1))
    exact = dominance.hypervolume(points, np.ones(d))
    assert factor * surrogate.scalarized(1 - points, ways).max(0).mean() == pytest.approx(exact, rel=0.02)
    assert surrogate.scalarized(points[:1] - 2, ways).max() == 0  # worse than the corner


def test_predictions_are_known_where_answers_are_and_the_mean_with_all_doubt_far_away():
    known = np.array([[x, 0.0] for x in np.linspace(-0.5, 0.5, 9)])
    y = 3 + np.sin(4 * known[:, 0])
    mean, doubt = surrogate.predicted(known, y, at=np.vstack([known, [[60.0, 60.0]]]), sizes=[2])
    assert mean[:-1] == pytest.approx(y, abs=0.05) and (doubt[:-1] < 0.1).all()
    assert mean[-1] == pytest.approx(y.mean()) and doubt[-1] == pytest.approx(y.std())
    between, _ = surrogate.predicted(known, y, at=np.array([[0.07, 0.0]]), sizes=[2])
    assert between[0] == pytest.approx(3 + math.sin(0.28), abs=0.05)


def test_what_does_not_matter_is_forgotten():
    chance = np.random.default_rng(1)
    known, at = chance.random((30, 6)), chance.random((50, 6))
    mean, _ = surrogate.predicted(known, 2 * known[:, 3], at=at, sizes=[1] * 6)
    assert np.abs(mean - 2 * at[:, 3]).mean() < 0.1 < np.abs(2 * at[:, 3] - 2 * known[:, 3].mean()).mean()


def test_values_as_vectors_numbers_in_order_and_what_is_lacking_apart_from_all():
    r, targets, lr = surrogate.Hole(choices=("2", "32", "8")), surrogate.Hole(choices=("linear", "ffn")), surrogate.Hole(1e-4, 1e-2, log=True)
    assert [r.vector(v)[0] for v in ("2", "8", "32")] == [-0.5, 0.0, 0.5] and lr.vector(1e-3) == [pytest.approx(0.0), 0.0]
    assert np.subtract(targets.vector("linear"), targets.vector("ffn")) @ np.subtract(targets.vector("linear"), targets.vector("ffn")) == pytest.approx(1)
    assert r.vector(None) == [0.0, surrogate.APART] and targets.vector(None) == [0.0, 0.0]


def losses(params: dict) -> list[float]:
    """Made up: half the layers cost half the time and some score; a rate of 1e-3 and large ranks are best; adapters are dear."""
    halved = "keep_layers()" in params.values()
    score = 0.9 - 0.1 * halved - 0.1 * abs(math.log10(next(v for k, v in params.items() if "lr" in k)) + 3) + 0.02 * ("32" in params.values())
    return [-score, math.log((0.5 if halved else 1.0) * (1.3 if any("bottleneck" in k for k in params) else 1.0))]


def searched(n: int, seed: int, *, model: bool) -> float:
    """The hypervolume of n draws."""
    answers: list[Answer] = []
    for k in range(n):
        asked = surrogate.Asked(1000 * seed + k, {})
        SPACE.draw(asked)
        params = asked.params
        if model and k >= 4:
            params = surrogate.best(SPACE.draw, answers, tried=[a.params for a in answers], fixed={}, aim={}, limits=[math.inf, math.inf], seed=k)
            assert params not in [a.params for a in answers]
        answers.append(Answer(params, losses(params), 1.0))
    return dominance.hypervolume(np.array([a.losses for a in answers]), np.array([0.0, 0.5]))


def test_it_finds_more_than_chance_does():
    ours, chance = ([searched(14, seed, model=model) for seed in range(4)] for model in (True, False))
    assert np.mean(ours) > np.mean(chance) + 0.02 and min(ours) > np.median(chance)


def test_the_same_seed_proposes_the_same_and_what_is_fixed_stays():
    answers = []
    for k in range(6):
        asked = surrogate.Asked(k, {})
        SPACE.draw(asked)
        answers.append(Answer(asked.params, losses(asked.params), 1.0))
    lr = next(name for name in answers[0].params if "lr" in name)
    given = {"fixed": {lr: 0.002}, "aim": {}, "limits": [math.inf, math.log(0.7)], "seed": 3}
    one, again = (surrogate.best(SPACE.draw, answers, tried=[a.params for a in answers], **given) for _ in range(2))
    assert one == again and one[lr] == 0.002
    assert losses(one)[1] < math.log(0.7)  # within the limit
    assert surrogate.leaves_open(SPACE.draw, {lr: 0.002}) and not surrogate.leaves_open(SPACE.draw, one)
    assert surrogate.Asked(0, {lr: 7.0}).suggest_float(lr, low=1e-4, high=1e-2) <= 1e-2  # a value out of its range is no value of it
