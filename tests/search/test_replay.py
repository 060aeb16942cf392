"""The replay of searchers over a pool: what it pays is what the pool's phases cost, and all of it is found by whoever tries all of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pool
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import search  # noqa: E402


def figures(recipe: str, rows: int) -> dict:
    """Made-up figures: training costs by rows and rank, packing a little, and both recipes of a pair share the training."""
    training = {"id": f"{recipe.partition(' | ')[0]} {rows}", "train_cpu_s": rows * pool.per_row_s(recipe), "examples": rows}
    packing = {"id": f"{recipe} {rows}", "train_cpu_s": 0.01, "examples": 0}
    return {"stored_mb": pool.stored_mb(recipe), "validation_score": pool.score(recipe, rows), "phases": [training, packing] if " | " in recipe else [training]}


def test_a_replay_pays_each_phase_once_and_ends_with_the_pool_s_frontier():
    grid = search.grid(figures)
    recipes = search.pool().every()
    once = {phase["id"]: phase["train_cpu_s"] for recipe in recipes for phase in figures(recipe, search.RUNGS[-1])["phases"]}
    assert grid[-1][0] == pytest.approx(sum(once.values()))
    line = search.replayed(search.Way("random", search.RUNGS[-1:]), figures, seed=3)
    assert line[-1] == pytest.approx(grid[-1]) and line != grid  # the same pool in another order
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(line, line[1:], strict=False))


def test_halving_reaches_nearly_all_of_the_pool_s_volume():
    whole = search.grid(figures)[-1]
    line = search.replayed(search.Way("random", search.RUNGS), figures, seed=0)
    assert 0.95 * whole[1] < line[-1][1] <= whole[1]
    assert search.cost_to(line, 2 * whole[1]) is None and search.cost_to(line, 0.0) == line[0][0]
