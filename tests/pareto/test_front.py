"""The front: grouping, the means, the charge, the reference, the best under a budget and the ledger."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from pareto.synthetic import BUSY_W, EXAMPLES, IDLE_W, RECIPES, record, records

from paretune.errors import BudgetError, DataError, StoreError
from paretune.pareto import ledger
from paretune.pareto.front import Front
from paretune.store import Run


@pytest.fixture(scope="module")
def front() -> Front:
    return Front(records(), "15 Wh", rate="1/s")


def test_the_runs_of_a_recipe_are_one_point_with_their_mean(front: Front) -> None:
    assert [p.recipe for p in front.all] == list(RECIPES)
    point = next(p for p in front.all if p.recipe == "lora(r=8)")
    runs = [record("lora(r=8)", seed) for seed in range(3)]
    assert point.seeds == (0, 1, 2)
    assert point.value("score") == pytest.approx(statistics.fmean(r["score"] for r in runs))
    assert point.value("latency_p50_ms") == pytest.approx(statistics.fmean(r["cost"]["latency_p50_ms"] for r in runs))
    for name in ("score", "latency_p50_ms", "inferences_per_charge"):
        low, high = point.interval(name)
        assert low < point.value(name) < high
    assert point.interval("stored_mb") is None  # the same in every run


def test_a_run_given_twice_counts_once() -> None:
    runs = [record("full"), record("full")]
    assert Front(runs).all[0].seeds == (0,)


def test_inferences_per_charge_follow_the_equation(front: Front) -> None:
    usable = 15 * 3600 * 0.85
    for point in front.all:
        net = point.value("latency_p50_ms") / 1000 * (BUSY_W - IDLE_W)
        assert point.value("inferences_per_charge") == pytest.approx(usable / (IDLE_W + net))
    saturated = Front(records(1), "15 Wh").all[0]
    assert saturated.value("inferences_per_charge") == pytest.approx(usable / saturated.value("energy_per_inference_j"))


def test_without_idle_power_a_rate_gives_the_saturated_curve() -> None:
    runs = records(1)
    for run in runs:
        run["cost"]["meter"]["idle_w"] = None
    front = Front(runs, "15 Wh", rate="1/s")
    assert front.rate_per_s is None and front.asked_rate_per_s == 1.0
    assert front.all[0].value("inferences_per_charge") == Front(runs, "15 Wh").all[0].value("inferences_per_charge")


def test_what_is_missing_stays_missing_with_its_reason() -> None:
    point = Front(records(2, energy=False), "15 Wh").all[0]
    assert point.value("inferences_per_charge") is None and "nothing here measures energy" in point.reason("inferences_per_charge")
    assert "no battery" in Front(records(1)).all[0].reason("inferences_per_charge")


def test_runs_measured_with_different_meters_have_no_mean_energy() -> None:
    point = Front([record("full", 0), record("full", 1, estimate=False)], "15 Wh").all[0]
    assert "different meters (estimate, rapl)" in point.reason("energy_per_inference_j")
    assert point.value("latency_p50_ms") is not None


def test_the_frontier_is_unbeaten_and_in_order(front: Front) -> None:
    stands = front.frontier("latency_p50_ms")
    assert stands == sorted(stands, key=lambda p: p.value("latency_p50_ms"))
    for point in front.all:
        beaten = any(o.value("latency_p50_ms") < point.value("latency_p50_ms") and o.value("score") > point.value("score") for o in front.all)
        assert beaten == (point not in stands)
    assert front.knee("latency_p50_ms") in stands
    assert len(front.frontier("latency_p50_ms", "score", "stored_mb")) >= len(stands)
    with pytest.raises(BudgetError, match="did you mean"):
        front.frontier("latency_p50")


def test_the_hypervolume_grows_with_the_points(front: Front) -> None:
    worst = {"latency_p50_ms": 50.0, "score": 0.5}
    some = Front([r for r in records() if r["recipe"] in ("head", "full")])
    best = max(p.value("score") for p in front.all)
    fastest = min(p.value("latency_p50_ms") for p in front.all)
    assert 0 < some.hypervolume(worst) < front.hypervolume(worst) < (50 - fastest) * (best - 0.5)


def test_under_gives_back_what_was_given_of_the_best_point(front: Front) -> None:
    best = front.under(latency_p50_ms=8, stored_mb=60)
    assert best["recipe"] == 'full | cast(dtype="bf16")' and best["seed"] == 2  # the highest validation score
    assert front.under_text("latency_p50_ms=8, stored_mb=60") is best

    given = [Run(Path("runs") / run["id"], run) for run in records(1)]
    assert Front(given).under(stored_mb=30) in given


def test_a_metric_that_is_better_low_turns_everything_around() -> None:
    runs = [record(recipe) | {"metric": "perplexity", "score": score, "validation_score": score, "per_example": None, "score_low": None}
            for recipe, score in (("full", 9.0), ("head", 20.0), ("lora(r=8)", 12.0))]  # fmt: skip
    front = Front(runs)
    assert front.frontier("latency_p50_ms")[-1].recipe == "full"
    assert front.under(stored_mb=100)["recipe"] == "full"
    assert front.under_text("score=10")["recipe"] == "full"
    with pytest.raises(BudgetError, match="score <= 5.*4 over the limit of 5"):
        front.under(score=5)


def test_the_reference_is_full_fine_tuning_alone(front: Front) -> None:
    assert front.reference.recipe == "full"
    scheduled = record("full") | {"recipe": "full + schedule(epochs=3)"}
    assert Front([scheduled, record("full | int8")]).reference.recipe == "full + schedule(epochs=3)"
    assert Front([record("full | int8")]).reference is None


def test_the_paired_difference_knows_the_order(front: Front) -> None:
    head = front.all[0]
    difference, low, high = front.difference(head, front.reference)
    assert low < difference < high < 0 and difference == pytest.approx(head.value("score") - front.reference.value("score"))


def test_results_are_read_from_the_run_folders(tmp_path: Path) -> None:
    run = record("full")
    results, run["per_example"] = run["per_example"], "per_example.json"
    file = tmp_path / "runs" / run["id"] / "per_example.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(results))
    assert len(Front([run], folder=tmp_path).all[0].results[0]) == EXAMPLES
    alone = Front([run]).all[0]
    assert alone.results is None and alone.interval("score") == pytest.approx((run["score_low"], run["score_high"]))
    file.write_text("[1.0, ")
    with pytest.raises(StoreError, match="damaged"):
        Front([run], folder=tmp_path)


def test_results_that_are_not_the_metric_are_left_out() -> None:
    run = record("full") | {"score": 0.5, "score_low": 0.4, "score_high": 0.6}
    assert Front([run]).all[0].interval("score") == pytest.approx((0.4, 0.6))


def test_different_tasks_are_refused() -> None:
    with pytest.raises(DataError, match="different metric"):
        Front([record("full"), record("head") | {"metric": "f1"}])
    with pytest.raises(BudgetError, match="at least one run"):
        Front([])


def test_the_ledger_counts_a_shared_phase_once_and_its_product_is_the_sum() -> None:
    runs = [record("lora(r=8)"), record("lora(r=8) | merge"), record("full")]
    book = ledger.of(runs)
    trainings = [run["phases"][0] for run in (runs[0], runs[2])]
    total = sum(phase["train_flops"] for phase in trainings)
    assert (book.h_trainings, book.phases, book.runs) == (2, 3, 3)
    assert book.d_examples == trainings[0]["examples"]
    assert book.e_flops == pytest.approx(total / sum(p["examples"] for p in trainings))
    assert book.edh_flops == pytest.approx(total) == pytest.approx(book.spent["train_flops"])
    assert book.unshared["train_flops"] == pytest.approx(total + trainings[0]["train_flops"])
    assert book.unshared["train_s"] == pytest.approx(sum(run["cost"]["train_s"] for run in runs))


def test_a_sum_over_what_was_not_measured_is_not_measured() -> None:
    book = ledger.of(records(1, energy=False))
    assert book.spent["train_energy_j"] is None and "nothing here measures energy" in book.reasons["train_energy_j"]
    assert book.spent["train_s"] > 0


def test_runs_that_share_one_measurement_keep_its_interval() -> None:
    runs = [record("full", seed) for seed in range(3)]
    for run in runs:
        run["cost"] = dict(runs[0]["cost"])
    assert Front(runs).all[0].interval("latency_p50_ms") == tuple(runs[0]["cost"]["intervals"]["latency_p50_ms"])
