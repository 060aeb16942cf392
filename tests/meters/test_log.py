"""The CSV log of an external meter against traces of known energy: units, formats, gaps, coverage, and clocks that differ."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest

from paretune.errors import MeterError
from paretune.meters.align import clocks
from paretune.meters.clock import Moment
from paretune.meters.log import Log
from paretune.meters.trace import Trace, read

START = 1_700_000_000.0


def write(path: Path, header: str, rows: np.ndarray, delimiter: str = ",") -> Path:
    path.write_text("\n".join([header, *(delimiter.join(f"{value:.6f}" for value in row) for row in rows)]) + "\n")
    return path


def moment(epoch_s: float) -> Moment:
    return Moment(epoch_s, epoch_s, 0.0, 0.0)


def test_trapezoids_are_exact_for_a_ramp_with_irregular_samples() -> None:
    times = np.cumsum(np.random.default_rng(0).uniform(0.03, 0.07, 2000))
    trace = Trace(times, 3.0 + 0.5 * times)
    a, m, b = 10.123, 33.3, 77.77
    assert trace.energy(a, b) == pytest.approx(3.0 * (b - a) + 0.25 * (b**2 - a**2), rel=1e-9)
    assert trace.energy(a, m) + trace.energy(m, b) == pytest.approx(trace.energy(a, b), rel=1e-12)


@pytest.mark.parametrize(
    ("header", "scale", "delimiter"),
    [
        ("t,V,A", (1, 1, 1), ","),
        ("Time (ms);Voltage (V);Current (mA)", (1000, 1, 1000), ";"),
        ("timestamp\tvolts\tcurrent_ma", (1, 1, 1000), "\t"),
    ],
)
def test_volts_times_amps(tmp_path: Path, header: str, scale: tuple[int, ...], delimiter: str) -> None:
    times = np.arange(0, 20, 0.1)
    rows = np.stack([times, np.full_like(times, 5.0), np.full_like(times, 0.6)], axis=1) * scale
    trace = read(write(tmp_path / "log.csv", header, rows, delimiter))
    assert trace.energy(2.0, 12.0) == pytest.approx(30.0) and not trace.absolute


def test_watts_win_over_volts_and_dates_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    begin = datetime.datetime(2026, 3, 1, 12, 0, 0, tzinfo=datetime.UTC)
    lines = [f"{(begin + datetime.timedelta(seconds=i)).isoformat()},230,1,{100 + i}" for i in range(20)]
    path.write_text("Date,Volts,Amps,Power [W]\n" + "\n".join(lines))
    trace = read(path)
    assert trace.absolute and trace.times[0] == begin.timestamp()
    assert trace.energy(begin.timestamp(), begin.timestamp() + 10) == pytest.approx(1050.0)


def test_ptdaemon_lines(tmp_path: Path) -> None:
    path = tmp_path / "ptd.txt"
    path.write_text("\n".join(f"Time,03-01-2026 12:00:{i:02d}.500,Watts,{50 + i},Volts,230.0,Amps,0.3,PF,0.9,Mark,run" for i in range(30)))
    trace = read(path)
    assert trace.interval_s == pytest.approx(1.0) and trace.energy(trace.times[0], trace.times[10]) == pytest.approx(550.0)


def test_mains_volts_times_amps_is_not_watts(tmp_path: Path) -> None:
    rows = np.array([[i, 230.0, 0.5, 0.8] for i in range(10)])
    with pytest.raises(MeterError, match="not watts"):
        read(write(tmp_path / "ac.csv", "t,V,A", rows[:, :3]))
    assert read(write(tmp_path / "pf.csv", "t,V,A,PF", rows)).watts[0] == pytest.approx(92.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("a,b\n1,2\n", "needs a column of time"),
        ("t,W\n0,1\n1,x\n", "line 3"),
        ("t,W\n0,1\n", "two samples"),
        ("t,W\n1,1\n0,1\n", "must increase"),
    ],
)
def test_logs_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(MeterError, match=message):
        read(path)


def test_gaps_and_coverage_are_refused() -> None:
    times = np.arange(0.0, 100.0)
    trace = Trace(times, np.ones(100))
    with pytest.raises(MeterError, match="covers 50%"):
        trace.energy(89.0, 109.0)
    holed = Trace(np.delete(times, slice(50, 54)), np.ones(96))
    with pytest.raises(MeterError, match="gap of 5 s"):
        holed.energy(40.0, 60.0)
    assert holed.energy(0.0, 45.0) == pytest.approx(45.0)  # the hole is elsewhere
    with pytest.raises(MeterError, match="must end after"):
        trace.energy(5.0, 5.0)


def test_log_meter_reads_by_timestamps_and_declares_its_accuracy(tmp_path: Path) -> None:
    times = START + np.arange(0, 60, 0.2)
    path = write(tmp_path / "log.csv", "t,W", np.stack([times, np.where(times < START + 30, 2.0, 5.0)], axis=1))
    meter = Log(path, accuracy=0.01)
    reading = meter.between(moment(START + 40), moment(START + 50))
    assert reading.value == pytest.approx(50.0) and not reading.estimate and reading.bounds == pytest.approx((49.5, 50.5))
    assert "covers" in meter.between(moment(START + 50), moment(START + 80)).reason
    assert "is not there" in Log(tmp_path / "none.csv").between(moment(START), moment(START + 1)).reason


def test_a_log_that_is_still_growing_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "t,W", np.array([[START + i, 3.0] for i in range(5)]))
    meter = Log(path, wait_s=0.0)
    meter.settle(moment(START + 9))
    assert meter.between(moment(START), moment(START + 9)).value is None
    write(path, "t,W", np.array([[START + i, 3.0] for i in range(10)]))
    assert meter.between(moment(START), moment(START + 9)).value == pytest.approx(27.0)


def test_times_of_an_unknown_start_need_markers(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "t,W", np.array([[float(i), 3.0] for i in range(10)]))
    assert "markers" in Log(path).between(moment(START), moment(START + 5)).reason


def scene(offset_s: float, rate: float, hertz: float) -> tuple[np.ndarray, np.ndarray, list[float], list[float]]:
    """An averaging meter's samples of marker, 60 s of 5 W work, marker on a 2 W device, on a clock of its own; and the true edges."""
    before = [START + 5 + 2 * i for i in range(6)]
    after = [START + 85 + 2 * i for i in range(6)]
    busy = [(a, b, 4.4) for edges in (before, after) for a, b in zip(edges[::2], edges[1::2], strict=True)] + [(START + 20, START + 80, 5.0)]
    fine = START + np.arange(0, 105, 0.001)
    watts = np.full_like(fine, 2.0)
    for a, b, power in busy:
        watts[(fine >= a) & (fine < b)] = power
    block = round(1000 / hertz)
    means = watts[: len(watts) // block * block].reshape(-1, block).mean(axis=1)
    ends = fine[block - 1 :: block][: len(means)]
    return rate * (ends - START) + offset_s, means, before, after


@pytest.mark.parametrize(("hertz", "error"), [(1.0, 0.01), (5.0, 0.004), (100.0, 0.001)])
@pytest.mark.parametrize("offset_s", [0.37, 1234.56])
def test_markers_align_a_clock_with_offset_and_drift(tmp_path: Path, hertz: float, error: float, offset_s: float) -> None:
    times, watts, before, after = scene(offset_s, 1 + 1e-4, hertz)
    meter = Log(write(tmp_path / "log.csv", "t,W", np.stack([times, watts], axis=1)), averaging=True, markers=True)
    meter.markers += [before, after]
    work = meter.between(moment(START + 20), moment(START + 80))
    assert work.value == pytest.approx(300.0, rel=error)
    low, high = work.interval
    assert low <= 300.0 * (1 + error / 4) and high >= 300.0 * (1 - error / 4)


def test_a_log_without_the_marker_is_refused() -> None:
    times, watts, before, after = scene(0.0, 1.0, 10.0)
    with pytest.raises(MeterError, match="does not show the marker"):
        clocks(Trace(times, np.full_like(watts, 2.0)), before, after=after)
    with pytest.raises(MeterError, match="shorter than"):
        clocks(Trace(times[:50], watts[:50]), before, after=after)
