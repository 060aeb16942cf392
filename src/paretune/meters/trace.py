"""A power trace: the CSV log of a multimeter or wattmeter, integrated by the trapezoid rule."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import re
from pathlib import Path

import numpy as np

from paretune.errors import MeterError

LONGEST_GAP = 3.0  # of the median sample interval
LEAST_COVERAGE = 0.95
MAINS_V = 90.0  # above it volts are taken for alternating, and volts times amps is not watts

_NOUNS = {
    "time": {"t", "time", "timestamp", "date", "datetime", "seconds", "elapsed"},
    "watts": {"w", "mw", "uw", "watt", "watts", "power", "p"},
    "volts": {"v", "mv", "volt", "volts", "voltage", "u"},
    "amps": {"a", "ma", "ua", "amp", "amps", "ampere", "current", "i"},
    "pf": {"pf", "cos"},
}
_UNITS = {"ms": 1e-3, "mw": 1e-3, "mv": 1e-3, "ma": 1e-3, "us": 1e-6, "uw": 1e-6, "ua": 1e-6}


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Watts at increasing times in seconds, [n] each; Unix time where `absolute`, else since some unknown start."""

    times: np.ndarray
    watts: np.ndarray
    absolute: bool = True

    def __post_init__(self) -> None:
        if len(self.times) < 2 or len(self.times) != len(self.watts):
            raise MeterError(f"a power trace needs two samples at least, as many times as watts; it has {len(self.times)} and {len(self.watts)}")
        if not (np.isfinite(self.times).all() and np.isfinite(self.watts).all()):
            raise MeterError("a power trace must hold finite numbers only; this one has gaps or text in it")
        if (np.diff(self.times) <= 0).any():
            at = int(np.argmax(np.diff(self.times) <= 0)) + 1
            raise MeterError(f"a power trace's times must increase; sample {at + 1} at {self.times[at]} s comes after {self.times[at - 1]} s")

    @property
    def interval_s(self) -> float:
        """The median time between samples."""
        return float(np.median(np.diff(self.times)))

    def shifted(self, seconds: float) -> Trace:
        """The trace that many seconds later; half an interval earlier for a meter that stamps the end of what it averages."""
        return dataclasses.replace(self, times=self.times + seconds)

    def energy(self, start: float, end: float) -> float:
        """Joules from `start` to `end` (s, on the trace's clock): trapezoids, the end points interpolated.

        Raises:
            MeterError: when less than 95 % of the window is covered, or it holds a gap of over three median intervals.
        """
        if end <= start:
            raise MeterError(f"a window must end after it starts; this one goes from {start:.3f} s to {end:.3f} s")
        covered = max(min(end, self.times[-1]) - max(start, self.times[0]), 0.0) / (end - start)
        if covered < LEAST_COVERAGE:
            raise MeterError(
                f"the meter log covers {covered:.0%} of the window, at least {LEAST_COVERAGE:.0%} is needed: "
                f"the log goes from {self.times[0]:.1f} s to {self.times[-1]:.1f} s, the window from {start:.1f} s to {end:.1f} s"
            )
        first, last = np.searchsorted(self.times, start, side="right"), np.searchsorted(self.times, end, side="left")
        around = np.diff(self.times[max(first - 1, 0) : last + 1])
        if len(around) and around.max() > LONGEST_GAP * self.interval_s:
            raise MeterError(f"the meter log has a gap of {around.max():.3g} s in the window; samples come every {self.interval_s:.3g} s")
        grid = np.concatenate(([start], self.times[first:last], [end]))
        return float(np.trapezoid(np.interp(grid, self.times, self.watts), grid))


def read(path: str | Path) -> Trace:
    """The trace of a log with a header (`t,V,A`, `time (ms);current (mA);voltage`, `t,W`, ...) or of PTDaemon lines (`Time,..,Watts,..`).

    Watts are taken where the log has them, else volts times amps, times the power factor if there is one.

    Raises:
        MeterError: for a log without a time or without power, for mains voltage without watts, for a value that is no number.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise MeterError(f"the meter log {path.name} cannot be read: {error.strerror}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise MeterError(f"the meter log {path.name} is empty")
    delimiter = max(",;\t", key=lines[0].count)
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    if _kind(rows[0][0])[0] == "time" and len(rows[0]) > 2 and _is_time(rows[0][1]):
        rows = [rows[0][::2], *(row[1::2] for row in rows)]  # every line repeats its names
    kinds = [_kind(name) for name in rows[0]]
    where = {kind: column for column, (kind, _) in reversed(list(enumerate(kinds))) if kind}
    if "time" not in where or not ("watts" in where or {"volts", "amps"} <= set(where)):
        raise MeterError(
            f"the meter log {path.name} needs a column of time and one of watts, or volts and amps (t,W or t,V,A); it has {', '.join(rows[0])}"
        )
    columns = {kind: _column(path, rows[1:], column, kinds[column]) for kind, column in where.items()}
    if "watts" in columns:
        watts = columns["watts"]
    elif np.median(columns["volts"]) > MAINS_V and "pf" not in columns:
        raise MeterError(f"the meter log {path.name} has mains voltage: volts times amps is not watts there; log watts, or the power factor (PF)")
    else:
        watts = columns["volts"] * columns["amps"] * columns.get("pf", 1.0)
    times = columns["time"]
    return Trace(times, watts, absolute=bool(len(times) and times[0] > 1e8))  # 1e8 s after 1970 is 1973


def _kind(name: str) -> tuple[str, float]:
    """What a column holds ("" for nothing of use) and the factor to seconds, watts, volts or amps."""
    words = re.findall(r"[a-z]+", name.lower().replace("µ", "u"))
    factor = next((_UNITS[word] for word in words if word in _UNITS), 1.0)
    for word in words:
        for kind, nouns in _NOUNS.items():
            if word in nouns:
                return kind, factor
    return "", 1.0


def _column(path: Path, rows: list[list[str]], column: int, kind: tuple[str, float]) -> np.ndarray:
    values = []
    for line, row in enumerate(rows, start=2):
        cell = row[column] if column < len(row) else ""
        try:
            values.append(_seconds(cell, kind[1]) if kind[0] == "time" else float(cell) * kind[1])
        except ValueError as error:
            raise MeterError(f"the meter log {path.name}, line {line}: {cell!r} is not {'a time' if kind[0] == 'time' else 'a number'}") from error
    return np.array(values)


def _seconds(cell: str, factor: float) -> float:
    """A number of seconds, an ISO 8601 date, or PTDaemon's month-day-year; dates without a zone are local time."""
    try:
        return float(cell) * factor
    except ValueError:
        pass
    try:
        return datetime.datetime.fromisoformat(cell).timestamp()
    except ValueError:
        return datetime.datetime.strptime(cell, "%m-%d-%Y %H:%M:%S.%f").timestamp()


def _is_time(cell: str) -> bool:
    try:
        _seconds(cell, 1.0)
    except ValueError:
        return False
    return True
