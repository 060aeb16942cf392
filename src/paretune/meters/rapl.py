"""RAPL: the energy counters of Intel and AMD processors, through Linux powercap."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from paretune.errors import MeterError
from paretune.meters.clock import Moment
from paretune.meters.meter import Meter
from paretune.meters.reading import Reading

ROOT = Path("/sys/class/powercap")
# psys contains package, and package contains core and uncore: only package and dram add up without counting twice
_ADDED = re.compile(r"package-.*|dram")


class Rapl(Meter):
    """Joules of processor packages and memory. The counters wrap around; a thread reads them often enough to see each wrap.

    Args:
        root: the powercap folder.
        poll_s: seconds between the thread's readings; 0 for no thread (then mark moments at least once a wrap).

    Raises:
        MeterError: when there are no counters or they may not be read, with what to do.
    """

    name = "rapl"
    source = "RAPL counters, processor packages and memory"
    measures_idle = True

    def __init__(self, root: Path = ROOT, *, poll_s: float = 60.0) -> None:
        zones = [path for path in sorted(root.glob("intel-rapl:*")) if (path / "name").is_file() and _ADDED.fullmatch(_text(path / "name"))]
        if not zones:
            raise MeterError("no RAPL counters here (a virtual machine, or a processor without them)")
        self._zones, self._lock = zones, threading.Lock()
        self._last = {zone: _number(zone / "energy_uj") for zone in zones}
        self._range = {zone: _number(zone / "max_energy_range_uj") for zone in zones}
        self._total_uj = 0
        if poll_s:
            threading.Thread(target=self._poll, args=(poll_s,), daemon=True, name="rapl").start()

    def counters(self) -> dict[str, float]:
        """Joules since this meter was made, wraps undone."""
        with self._lock:
            for zone in self._zones:
                value = _number(zone / "energy_uj")
                step = value - self._last[zone]
                self._total_uj += step if step >= 0 else step + self._range[zone] + 1
                self._last[zone] = value
            return {"rapl_j": self._total_uj / 1e6}

    def between(self, start: Moment, end: Moment) -> Reading:
        """Joules of all packages and memory banks, whatever process used them."""
        return Reading(end.counters["rapl_j"] - start.counters["rapl_j"], "J", source=self.source)

    def _poll(self, every_s: float) -> None:
        pause = threading.Event()
        while not pause.wait(every_s):
            self.counters()


def _text(path: Path) -> str:
    return path.read_text().strip()


def _number(path: Path) -> int:
    try:
        return int(_text(path))
    except PermissionError as error:
        raise MeterError(f"RAPL is here, for root alone; until the next boot: sudo chmod -R a+r {path.parent.parent}/intel-rapl*") from error
    except (OSError, ValueError) as error:
        raise MeterError(f"RAPL's {path} cannot be read: {error}") from error
