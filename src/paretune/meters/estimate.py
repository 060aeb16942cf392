"""Where nothing measures: joules from CPU time and a stated power, marked as an estimate, with its uncertainty."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from paretune.errors import MeterError, one_of, unknown
from paretune.meters.clock import Moment
from paretune.meters.meter import Meter
from paretune.meters.reading import Reading
from paretune.units import read

HERE = Path(__file__).parent
SCALE = 3.0  # today's tools differ by a factor of over a thousand on one idle machine; 3 is a careful guess for a stated power


@dataclasses.dataclass(frozen=True)
class Power:
    """What a device is said to draw: `idle_w` at rest, `busy_w` with `cores` of its cores at work.

    `cores` is None for as many as the measured job uses. The truth is taken to lie between `scale_low` and `scale_high` times what follows from it.
    """

    idle_w: float
    busy_w: float
    cores: float | None = None
    scale_low: float = 1 / SCALE
    scale_high: float = SCALE
    name: str = "stated"
    source: str = "stated by the user"
    assumption: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.idle_w < self.busy_w:
            raise MeterError(f"a device must draw more when busy than when idle, as in idle=2W,busy=6W, not {self.idle_w} W and {self.busy_w} W")
        if not 0 < self.scale_low <= 1 <= self.scale_high:
            raise MeterError(f"a power's scale interval must hold 1, as in 0.33 to 3; it is {self.scale_low} to {self.scale_high}")
        if self.cores is not None and self.cores <= 0:
            raise MeterError(f"a power profile's cores must be a positive number or null, not {self.cores}")

    @classmethod
    def parse(cls, text: str) -> Power:
        """The power in `idle=2W,busy=6W`; `scale=2` narrows or widens its uncertainty to times and over 2.

        Raises:
            MeterError: for another word, or a word missing.
        """
        given = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(",") if part)
        for name in given:
            if name not in ("idle", "busy", "scale"):
                raise MeterError(f"{text!r}: {unknown('power', name, allowed=('idle', 'busy', 'scale'))}, as in idle=2W,busy=6W")
        if not {"idle", "busy"} <= set(given):
            raise MeterError(f"{text!r} must state both powers, as in idle=2W,busy=6W")
        try:
            scale = float(given.get("scale", SCALE))
        except ValueError as error:
            raise MeterError(f"{text!r}: scale must be a number of 1 or more, not {given['scale']!r}") from error
        if scale < 1:
            raise MeterError(f"{text!r}: scale must be a number of 1 or more, not {scale}")
        return cls(read(given["idle"], "power"), read(given["busy"], "power"), scale_low=1 / scale, scale_high=scale)


def profiles() -> dict[str, Path]:
    """The power profiles that ship, by name."""
    return {path.stem.removeprefix("power_"): path for path in sorted(HERE.glob("power_*.json"))}


def profile(name: str | Path) -> Power:
    """The power profile that ships under that name, or the one in that JSON file.

    Raises:
        MeterError: for a name that is neither, or a file that is no profile.
    """
    path = profiles().get(str(name), Path(name))
    if not path.is_file():
        raise MeterError(f"{unknown('power profile', str(name), allowed=profiles())}, or a JSON file of your own")
    fields = [field.name for field in dataclasses.fields(Power)]
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Power(**{"name": path.stem, **data})
    except (TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MeterError(f"{path.name} is not a power profile: a JSON object with idle_w, busy_w and of {one_of(fields[2:])} ({error})") from error


class Estimate(Meter):
    """Joules as `idle_w` times wall time plus (`busy_w` - `idle_w`) times CPU time over the cores that draw it.

    It knows of no clock rate, cache or memory traffic. Its absolute value is as good as the power it was told; ratios between
    models measured on one machine are those of their CPU times.

    Args:
        power: the stated power.
        threads: how many cores the measured job keeps busy, where the power doesn't say.
    """

    name = "estimate"
    estimate = True

    def __init__(self, power: Power, *, threads: int) -> None:
        self.power, self.cores = power, power.cores or threads
        self.idle_w, self.busy_w = power.idle_w, power.busy_w
        self.scale = (power.scale_low, power.scale_high)
        watts = f"{power.idle_w:g} W idle, {power.busy_w:g} W with {self.cores:g} cores busy"
        self.source = f"estimated from CPU time and a stated power: {power.name}, {watts}"
        self.note = f"{'an assumption, not measured: ' if power.assumption else ''}{power.source}"

    def between(self, start: Moment, end: Moment) -> Reading:
        """The estimate, marked as one."""
        busy_s = (end.cpu_s - start.cpu_s) / self.cores
        joules = self.power.idle_w * (end.wall_s - start.wall_s) + (self.power.busy_w - self.power.idle_w) * busy_s
        return Reading(joules, "J", source=self.source, estimate=True, scale=self.scale)
