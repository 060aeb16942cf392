"""Energy: the best meter at hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from paretune.errors import MeterError
from paretune.meters import estimate
from paretune.meters.gauge import Gauge
from paretune.meters.log import Log
from paretune.meters.meter import Meter, NoMeter, Together
from paretune.meters.nvml import Nvml
from paretune.meters.rapl import Rapl

STATE_IT = "`paretune measure RUN --power idle=2W,busy=6W` states what the device draws; --power-profile takes a file or one of: {}, and --log a meter's log"


def find(
    power: str | estimate.Power | None = None,
    profile: str | Path | None = None,
    *,
    log: str | Path | Log | None = None,
    device: str = "cpu",
    threads: int | None = None,
    window_s: float = 2.0,
) -> Meter:
    """The best meter at hand: an external log, then the machine's counters, its battery, an estimate from a stated power, none.

    Args:
        power: as `idle=2W,busy=6W`.
        profile: a power profile, by name or file; not together with `power`.
        log: an external meter's CSV log.
        device: where the model runs; on `cuda` the card's counter is needed, and the processor's is added where it can be read.
        threads: how many cores the job keeps busy, for the estimate; by default torch's threads.
        window_s: how long the windows will be; a meter too coarse for them is passed over.

    Raises:
        MeterError: for a power or profile that cannot be read, or both together.
    """
    if power is not None and profile is not None:
        raise MeterError("power and power profile state the same thing: give one of the two")
    if log is not None:
        return log if isinstance(log, Log) else Log(log)
    found, reasons = _machine(device, window_s)
    if found is not None:
        return found
    if power is None and profile is None:
        return NoMeter(f"{'; '.join(reasons)}; {STATE_IT.format(', '.join(estimate.profiles()))}")
    if device != "cpu":
        return NoMeter(f"{'; '.join(reasons)}; an estimate counts CPU time, which says nothing of {device}")
    stated = estimate.profile(profile) if profile is not None else power if isinstance(power, estimate.Power) else estimate.Power.parse(power)
    return estimate.Estimate(stated, threads=threads or _threads())


def survey() -> dict[str, str]:
    """Each kind of meter of this machine: empty when it is here, else why not and how to get it."""
    answers = {}
    for kind in (Rapl, Nvml, Gauge):
        try:
            kind(poll_s=0) if kind is Rapl else kind()
            answers[kind.name] = ""
        except MeterError as error:
            answers[kind.name] = str(error)
    answers["log"] = "give --log FILE.csv, the recording of a multimeter or wattmeter"
    answers["estimate"] = f"give --power idle=2W,busy=6W, or --power-profile with a file or one of: {', '.join(estimate.profiles())}"
    return answers


def _machine(device: str, window_s: float) -> tuple[Meter | None, list[str]]:
    """The best of the machine's own meters, and why each better one is out."""
    reasons: list[str] = []
    if device.startswith("cuda"):
        card = _try(lambda: Nvml(int(device.partition(":")[2] or 0)), window_s, reasons)
        processor = card and _try(Rapl, window_s, [])
        return (Together([card, processor]) if processor else card), reasons
    if device != "cpu":
        return None, [f"no energy meter for {device}"]
    return _try(Rapl, window_s, reasons) or _try(Gauge, window_s, reasons), reasons


def _try(make: type[Meter], window_s: float, reasons: list[str]) -> Meter | None:
    try:
        meter = make()
    except MeterError as error:
        reasons.append(str(error))
        return None
    if meter.least_s > window_s:
        reasons.append(f"{meter.source}: too coarse for windows of {window_s:g} s, it needs {meter.least_s:g} s")
        return None
    return meter


def _threads() -> int:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else os.cpu_count() or 1
