"""Two clocks made one: find the busy-idle markers a program emitted in the log of a meter, offset and drift."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
from scipy.ndimage import maximum_filter1d

from paretune.errors import MeterError
from paretune.meters.trace import Trace

DRIFT = 5e-4  # the most two clocks are taken to run apart


@dataclasses.dataclass(frozen=True)
class Alignment:
    """`t_meter = rate * t_program + offset_s`; `residual_s` is the root mean square of what the fit leaves at the marker's edges."""

    rate: float = 1.0
    offset_s: float = 0.0
    residual_s: float = 0.0

    def to_meter(self, epoch_s: float) -> float:
        """The meter's time at a time of the program."""
        return self.rate * epoch_s + self.offset_s


def emit(busy: Callable[[], object], *, repeats: int = 3, seconds: float = 2.0) -> list[float]:
    """Makes a marker: idle, then `repeats` times busy and idle, each `seconds` long.

    Args:
        busy: draws power for a moment (well under 0.1 s); called over and over.

    Returns:
        The edges in Unix time: up, down, up, down, ...
    """
    edges = []
    time.sleep(seconds)
    for _ in range(repeats):
        edges.append(time.time())
        while time.time() < edges[-1] + seconds:
            busy()
        edges.append(time.time())
        time.sleep(seconds)
    return edges


def clocks(trace: Trace, before: Sequence[float], *, after: Sequence[float]) -> Alignment:
    """The alignment that puts two markers, one before and one after the work, where the trace shows them.

    Args:
        before: the first marker's edges as `emit` returned them.
        after: the second marker's.

    Raises:
        MeterError: when the trace does not show a marker.
    """
    first, last = trace.times[0] - before[0], trace.times[-1] - after[-1]
    slack = 0.5 + DRIFT * (after[0] - before[0])
    if last + slack < first:
        raise MeterError(f"the meter log is {trace.times[-1] - trace.times[0]:.1f} s long, shorter than from the first marker to the end of the last")
    step = max(min(trace.interval_s, 0.1), 0.02)
    offsets = np.arange(first, last + slack + step, step)
    near = 2 * int(np.ceil(slack / step)) + 1
    # one marker looks like the other: an offset is good only if both are where it puts them, up to the drift between
    start_contrast, end_contrast = (_contrast(trace, edges, offsets)[0] for edges in (before, after))
    best = int(np.argmax(np.minimum(start_contrast, maximum_filter1d(end_contrast, near, mode="nearest"))))
    around = slice(max(best - near // 2, 0), best + near // 2 + 1)
    pairs = _edges(trace, before, offsets[best]) + _edges(trace, after, offsets[around][np.argmax(end_contrast[around])])
    program, meter = (np.array(side) for side in zip(*pairs, strict=True))
    origin = program[0]  # least squares around it: Unix times squared would cost the digits that matter
    rate, intercept = np.polyfit(program - origin, meter, 1)
    residual = float(np.sqrt(np.mean((rate * (program - origin) + intercept - meter) ** 2)))
    return Alignment(float(rate), float(intercept - rate * origin), residual)


def _contrast(trace: Trace, edges: Sequence[float], offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least busy stretch's watts over the most idle one's (other work does not look so), and the level halfway; at each offset, [offsets]."""
    steps = (trace.watts[1:] + trace.watts[:-1]) / 2 * np.diff(trace.times)
    joules = np.concatenate(([0.0], np.cumsum(steps)))
    at = np.interp(np.asarray(edges)[:, None] + offsets, trace.times, joules)  # [edges, offsets]
    means = np.diff(at, axis=0) / np.diff(edges)[:, None]
    busy, idle = means[0::2], means[1::2]
    return busy.min(axis=0) - idle.max(axis=0), (busy.mean(axis=0) + idle.mean(axis=0)) / 2


def _edges(trace: Trace, edges: Sequence[float], offset: float) -> list[tuple[float, float]]:
    """The marker's edges and their times in the trace, for those that it shows."""
    contrast, level = (float(part[0]) for part in _contrast(trace, edges, np.array([offset])))
    crossings = _crossings(trace, level)
    found = [(edge, _near(crossings[i % 2 == 0], edge + offset)) for i, edge in enumerate(edges)]
    found = [(edge, crossing) for edge, crossing in found if crossing is not None]
    if contrast <= 0 or len(found) < len(edges) * 2 / 3:
        raise MeterError("the meter log does not show the marker: did it record, at 1 Hz or faster, from before the measurement until after it?")
    return found


def _crossings(trace: Trace, level: float) -> dict[bool, np.ndarray]:
    """The times at which the power rises (True) and falls (False) through `level`, interpolated."""
    above = trace.watts > level
    found = {}
    for rising in (True, False):
        at = np.flatnonzero((above[1:] != above[:-1]) & (above[1:] == rising))
        share = (level - trace.watts[at]) / (trace.watts[at + 1] - trace.watts[at])
        found[rising] = trace.times[at] + share * (trace.times[at + 1] - trace.times[at])
    return found


def _near(times: np.ndarray, wanted: float, within: float = 0.95) -> float | None:
    if not len(times):
        return None
    nearest = float(times[np.argmin(np.abs(times - wanted))])
    return nearest if abs(nearest - wanted) <= within else None
