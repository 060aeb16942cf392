"""What one piece of work costs: time, CPU time, energy and peak memory, over all the processes that did a part of it."""

from __future__ import annotations

import dataclasses
from types import TracebackType
from typing import Any

from paretune.meters.memory import Peak
from paretune.meters.meter import Meter
from paretune.meters.reading import Reading, missing

PARTLY = "energy was measured in one part only of a training that was resumed: "


@dataclasses.dataclass(frozen=True)
class Spent:
    """Wall and CPU seconds, joules, and the highest memory in MB; of two parts that follow each other, their sum."""

    wall_s: float
    cpu_s: float
    energy: Reading
    peak_mb: float

    def __add__(self, later: Spent) -> Spent:
        """Times and joules add up, the peak is the higher one; joules of one part alone are none of the whole."""
        return Spent(self.wall_s + later.wall_s, self.cpu_s + later.cpu_s, _joules(self.energy, later.energy), max(self.peak_mb, later.peak_mb))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**dataclasses.asdict(self), "energy": self.energy.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Spent:
        """What `to_json` wrote."""
        return cls(**{**data, "energy": Reading.from_json(data["energy"])})


def _joules(first: Reading, second: Reading) -> Reading:
    silent = [reading for reading in (first, second) if reading.value is None]
    if len(silent) == 1:
        return missing("J", PARTLY + silent[0].reason.removeprefix(PARTLY))
    return second if silent else first + second


class Spending:
    """The clocks of one piece of work: `with Spending(meter) as spending: ...`, then `spending.so_far()`.

    A training that is resumed hands in `earlier`, which its checkpoint kept. What a killed process did after its last
    checkpoint is lost and done again: it is counted once, when it is done again.
    """

    def __init__(self, meter: Meter, device: str = "cpu") -> None:
        self.meter = meter
        self.earlier: Spent | None = None
        self._peak = Peak(device)

    def __enter__(self) -> Spending:
        self._peak.__enter__()
        self._start, self._end = self.meter.now(), None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end = self.meter.now()
        self._peak.__exit__(kind, error, trace)

    def so_far(self) -> Spent:
        """What was spent until now, or until the block ended; with `earlier`."""
        end = self._end or self.meter.now()
        peak = self._peak.reading or self._peak.so_far()
        here = Spent(end.wall_s - self._start.wall_s, end.cpu_s - self._start.cpu_s, self.meter.between(self._start, end), peak.value)
        return self.earlier + here if self.earlier else here
