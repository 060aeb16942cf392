"""The measuring protocol on loads of known length and a device of known watts, both on a clock of their own."""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import platform
import random
import statistics
import time
from collections.abc import Callable

import psutil
import pytest
import torch

from paretune.errors import MeterError
from paretune.meters import clock, memory, protocol, system
from paretune.meters.clock import Moment
from paretune.meters.cost import unmeasured
from paretune.meters.estimate import Estimate, Power
from paretune.meters.meter import Meter, NoMeter
from paretune.meters.reading import Reading, missing
from paretune.meters.throughput import best_throughput

SHORT = dataclasses.replace(protocol.QUICK, window_s=1.0, window_n=50, idle_s=4.0)


class Device(Meter):
    """A simulated device: 2 W at rest (drifting upwards if told so) and a share more when a model runs; time passes only when it works or sleeps."""

    name, source, measures_idle = "simulated", "a simulated device", True

    def __init__(self, drift_w_per_s: float = 0.0) -> None:
        self.now_s, self.joules, self.drift = 0.0, 0.0, drift_w_per_s
        self.brackets = self.settled = 0

    def spend(self, seconds: float, watts: float) -> None:
        idle = 2.0 + self.drift * (self.now_s + seconds / 2)
        self.now_s += seconds
        self.joules += (idle + watts) * seconds

    def model(self, seconds: float, watts: float) -> Callable[[], None]:
        def call() -> None:
            self.spend(seconds, watts)

        return call

    def now(self) -> Moment:
        return Moment(self.now_s, self.now_s, self.now_s, self.now_s, {"j": self.joules})

    def between(self, start: Moment, end: Moment) -> Reading:
        return Reading(end.counters["j"] - start.counters["j"], "J", source=self.source)

    def bracket(self) -> None:
        self.brackets += 1

    def settle(self, end: Moment) -> None:
        self.settled += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(time, "perf_counter", lambda: device.now_s)
    monkeypatch.setattr(time, "sleep", lambda seconds: device.spend(seconds, 0.0))
    monkeypatch.setattr(clock, "others", lambda start, end: 0.0)
    return device


def test_latency_energy_gross_and_net(device: Device) -> None:
    models = {"small": device.model(0.02, 3.0), "large": device.model(0.06, 4.0)}
    found = protocol.measure(models, device, protocol=SHORT)
    for name, seconds, watts in (("small", 0.02, 3.0), ("large", 0.06, 4.0)):
        timing = found[name]
        assert timing.latency_p50_ms.value == pytest.approx(1e3 * seconds) == timing.latency_p95_ms.value
        assert timing.energy_j.value == pytest.approx((2 + watts) * seconds)
        assert timing.net_energy_j.value == pytest.approx(watts * seconds)
        assert timing.meter["idle_w"] == pytest.approx(2.0) and timing.meter["busy_w"] == pytest.approx(2 + watts)
        assert timing.energy_j.protocol == "quick" and len(timing.windows) == 3 and timing.aa_wall < 1e-9
    assert (device.brackets, device.settled) == (2, 1)
    assert unmeasured("x").with_readings(found["small"].readings()).energy_per_inference_j == pytest.approx(0.1)


def test_windows_end_by_time_or_count_and_models_take_turns(device: Device) -> None:
    models = {name: device.model(seconds, 1.0) for name, seconds in (("a", 0.001), ("b", 0.1))}
    done: list[tuple[int, int]] = []
    found = protocol.measure(models, device, protocol=SHORT, progress=lambda *at: done.append(at))
    assert [len(window.calls_s) for window in found["a"].windows] == [50] * 3
    assert [len(window.calls_s) for window in found["b"].windows] == [pytest.approx(10, abs=1)] * 3
    order = sorted((window.start.wall_s, name) for name, timing in found.items() for window in timing.windows)
    assert "".join(name for _, name in order) == "abbaab"  # there and back, so that a linear drift cancels
    assert done == [(i, 6) for i in range(1, 7)]


