"""Budgets: what is read, what is refused, what fits, which is best, and what is said when nothing fits."""

from __future__ import annotations

import pytest
from pareto.synthetic import record

from paretune.errors import BudgetError
from paretune.pareto import budgets


def plain(recipe: str, score: float, validation: float | None = None, **cost: float | None) -> dict:
    return {"recipe": recipe, "score": score, "validation_score": validation, "cost": {"reasons": {}, "intervals": {}, **cost}}


def test_a_text_and_its_mapping_are_the_same_budget() -> None:
    budget = budgets.parse(" latency_p50_ms = 20 ms,stored_mb=30 , score=0.8,")
    assert budget == budgets.of({"latency_p50_ms": 20, "stored_mb": 30, "score": 0.8})
    assert str(budget) == "latency_p50_ms <= 20, stored_mb <= 30, score >= 0.8"
    assert budgets.parse(budget.text) == budget


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("latency_p50=20", "did you mean latency_p50_ms"),
        ("", "at least one limit"),
        ("stored_mb", "no limit"),
        ("stored_mb=", "positive number of MB"),
        ("stored_mb=small", "'small'"),
        ("stored_mb=30GB", "'30GB'"),
        ("stored_mb=-3", "positive"),
        ("stored_mb=nan", "positive"),
        ("stored_mb=3, stored_mb=4", "given twice"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        budgets.parse(text)


def test_lower_and_higher_quantities_are_limited_from_their_own_side() -> None:
    run = plain("a", 0.85, latency_p50_ms=20.0, throughput_per_s=90.0)
    assert budgets.fits(run, budgets.parse("latency_p50_ms=20, throughput_per_s=90, score=0.85"))
    assert not budgets.fits(run, budgets.parse("throughput_per_s=100"))
    assert not budgets.fits(run, budgets.parse("latency_p50_ms=19.9"))
    assert not budgets.fits(run, budgets.parse("score=0.86"))


def test_what_was_not_measured_never_fits_and_says_so() -> None:
    run = record("full", energy=False)
    (sentence,) = budgets.misses(run, budgets.parse("energy_per_inference_j=1000"))
    assert "not known" in sentence and "nothing here measures energy" in sentence


def test_the_best_is_the_highest_score_then_the_cheapest() -> None:
    runs = [plain("slow", 0.9, latency_p50_ms=30.0), plain("good", 0.8, latency_p50_ms=9.0), plain("better", 0.8, latency_p50_ms=8.0)]
    assert budgets.best(runs, budgets.parse("latency_p50_ms=10")) == 2
    assert budgets.best(runs, budgets.parse("latency_p50_ms=100")) == 0


def test_the_choice_is_made_on_validation_where_all_have_it() -> None:
    runs = [plain("lucky on test", 0.90, 0.80, stored_mb=1.0), plain("good", 0.89, 0.85, stored_mb=1.0)]
    assert budgets.best(runs, budgets.parse("stored_mb=2")) == 1
    runs[1]["validation_score"] = None
    assert budgets.best(runs, budgets.parse("stored_mb=2")) == 0


def test_when_nothing_fits_the_nearest_is_named_with_its_excess() -> None:
    runs = [plain("far", 0.9, stored_mb=90.0), plain("near", 0.8, stored_mb=33.0), plain("unmeasured", 0.95, stored_mb=None)]
    with pytest.raises(BudgetError, match=r"nearest is near, whose stored_mb is 33 MB, 3 MB over the limit of 30 MB"):
        budgets.best(runs, budgets.parse("stored_mb=30"))
    with pytest.raises(BudgetError, match="no runs"):
        budgets.best([], budgets.parse("stored_mb=30"))
