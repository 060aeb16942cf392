"""How inference is measured: several models in turn, in windows, so that what disturbs one disturbs all."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paretune.errors import MeterError
from paretune.meters import clock, memory
from paretune.meters.clock import Moment
from paretune.meters.meter import Meter, NoMeter
from paretune.meters.reading import Reading, missing, spread

DISTURBED = 0.1  # of the machine used by other processes, above which a window is flagged


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How long, how often and in which order. A window ends after `window_s` seconds or `window_n` inferences, whichever is first."""

    name: str
    window_s: float
    window_n: int
    windows: int
    warm_s: float  # warming up ends after so many seconds, steady or not
    search_s: float  # the search for the best batch begins no larger one after so many seconds
    idle_s: float
    idle_each: bool  # idle power read around every window, else before the first and after the last
    shuffled: bool  # a random order each round, else there and back


QUICK = Protocol("quick", window_s=2.0, window_n=200, windows=3, warm_s=2.0, search_s=2.0, idle_s=2.0, idle_each=False, shuffled=False)
FULL = Protocol("full", window_s=60.0, window_n=1000, windows=5, warm_s=5.0, search_s=math.inf, idle_s=30.0, idle_each=True, shuffled=True)
PROTOCOLS = {protocol.name: protocol for protocol in (QUICK, FULL)}


@dataclasses.dataclass(frozen=True)
class Window:
    """One stretch of inference: its two ends, each call's seconds, and the share of the machine that other processes used."""

    start: Moment
    end: Moment
    calls_s: tuple[float, ...]
    others: float

    @property
    def wall_s(self) -> float:
        """Seconds from end to end."""
        return self.end.wall_s - self.start.wall_s


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one model's inference takes, each figure with the spread over its windows.

    `aa_wall` and `aa_cpu` are the half-widths (relative, 95 %) that two measurements of one and the same model differ by on this
    machine now: a smaller difference between two models is not resolved. `note` tells of flagged windows.
    """

    latency_p50_ms: Reading
    latency_p95_ms: Reading
    cpu_s: Reading
    energy_j: Reading
    net_energy_j: Reading
    meter: dict[str, Any]
    windows: tuple[Window, ...]
    aa_wall: float
    aa_cpu: float
    note: str = ""

    def readings(self) -> dict[str, Reading]:
        """By the names that a `Cost` has for them, for its `with_readings`."""
        return {
            "latency_p50_ms": self.latency_p50_ms,
            "latency_p95_ms": self.latency_p95_ms,
            "energy_per_inference_j": self.energy_j,
            "net_energy_per_inference_j": self.net_energy_j,
        }


@memory.kept_between_calls()
def measure(
    models: Mapping[str, Callable[[], Any]],
    meter: Meter | None = None,
    *,
    protocol: Protocol = QUICK,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Times and meters one inference of each model, interleaved.

    Args:
        models: by name, a function that runs one inference of batch 1 and returns when it is done (on a card: synchronized).
        meter: an energy meter; without one energy is None.
        protocol: `QUICK` or `FULL`.
        seed: of the order, where the protocol shuffles.
        progress: called with the windows done and those there are.

    Raises:
        MeterError: for no models.
    """
    if not models:
        raise MeterError("there is no model to measure: give one at least")
    meter = meter or NoMeter("no energy meter was asked for")
    for call in models.values():
        warm(call, limit_s=protocol.warm_s)
    aa_wall, aa_cpu = same_against_same(next(iter(models.values())))
    windows, idles = _take(models, meter, protocol, seed, progress)
    meter.settle(meter.now())
    idle = _idle_power(meter, idles)
    return {name: _timing(windows[name], idle, meter, protocol, (aa_wall, aa_cpu)) for name in models}


def warm(call: Callable[[], Any], *, at_least: int = 10, limit_s: float = 5.0) -> int:
    """Calls until the medians of blocks of five are flat to 5 %, `at_least` times, but no longer than `limit_s`; returns the number of calls."""
    begin, medians = time.perf_counter(), []
    while True:
        medians.append(statistics.median(_timed(call) for _ in range(5)))
        flat = len(medians) * 5 >= at_least and abs(medians[-1] / medians[-2] - 1) < 0.05
        if flat or time.perf_counter() - begin > limit_s:
            return len(medians) * 5


def same_against_same(call: Callable[[], Any], *, pairs: int = 8, block_s: float = 0.1) -> tuple[float, float]:
    """The A/A test: relative 95 % half-widths, in wall and CPU time, of the difference between a model and itself."""
    count = max(1, math.ceil(block_s / max(_timed(call), 1e-6)))

    def block() -> Moment:
        for _ in range(count):
            call()
        return clock.now()

    ratios = []
    for _ in range(pairs):
        moments = [clock.now(), block(), block()]
        first, second = ((b.wall_s - a.wall_s, b.cpu_s - a.cpu_s) for a, b in zip(moments, moments[1:], strict=False))
        ratios.append([second[i] / first[i] if first[i] > 0 else 1.0 for i in (0, 1)])
    half_widths = []
    for side in zip(*ratios, strict=True):
        low, high = spread(side) or (1.0, 1.0)
        half_widths.append(math.sqrt(high / low) - 1)
    return half_widths[0], half_widths[1]


