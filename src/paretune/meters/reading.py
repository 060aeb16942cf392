"""Reading: one measured number with its unit, its interval, where it comes from, and why it is missing when it is."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from paretune.errors import MeterError


@dataclasses.dataclass(frozen=True)
class Reading:
    """A value in `unit`, or `None` with a reason; never 0 for what was not measured.

    `low` and `high` are the reading's own 95 % interval (its spread over windows, its meter's resolution).
    `scale` is a factor's interval common to every reading of the same source, as the watts an estimate is told: it cancels
    in ratios, so a picture shows it once; `bounds` holds both. Readings of adjoining windows add up to the reading of the whole.
    """

    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    source: str = ""
    reason: str = ""
    estimate: bool = False
    protocol: str = ""
    windows: tuple[float, ...] = ()
    scale: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if self.value is None:
            if not self.reason:
                raise MeterError(f"a reading in {self.unit or 'plain numbers'} without a value must say why it has none: give a reason")
            return
        if not math.isfinite(self.value):
            raise MeterError(f"a reading must be a finite number or None, not {self.value}")
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        if not low <= self.value <= high:
            raise MeterError(f"a reading's interval must hold its value: {low} <= {self.value} <= {high} {self.unit} is not so")
        if not 0 < self.scale[0] <= 1 <= self.scale[1]:
            raise MeterError(f"a reading's scale interval must hold 1, as in (0.33, 3); it is {self.scale}")

    @property
    def interval(self) -> tuple[float, float] | None:
        """The reading's own interval, the value twice where no spread is known; None without a value."""
        if self.value is None:
            return None
        return (self.value if self.low is None else self.low, self.value if self.high is None else self.high)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval with the common scale folded in: what can be said of the absolute number."""
        own = self.interval
        return own and (own[0] * self.scale[0], own[1] * self.scale[1])

    def __add__(self, other: Reading) -> Reading:
        """The reading of two windows together; intervals add end to end, for errors of one meter are common to its windows."""
        for part in (self, other):
            if part.value is None:
                raise MeterError(f"a sum over something not measured is not measured either: {part.reason}")
        if self.unit != other.unit:
            raise MeterError(f"{self.unit or 'a plain number'} and {other.unit or 'a plain number'} cannot be added")
        common = self.scale == other.scale and self.source == other.source
        mine, theirs = (self.interval, other.interval) if common else (self.bounds, other.bounds)
        exact = mine[0] == mine[1] and theirs[0] == theirs[1]
        return dataclasses.replace(
            self,
            value=self.value + other.value,
            low=None if exact else mine[0] + theirs[0],
            high=None if exact else mine[1] + theirs[1],
            source=" + ".join(dict.fromkeys(filter(None, (self.source, other.source)))),
            estimate=self.estimate or other.estimate,
            protocol=self.protocol if self.protocol == other.protocol else "",
            windows=(),
            scale=self.scale if common else (1.0, 1.0),
        )

    def __radd__(self, other: float) -> Reading:
        """Lets `sum(readings)` start from its 0."""
        if other == 0 and not isinstance(other, Reading):
            return self
        return NotImplemented

    def times(self, factor: float, unit: str) -> Reading:
        """This reading times a positive constant, in the unit that the product has (joules to grams, a window to one inference)."""
        if self.value is None:
            return dataclasses.replace(self, unit=unit)
        return dataclasses.replace(
            self,
            value=self.value * factor,
            unit=unit,
            low=None if self.low is None else self.low * factor,
            high=None if self.high is None else self.high * factor,
            windows=tuple(w * factor for w in self.windows),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file, every field by its name."""
        return {field.name: list(v) if isinstance(v := getattr(self, field.name), tuple) else v for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Reading:
        """The reading that `to_json` wrote."""
        return cls(**{**data, "windows": tuple(data["windows"]), "scale": tuple(data["scale"])})


def missing(unit: str, reason: str, *, source: str = "") -> Reading:
    """A reading that could not be taken, and why."""
    return Reading(None, unit, source=source, reason=reason)


# 97.5 % quantiles of Student's t for 1..9 degrees of freedom; 2.0 is close enough, and not too narrow, from there on
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t-interval of the mean of positive window values, in log space so that it never crosses zero; None for fewer than two."""
    if len(values) < 2 or min(values) <= 0:
        return None
    logs = [math.log(v) for v in values]
    quantile = _T[len(logs) - 2] if len(logs) - 2 < len(_T) else 2.0
    half = quantile * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.fmean(values)
    return mean * math.exp(-half), mean * math.exp(half)
