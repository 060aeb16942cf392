"""Readings add up, carry their intervals, and refuse sums over what was not measured; a Cost has a reason for every gap."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest

from paretune.errors import MeterError
from paretune.meters.cost import MEASURED, Cost, unmeasured
from paretune.meters.reading import Reading, missing, spread


def test_sum_of_sub_windows_is_the_whole() -> None:
    parts = [Reading(float(v), "J", 0.9 * v, 1.2 * v, source="rapl") for v in range(1, 6)]
    whole = sum(parts)
    assert (whole.value, whole.unit, whole.source) == (15.0, "J", "rapl")
    assert whole.interval == pytest.approx((0.9 * 15, 1.2 * 15))


def test_none_has_a_reason_and_sums_refuse_it() -> None:
    with pytest.raises(MeterError, match="reason"):
        Reading(None, "J")
    for pair in ((Reading(1.0, "J"), missing("J", "no meter")), (missing("J", "no meter"), Reading(1.0, "J"))):
        with pytest.raises(MeterError, match="no meter"):
            sum(pair)
    assert missing("J", "no meter").times(2.0, "kJ") == missing("kJ", "no meter")


def test_units_do_not_mix() -> None:
    with pytest.raises(MeterError, match="J and s"):
        Reading(1.0, "J") + Reading(1.0, "s")


def test_an_estimate_stays_one_and_its_scale_is_folded_in_beside_another_source() -> None:
    guess = Reading(2.0, "J", source="estimate", estimate=True, scale=(0.5, 2.0))
    twice = guess + guess
    assert twice.estimate and twice.scale == (0.5, 2.0) and twice.bounds == (2.0, 8.0)
    mixed = guess + Reading(1.0, "J", source="rapl")
    assert mixed.estimate and mixed.scale == (1.0, 1.0) and mixed.bounds == (2.0, 5.0) and mixed.source == "estimate + rapl"


@pytest.mark.parametrize("wrong", [{"value": math.nan}, {"value": math.inf}, {"value": 1.0, "low": 2.0}, {"value": 1.0, "scale": (2.0, 3.0)}])
def test_impossible_readings_are_refused(wrong: dict) -> None:
    with pytest.raises(MeterError):
        Reading(unit="J", **wrong)


def test_reading_survives_json() -> None:
    reading = Reading(1.0, "J", 0.5, 2.0, "x", estimate=True, protocol="quick", windows=(1.0, 1.1), scale=(0.3, 3.0))
    assert Reading.from_json(json.loads(json.dumps(reading.to_json()))) == reading


def test_spread_holds_the_true_mean_in_95_of_100_draws() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        low, high = spread([math.exp(draw.gauss(0.0, 0.05)) for _ in range(3)])
        held += low <= 1.0 <= high
    assert 0.93 < held / 2000 < 0.97
    assert spread([1.0]) is None


def test_cost_needs_a_reason_for_every_gap() -> None:
    with pytest.raises(MeterError, match="train_s"):
        Cost()
    cost = unmeasured("not run yet")
    assert set(cost.reasons) == set(MEASURED)
    done = dataclasses.replace(cost, train_s=2.0)
    assert done.train_s == 2.0 and "train_s" not in done.reasons


def test_cost_takes_readings_and_survives_json() -> None:
    cost = unmeasured("not run yet").with_readings(
        {"latency_p50_ms": Reading(3.0, "ms", 2.5, 3.5), "energy_per_inference_j": missing("J", "no meter"), "stored_mb": Reading(9.0, "MB")}
    )
    assert cost.intervals == {"latency_p50_ms": [2.5, 3.5]}
    assert cost.reasons["energy_per_inference_j"] == "no meter" and "latency_p50_ms" not in cost.reasons
    assert Cost.from_json(json.loads(json.dumps(cost.to_json()))) == cost
    with pytest.raises(MeterError, match="did you mean latency_p50_ms"):
        Cost.from_json(cost.to_json() | {"latency_p50": 1.0})
    with pytest.raises(MeterError, match="not known"):
        dataclasses.replace(cost, intervals={"joules": [1.0, 2.0]})