def _take(
    models: Mapping[str, Callable[[], Any]], meter: Meter, protocol: Protocol, seed: int, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, list[Window]], list[tuple[Moment, Moment]]]:
    """All windows of all models and the idle stretches around them."""
    shuffle, order = random.Random(seed), list(models)
    windows: dict[str, list[Window]] = {name: [] for name in models}
    meter.bracket()
    idles = _rest(meter, protocol)
    for _ in range(protocol.windows):
        if protocol.shuffled:
            shuffle.shuffle(order)
        for name in order:
            windows[name].append(_window(models[name], meter, protocol))
            if protocol.idle_each:
                idles += _rest(meter, protocol)
            if progress:
                progress(sum(map(len, windows.values())), protocol.windows * len(order))
        order.reverse()
    if not protocol.idle_each:
        idles += _rest(meter, protocol)
    meter.bracket()
    return windows, idles


def _rest(meter: Meter, protocol: Protocol) -> list[tuple[Moment, Moment]]:
    """An idle stretch, where the meter can tell what it draws."""
    if not meter.measures_idle:
        return []
    start = meter.now()
    time.sleep(max(protocol.idle_s, meter.least_s))
    return [(start, meter.now())]


def _window(call: Callable[[], Any], meter: Meter, protocol: Protocol) -> Window:
    for _ in range(2):  # the model before left its own data in the caches
        call()
    calls: list[float] = []
    start = meter.now()
    begin = time.perf_counter()
    while (past := time.perf_counter() - begin) < meter.least_s or (past < protocol.window_s and len(calls) < protocol.window_n):
        calls.append(_timed(call))
    end = meter.now()
    return Window(start, end, tuple(calls), clock.others(start, end))


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _idle_power(meter: Meter, idles: Sequence[tuple[Moment, Moment]]) -> Callable[[Window], float] | Reading:
    """The idle watts in a window, interpolated between the stretches before and after it, or why they are not known."""
    if meter.idle_w is not None:
        return lambda window: meter.idle_w
    readings = [meter.between(start, end) for start, end in idles]
    silent = [reading for reading in readings if reading.value is None]
    if silent or not readings:
        return missing("W", silent[0].reason if silent else "the idle power is not known")
    centers = [(start.wall_s + end.wall_s) / 2 for start, end in idles]
    watts = [reading.value / (end.wall_s - start.wall_s) for reading, (start, end) in zip(readings, idles, strict=True)]
    return lambda window: float(np.interp((window.start.wall_s + window.end.wall_s) / 2, centers, watts))


def _timing(
    windows: Sequence[Window], idle: Callable[[Window], float] | Reading, meter: Meter, protocol: Protocol, aa: tuple[float, float]
) -> Timing:
    quiet = [window for window in windows if window.others <= DISTURBED]
    used, note = (quiet, "") if len(quiet) >= 2 else (windows, "")
    if len(quiet) < len(windows):
        note = f"in {len(windows) - len(quiet)} of {len(windows)} windows other processes used over {DISTURBED:.0%} of the machine"
        note += "; they are left out" if used is quiet else "; too few are left to leave them out"
    source = f"{protocol.name} protocol, {len(used)} windows"
    p50, p95 = (
        _over([1e3 * float(np.quantile(w.calls_s, q)) for w in used], 1e3 * float(np.quantile(np.concatenate([w.calls_s for w in used]), q)), "ms")
        for q in (0.5, 0.95)
    )
    cpu = _over([(w.end.cpu_s - w.start.cpu_s) / len(w.calls_s) for w in used], None, "s")
    gross, net, watts = _energies(used, idle, meter)
    readings = (dataclasses.replace(r, protocol=protocol.name, source=r.source or source) for r in (p50, p95, cpu, gross, net))
    return Timing(*readings, meter=meter.describe() | watts, windows=tuple(windows), aa_wall=aa[0], aa_cpu=aa[1], note=note)


def _over(values: list[float], value: float | None, unit: str) -> Reading:
    """The value (the windows' mean by default), with the spread over the windows."""
    value = statistics.fmean(values) if value is None else value
    low, high = spread(values) or (value, value)
    return Reading(value, unit, min(low, value), max(high, value), windows=tuple(values))


def _energies(windows: Sequence[Window], idle: Callable[[Window], float] | Reading, meter: Meter) -> tuple[Reading, Reading, dict[str, float]]:
    """Gross and net joules of one inference, and the watts idle and busy that go with them."""
    totals = [meter.between(window.start, window.end) for window in windows]
    silent = next((reading for reading in totals if reading.value is None), None)
    if silent:
        return silent, silent, {}
    counts = [len(window.calls_s) for window in windows]
    whole = sum(totals).times(1 / sum(counts), "J")  # carries the meter's resolution, its scale and its source
    gross = _widest(_over([total.value / n for total, n in zip(totals, counts, strict=True)], whole.value, "J"), whole)
    span = sum(window.wall_s for window in windows)
    watts = {"busy_w": sum(total.value for total in totals) / span} if meter.busy_w is None else {}
    if isinstance(idle, Reading):
        return gross, dataclasses.replace(idle, unit="J"), watts
    rest = [idle(window) * window.wall_s for window in windows]
    nets = [(total.value - low) / n for total, low, n in zip(totals, rest, counts, strict=True)]
    shift = sum(rest) / sum(counts)
    resolution = dataclasses.replace(whole, value=whole.value - shift, low=whole.interval[0] - shift, high=whole.interval[1] - shift)
    net = _widest(_over(nets, whole.value - shift, "J"), resolution)
    return gross, net, watts | ({"idle_w": sum(rest) / span} if meter.idle_w is None else {})


def _widest(over: Reading, whole: Reading) -> Reading:
    """The whole's reading, its interval stretched to the spread over windows."""
    low, high = (pick(pair) for pick, pair in zip((min, max), zip(over.interval, whole.interval, strict=True), strict=True))
    return dataclasses.replace(whole, low=low, high=high, windows=over.windows)
