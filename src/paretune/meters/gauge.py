"""The fuel gauge of this machine's own battery, as the operating system reports it."""

from __future__ import annotations

from pathlib import Path

from paretune.errors import MeterError
from paretune.meters.clock import Moment
from paretune.meters.meter import Meter
from paretune.meters.reading import Reading, missing

ROOT = Path("/sys/class/power_supply")
STEP_J = 36.0  # gauges count in steps of 10 mWh or so


class Gauge(Meter):
    """Joules taken out of the battery: the whole device, screen and radios included. Only while it discharges.

    Args:
        root: the power_supply folder.

    Raises:
        MeterError: when there is no battery with a charge or energy counter.
    """

    name = "battery"
    source = "battery gauge of the operating system, whole device"
    measures_idle = True
    least_s = 60.0
    note = "the gauge moves in steps of about 10 mWh (36 J), which is each window's uncertainty"

    def __init__(self, root: Path = ROOT) -> None:
        for path in sorted(root.glob("*")):
            if _text(path / "type") == "Battery" and (_text(path / "energy_now") or _text(path / "charge_now")):
                self._path = path
                return
        raise MeterError("no battery with an energy counter here")

    def counters(self) -> dict[str, float]:
        """Joules left, and whether the battery discharges; no joules when the gauge does not answer."""
        read = {"battery_discharging": float(_text(self._path / "status") == "Discharging")}
        energy_uwh, charge_uah, voltage_uv = (_text(self._path / name) for name in ("energy_now", "charge_now", "voltage_now"))
        if energy_uwh:
            return read | {"battery_j": int(energy_uwh) * 3.6e-3}
        if charge_uah and voltage_uv:
            return read | {"battery_c": int(charge_uah) * 3.6e-3, "battery_v": int(voltage_uv) * 1e-6}
        return read

    def between(self, start: Moment, end: Moment) -> Reading:
        """Joules taken out, plus or minus one step of the gauge."""
        a, b = start.counters, end.counters
        if not (a["battery_discharging"] and b["battery_discharging"]):
            return missing("J", "the battery is not discharging: unplug the charger", source=self.source)
        if "battery_j" in a and "battery_j" in b:
            used = a["battery_j"] - b["battery_j"]
        elif "battery_c" in a and "battery_c" in b:
            used = (a["battery_c"] - b["battery_c"]) * (a["battery_v"] + b["battery_v"]) / 2
        else:
            return missing("J", "the battery gauge did not answer", source=self.source)
        if used <= STEP_J:
            took = end.wall_s - start.wall_s
            return missing("J", f"the battery gauge moved by a step or less in {took:.3g} s: take a longer window", source=self.source)
        return Reading(used, "J", used - STEP_J, used + STEP_J, source=self.source)


def _text(path: Path) -> str:
    """The file's text; empty where it cannot be read, which is how gauges say that they don't know."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
