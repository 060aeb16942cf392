"""Wall time and CPU time between two moments, of this process and its children."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator

import psutil

from paretune.meters.reading import Reading

SOURCE_WALL = "monotonic clock"
SOURCE_CPU = "CPU time of this process and its children"


@dataclasses.dataclass(frozen=True)
class Moment:
    """A point in time with every counter as it stood; differences of two moments are the readings of the window between them.

    `epoch_s` is the wall clock (for logs of other devices), `wall_s` the monotonic one, `cpu_s` the CPU time used so far by this
    process, its live workers and the children it waited for, `machine_s` that of the whole machine (all cores), `counters` the meter's own.
    """

    epoch_s: float
    wall_s: float
    cpu_s: float
    machine_s: float
    counters: dict[str, float] = dataclasses.field(default_factory=dict)


def ticks(device: str) -> Callable[[], float]:
    """Seconds that tell two ways apart: of one thread on a processor its own time, whoever else is at work there, else wall time."""
    import torch

    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch has one thread, whose own time tells two ways apart on a busy machine, too; threads that wait for each other there would not."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def now(counters: dict[str, float] | None = None) -> Moment:
    """This moment; a meter hands its own counters in."""
    return Moment(time.time(), time.perf_counter(), _cpu_s(), _machine_s(), counters or {})


def wall(start: Moment, end: Moment) -> Reading:
    """Seconds by the monotonic clock."""
    return Reading(end.wall_s - start.wall_s, "s", source=SOURCE_WALL)


def cpu(start: Moment, end: Moment) -> Reading:
    """CPU seconds of this process and its children: two busy cores for one second are 2 s."""
    return Reading(end.cpu_s - start.cpu_s, "s", source=SOURCE_CPU)


def others(start: Moment, end: Moment) -> float:
    """The share of the machine (0 to 1, all cores) that other processes used in the window: the load guard."""
    span = (end.wall_s - start.wall_s) * (psutil.cpu_count() or 1)
    used = (end.machine_s - start.machine_s) - (end.cpu_s - start.cpu_s)
    return min(max(used / span, 0.0), 1.0) if span > 0 else 0.0


def _cpu_s() -> float:
    waited = os.times()
    live = 0.0
    for child in multiprocessing.active_children():
        try:
            times = psutil.Process(child.pid).cpu_times()
        except psutil.NoSuchProcess:  # ended this instant; its time is with the waited ones from now on
            continue
        live += times.user + times.system
    return time.process_time() + waited.children_user + waited.children_system + live


def _machine_s() -> float:
    times = psutil.cpu_times()
    # guest time is within user time; stolen time was another machine's, and disturbs all the same
    return times.user + times.system + sum(getattr(times, name, 0.0) for name in ("nice", "irq", "softirq", "steal"))