def test_drifting_idle_power_is_interpolated(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    device.drift = 0.01
    full = dataclasses.replace(protocol.FULL, window_s=5.0, window_n=1000, idle_s=2.0)
    found = protocol.measure({"m": device.model(0.05, 3.0)}, device, protocol=full)["m"]
    assert found.net_energy_j.value == pytest.approx(0.15, rel=1e-3)
    assert found.net_energy_j.windows == pytest.approx([0.15] * 5, rel=1e-3)


def test_a_coarse_meter_gets_longer_windows(device: Device) -> None:
    device.least_s = 7.0
    found = protocol.measure({"m": device.model(0.01, 1.0)}, device, protocol=SHORT)["m"]
    assert all(window.wall_s >= 7.0 for window in found.windows)


def test_other_processes_load_flags_windows(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([0.5, 0.0, 0.0])
    monkeypatch.setattr(clock, "others", lambda start, end: next(loads))
    found = protocol.measure({"m": device.model(0.01, 1.0)}, device, protocol=SHORT)["m"]
    assert "1 of 3 windows" in found.note and "left out" in found.note
    assert len(found.windows) == 3 and len(found.latency_p50_ms.windows) == 2


def test_energy_is_none_where_nothing_measures(device: Device) -> None:
    found = protocol.measure({"m": device.model(0.01, 1.0)}, NoMeter("no meter here"), protocol=SHORT)["m"]
    assert found.energy_j.value is None and found.energy_j.reason == found.net_energy_j.reason == "no meter here"
    assert found.latency_p50_ms.value == pytest.approx(10.0)
    with pytest.raises(MeterError, match="no model"):
        protocol.measure({})


def test_a_window_that_failed_fails_the_energy(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "between", lambda start, end: missing("J", "gap in the log"))
    assert protocol.measure({"m": device.model(0.01, 1.0)}, device, protocol=SHORT)["m"].energy_j.reason == "gap in the log"


def test_estimate_on_a_real_load_is_the_formula() -> None:
    """On the real clock: gross less net is the stated idle power times the time one inference takes."""
    short = dataclasses.replace(protocol.QUICK, window_s=0.05, windows=2)
    found = protocol.measure({"m": lambda: sum(range(20_000))}, Estimate(Power.parse("idle=2W,busy=6W"), threads=1), protocol=short)["m"]
    seconds = sum(window.wall_s for window in found.windows) / sum(len(window.calls_s) for window in found.windows)
    assert found.energy_j.value - found.net_energy_j.value == pytest.approx(2.0 * seconds)
    assert found.net_energy_j.value == pytest.approx(4.0 * found.cpu_s.value, rel=0.2)
    assert found.energy_j.estimate and found.energy_j.scale == pytest.approx((1 / 3, 3.0))


def test_warm_up_goes_on_until_it_is_flat(device: Device) -> None:
    seconds = iter([0.05] * 5 + [0.02] * 5 + [0.01] * 100)
    assert protocol.warm(lambda: device.spend(next(seconds), 0.0)) == 20
    assert protocol.warm(lambda: device.spend(2.0, 0.0)) == 5  # slow models are not kept waiting


def test_same_against_same_is_as_wide_as_the_noise(device: Device) -> None:
    """Eight pairs of blocks of one call, each call's time off by 5 %: t(7) * sqrt(2) * 0.05 / sqrt(8), on average."""
    noise = random.Random(0)

    def half_width() -> float:
        return protocol.same_against_same(lambda: device.spend(0.1 * math.exp(noise.gauss(0, 0.05)), 0.0), block_s=0.05)[0]

    assert statistics.fmean(half_width() for _ in range(200)) == pytest.approx(2.365 * 2**0.5 * 0.05 / 8**0.5, rel=0.1)


def test_throughput_finds_the_best_batch(device: Device) -> None:
    tried: list[int] = []

    def run(size: int) -> None:
        tried.append(size)
        device.spend(0.01 + 0.001 * size + (0.002 * (size - 16) if size > 16 else 0.0), 1.0)

    rate, size = best_throughput(run, seconds=0.1)
    assert size == 16 and rate.value == pytest.approx(16 / 0.026) and max(tried) == 64

    def full(size: int) -> None:
        if size > 2:
            raise MemoryError
        device.spend(0.01, 1.0)

    assert best_throughput(full, seconds=0.1)[1] == 2

    tried.clear()
    best_throughput(run, seconds=0.1, limit_s=0.0)
    assert max(tried) == 8  # a slow model is not kept waiting for ever larger batches


def test_small_batches_are_all_tried_whatever_the_first_gave(device: Device) -> None:
    per_s = {1: 100.0, 2: 99.0, 4: 98.0, 8: 150.0, 16: 140.0, 32: 140.0}
    rate, size = best_throughput(lambda size: device.spend(size / per_s[size], 1.0), seconds=0.1)
    assert size == 8 and rate.value == pytest.approx(150.0)


def test_clock_counts_this_process_and_finished_children() -> None:
    start = clock.now()
    pid = os.spawnlp(os.P_WAIT, "python3", "python3", "-c", "sum(range(4_000_000))")
    middle = clock.now()
    sum(range(2_000_000))
    end = clock.now()
    assert pid == 0 and clock.cpu(start, middle).value > 0.02
    assert (clock.cpu(start, middle) + clock.cpu(middle, end)).value == pytest.approx(clock.cpu(start, end).value)
    assert (clock.wall(start, middle) + clock.wall(middle, end)).value == pytest.approx(clock.wall(start, end).value)
    assert 0.0 <= clock.others(start, end) <= 1.0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_what_was_freed_before_does_not_count_as_memory() -> None:
    held = [bytes(60_000) for _ in range(3000)]  # from the heap, whose end `last` holds up
    last = bytes(60_000)
    del held
    kept = psutil.Process().memory_info().rss / 1e6
    with memory.Peak() as peak:
        assert len(last) == 60_000
    assert peak.before_mb < kept - 100
    assert peak.reading.value < kept - 100


@pytest.mark.parametrize("resettable", [True, False])
def test_peak_memory_of_a_window(resettable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not resettable:
        monkeypatch.setattr(memory, "_reset", lambda: False)
    with memory.Peak() as large, mmap.mmap(-1, 120_000_000) as block:  # pages of its own: malloc may hand back freed ones that are resident already
        block.write(bytes(len(block)))
        time.sleep(0.05)
    with memory.Peak() as small:
        time.sleep(0.02)
    assert 110 < large.reading.value - large.before_mb < 140
    assert small.reading.value - small.before_mb < 20  # the earlier peak is forgotten


def test_peak_memory_of_a_child() -> None:
    peak = memory.child_peak("builtins:bytearray", [50_000_000])
    assert 48 < peak.over_mb.value < 60 and peak.peak_mb.value == pytest.approx(peak.before_mb.value + peak.over_mb.value)
    prepared = memory.child_peak("builtins:eval", ["lambda examples=bytearray(80_000_000): bytearray(50_000_000)"])
    assert 48 < prepared.over_mb.value < 60  # what the job prepares before it gives a function back does not count
    with pytest.raises(MeterError, match="division"):
        memory.child_peak("operator:truediv", [1, 0])
    with pytest.raises(MeterError, match="longer than"):
        memory.child_peak("time:sleep", [30], timeout_s=1.0)


def test_the_machine_is_described() -> None:
    found = system.describe()
    assert found["torch"] == torch.__version__ and found["cores"] >= 1 and found["memory_mb"] > 100
    assert {"rapl", "nvml", "battery", "log", "estimate"} == set(system.meters())


def test_the_dtype_probe_is_by_one_thread_whose_own_time_no_neighbor_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, seen = torch.get_num_threads(), set()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(system, "_step", lambda *given: seen.add(torch.get_num_threads()) or 0.01)
        system.fastest_dtype.cache_clear()
        system.fastest_dtype(limit_s=0.0)
        assert seen == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        system.fastest_dtype.cache_clear()


def test_dtype_probe_decides_by_the_ratio_it_measured_and_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.random.get_rng_state()
    system.fastest_dtype.cache_clear()
    real = system.fastest_dtype(limit_s=0.1)
    assert real.ratio > 0 and real.dtype == ("bf16" if real.ratio > 1.1 else "fp32")
    assert torch.equal(state, torch.random.get_rng_state())
    for bf16_s, dtype in ((0.004, "bf16"), (0.0095, "fp32"), (0.03, "fp32")):
        monkeypatch.setattr(system, "_step", lambda layers, inputs, low, slow=bf16_s: slow if low else 0.01)
        system.fastest_dtype.cache_clear()
        assert system.fastest_dtype(limit_s=0.01) == system.Fastest(dtype, pytest.approx(0.01 / bf16_s))
    system.fastest_dtype.cache_clear()
