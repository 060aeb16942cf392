"""What joules stand for elsewhere: grams of CO2, liters of water, money. Every factor is stated, dated and the user's to set."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from paretune.errors import MeterError, unknown
from paretune.meters.reading import Reading

TABLE = Path(__file__).with_name("factors.json")
KWH_J = 3.6e6


@dataclasses.dataclass(frozen=True)
class Factor:
    """So much of `unit` per kilowatt-hour, from `source`; `low` and `high` where sources differ."""

    per_kwh: float
    unit: str
    source: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        low, high = self.low if self.low is not None else self.per_kwh, self.high if self.high is not None else self.per_kwh
        if not 0 <= low <= self.per_kwh <= high:
            raise MeterError(f"an amount per kWh must be 0 or more and within its interval: {low} <= {self.per_kwh} <= {high} {self.unit} is not so")
        if not self.source:
            raise MeterError(f"{self.per_kwh:g} {self.unit}/kWh needs a source: say where the figure comes from and of which year")

    def of(self, energy: Reading) -> Reading:
        """The amount that an energy stands for; the factor's interval is common to all, and goes into the reading's scale.

        Raises:
            MeterError: for a reading that is no energy.
        """
        if energy.unit != "J":
            raise MeterError(f"{self.unit} follow from joules, not from {energy.unit or 'a plain number'}")
        amount = energy.times(self.per_kwh / KWH_J, self.unit)
        low = 1.0 if self.low is None or not self.per_kwh else self.low / self.per_kwh
        high = 1.0 if self.high is None or not self.per_kwh else self.high / self.per_kwh
        return dataclasses.replace(amount, source=f"{energy.source}; {self.source}", scale=(energy.scale[0] * low, energy.scale[1] * high))


def co2(place: str) -> Factor:
    """Grams of CO2 per kWh of a country's grid, by its two-letter code; there is no default country.

    Raises:
        MeterError: for a place that is not in the table; state a `Factor` of your own then.
    """
    return Factor(_of("co2_g_per_kwh", place), "g CO2", _source("co2_g_per_kwh", place))


def water(place: str, *, data_center: bool = False, charger_efficiency: float = 1.0) -> Factor:
    """Liters of water per kWh that a device uses there: what power plants evaporate, and in a data center its cooling.

    In a data center it is `wue + pue * ewif` per kWh of server energy; at home `ewif` over the charger's efficiency.

    Raises:
        MeterError: for a place that is not in the table, or an efficiency that is none.
    """
    if not 0 < charger_efficiency <= 1:
        raise MeterError(f"a charger's efficiency is a share above 0 and up to 1, not {charger_efficiency}")
    figures = _of("water", place)
    on_site, overhead = (figures["wue_l_per_kwh"], figures["pue"]) if data_center else (0.0, 1 / charger_efficiency)
    liters = on_site + overhead * figures["ewif_l_per_kwh"]
    high = on_site + overhead * figures["ewif_high"] if "ewif_high" in figures else None
    return Factor(liters, "L water", _source("water", place), high=high)


def money(price_per_kwh: float, currency: str, *, source: str) -> Factor:
    """A price of electricity, stated by the user: `money(0.30, "EUR", "my bill, 2026")`."""
    return Factor(price_per_kwh, currency, source)


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def _of(name: str, place: str) -> Any:
    places = _table()[name]["places"]
    if place not in places:
        raise MeterError(f"{unknown('place', place, allowed=places)}; or state a factor of your own with its source")
    return places[place]


def _source(name: str, place: str) -> str:
    return f"{place}: {_table()[name]['source']} ({_table()[name]['year']})"
