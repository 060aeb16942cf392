"""The replay of searchers over a pool: what it pays is what the pool's phases cost, and all of it is found by whoever tries all of it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import search  # noqa: E402

POOL = search.Pool("made up", 300, score=0.4, joules=2.0)


def figures(recipe: str, rows: int) -> dict:
    """Made-up figures: rows and parts of a recipe cost time, packing a little, recipes that begin alike share the training; halving the layers halves the joules."""
    training, *packing = recipe.removeprefix("keep_layers() | ").split(" | ")
    seen = int(hashlib.sha256(recipe.encode()).hexdigest()[:8], 16) / 2**32  # 0 to 1
    halved, packed = recipe.startswith("keep"), "int8" in packing
    phases = [{"id": f"{halved} {training} {rows}", "train_cpu_s": rows * 0.01 * (1 + training.count("+"))}]
    phases += [{"id": f"{recipe} {rows}", "train_cpu_s": 0.01}] if packing else []
    return {
        "score": 0.5 + 0.3 * seen * (rows / POOL.train) ** 0.5 - 0.05 * halved, search.COST: (1.0 - 0.5 * halved) * (1.0 - 0.3 * packed), "stored_mb": 1.0,
        "trainable_parameters": len(training), "structure": f"{halved} {packed}", "measure_cpu_s": 5.0, "other_cpu_s": 0.5, "phases": phases,
    }  # fmt: skip


def test_a_replay_pays_each_phase_and_each_structure_once_and_ends_with_the_pool_s_frontier():
    grid, recipes = search.grid(POOL, figures), search.space().every()
    every = [figures(recipe, POOL.train) for recipe in recipes]
    once = {phase["id"]: phase["train_cpu_s"] for found in every for phase in found["phases"]}
    assert grid[-1][0] == pytest.approx(sum(once.values()) + 4 * 5.0 + 0.5 * len(recipes))
    line = search.replayed(search.Way("random"), POOL, figures, seed=3)
    assert 0.5 * grid[-1][0] < line[-1][0] < grid[-1][0] + 1e-6 and line[-1][1] <= grid[-1][1] + 1e-9  # most of the same pool, in another order
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(line, line[1:], strict=False))


def test_halving_reaches_nearly_all_of_the_pool_s_volume():
    whole = search.grid(POOL, figures)[-1]
    line = search.replayed(search.Way("random", cheap_first=True), POOL, figures, seed=0)
    assert 0.9 * whole[1] < line[-1][1] <= whole[1]
    assert search.cost_to(line, 2 * whole[1]) is None and search.cost_to(line, 0.0) == line[0][0]


def test_a_searcher_of_another_space_and_aim_is_drawn_in_the_same_volume_and_measures_nothing():
    line = search.replayed(search.Way("random", space=search.AUTOPEFT, against="trainable_parameters"), POOL, figures, seed=0)
    alone = [figures(recipe, POOL.train) for recipe in search.read(search.AUTOPEFT).every()]
    whole = sum(phase["train_cpu_s"] for found in alone for phase in found["phases"]) + 0.5 * len(alone)
    assert 0.5 * whole < line[-1][0] < whole + 1e-6
    assert any(line[-1][1] == pytest.approx((found["score"] - POOL.score) * (POOL.joules - 1.0)) for found in alone)
