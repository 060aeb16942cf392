"""What an energy meter is: it marks moments and says what was used between two of them."""

from __future__ import annotations

from typing import Any

from paretune.meters import clock
from paretune.meters.clock import Moment
from paretune.meters.reading import Reading, missing


class Meter:
    """An energy meter. `now()` marks a moment, `between(a, b)` is the energy from one to the other, in joules.

    `between` is a function of the two moments alone, so windows may nest and overlap, and adjoining ones add up.
    """

    name = "none"  # log, rapl, nvml, battery, estimate or none
    source = ""  # one line for people: what was read, and of what
    estimate = False
    measures_idle = False  # whether the power of an idle machine can be read with it
    least_s = 0.0  # the shortest window it resolves
    idle_w: float | None = None  # stated rather than measured
    busy_w: float | None = None
    scale = (1.0, 1.0)  # interval of the factor common to all its readings
    note = ""

    def now(self) -> Moment:
        """This moment, with the meter's counters."""
        return clock.now(self.counters())

    def counters(self) -> dict[str, float]:
        """The meter's running totals."""
        return {}

    def bracket(self) -> None:
        """Called once before the first window and once after the last: a meter with a clock of its own marks them."""

    def settle(self, end: Moment) -> None:
        """Called after the last moment and before any `between`: a meter that is read later waits until it reaches `end`."""

    def between(self, start: Moment, end: Moment) -> Reading:
        """Joules from `start` to `end`, or None with the reason."""
        raise TypeError(f"{type(self).__name__} does not say what it measures between two moments")

    def describe(self) -> dict[str, Any]:
        """The `meter` of a run's cost."""
        return {
            "name": self.name,
            "source": self.source,
            "estimate": self.estimate,
            "idle_w": self.idle_w,
            "busy_w": self.busy_w,
            "scale_low": self.scale[0],
            "scale_high": self.scale[1],
            "note": self.note,
        }


class NoMeter(Meter):
    """No meter: every energy is None, for the reason given."""

    def __init__(self, reason: str) -> None:
        self.note = reason

    def between(self, start: Moment, end: Moment) -> Reading:
        """None, and why."""
        return missing("J", self.note)


class Together(Meter):
    """Several meters of different parts of one machine, summed: processor and graphics card."""

    measures_idle = True

    def __init__(self, meters: list[Meter]) -> None:
        self.meters = meters
        self.name = " + ".join(meter.name for meter in meters)
        self.source = " + ".join(meter.source for meter in meters)
        self.note = "; ".join(filter(None, (meter.note for meter in meters)))
        self.least_s = max(meter.least_s for meter in meters)

    def counters(self) -> dict[str, float]:
        """The running totals of all."""
        return {name: value for meter in self.meters for name, value in meter.counters().items()}

    def between(self, start: Moment, end: Moment) -> Reading:
        """The sum of all, or None for the reason of the first that has none."""
        readings = [meter.between(start, end) for meter in self.meters]
        silent = [reading for reading in readings if reading.value is None]
        return silent[0] if silent else sum(readings)
