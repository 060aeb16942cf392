"""Quantities: every cost's name, unit and better direction, and how people write them ("15 Wh", "1/s", "20 ms").

A quantity's name carries its unit (`latency_p50_ms`). MB is 10^6 bytes, 1 MAC is 2 FLOPs.
"""

from __future__ import annotations

import dataclasses
import re

from paretune.errors import BudgetError, unknown


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One measurable thing: its name with its unit, a label for people, and which direction is better."""

    name: str
    label: str
    unit: str
    better: str = "lower"  # or "higher"


QUANTITIES = {
    q.name: q
    for q in (
        Quantity("score", "score", "", "higher"),
        Quantity("inferences_per_charge", "inferences per battery charge", "", "higher"),
        Quantity("train_s", "training time", "s"),
        Quantity("train_cpu_s", "training CPU time", "s"),
        Quantity("train_energy_j", "training energy", "J"),
        Quantity("train_peak_mb", "peak memory in training", "MB"),
        Quantity("trainable_parameters", "trainable parameters", ""),
        Quantity("head_parameters", "head parameters", ""),
        Quantity("latency_p50_ms", "latency, median, batch 1", "ms"),
        Quantity("latency_p95_ms", "latency, 95th percentile, batch 1", "ms"),
        Quantity("throughput_per_s", "throughput at the best batch", "1/s", "higher"),
        Quantity("energy_per_inference_j", "energy per inference", "J"),
        Quantity("net_energy_per_inference_j", "energy per inference above idle", "J"),
        Quantity("peak_memory_mb", "peak memory in inference", "MB"),
        Quantity("stored_mb", "stored size", "MB"),
        Quantity("flops_per_inference", "FLOPs per inference", "FLOP"),
    )
}

# unit -> (dimension, factor to the base unit)
UNITS = {
    "J": ("energy", 1.0), "kJ": ("energy", 1e3), "MJ": ("energy", 1e6), "mJ": ("energy", 1e-3), "uJ": ("energy", 1e-6),
    "Wh": ("energy", 3600.0), "mWh": ("energy", 3.6), "kWh": ("energy", 3.6e6),
    "W": ("power", 1.0), "mW": ("power", 1e-3), "kW": ("power", 1e3),
    "s": ("time", 1.0), "ms": ("time", 1e-3), "us": ("time", 1e-6), "min": ("time", 60.0), "h": ("time", 3600.0),
    "/s": ("rate", 1.0), "/min": ("rate", 1 / 60), "/h": ("rate", 1 / 3600), "Hz": ("rate", 1.0),
    "B": ("bytes", 1.0), "kB": ("bytes", 1e3), "MB": ("bytes", 1e6), "GB": ("bytes", 1e9),
}  # fmt: skip
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_CELL = re.compile(rf"({_NUMBER})\s*mAh\s*[@x*]\s*({_NUMBER})\s*V")
_PLAIN = re.compile(rf"({_NUMBER})\s*([A-Za-z/]+)")


def read(text: str, dimension: str) -> float:
    """The number `text` stands for, in the base unit of `dimension` (J, W, s, 1/s, bytes).

    >>> read("15Wh", "energy"), read("2000 mAh @ 5 V", "energy"), read("1/s", "rate"), read("20 ms", "time")
    (54000.0, 36000.0, 1.0, 0.02)

    Raises:
        BudgetError: for a text without a number, or with a unit of another dimension.
    """
    text = str(text).strip()
    cell = _CELL.fullmatch(text)
    if cell and dimension == "energy":
        return float(cell[1]) / 1000 * float(cell[2]) * 3600
    plain = _PLAIN.fullmatch(text)
    allowed = [unit for unit, (kind, _) in UNITS.items() if kind == dimension]
    if not plain:
        raise BudgetError(f"{text!r} is not {_a(dimension)}: write a number and a unit out of {', '.join(allowed)}, as in {_EXAMPLE[dimension]}")
    number, unit = plain.groups()
    if UNITS.get(unit, ("",))[0] != dimension:
        raise BudgetError(f"{text!r}: {unknown(f'unit of {dimension}', unit, allowed=allowed)}")
    return float(number) * UNITS[unit][1]


_EXAMPLE = {"energy": "15Wh", "power": "2W", "time": "20ms", "rate": "1/s", "bytes": "30MB"}


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def quantity(name: str) -> Quantity:
    """The quantity of that name.

    Raises:
        BudgetError: for a name that is none, with the nearest one.
    """
    if name not in QUANTITIES:
        raise BudgetError(unknown("quantity", name, allowed=QUANTITIES))
    return QUANTITIES[name]


_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def show(value: float | None, unit: str = "", *, digits: int = 3) -> str:
    """A value for people: three significant digits and an SI prefix where the unit takes one.

    >>> show(22713216), show(0.00153, "J"), show(None), show(91.2, "MB"), show(3840, "B")
    ('22.7M', '1.53 mJ', '-', '91.2 MB', '3.84 kB')
    """
    if value is None:
        return "-"
    if unit not in ("", "J", "s", "W", "FLOP", "B"):
        return f"{value:.{digits}g} {unit}" if abs(value) < 10**digits else f"{value:,.0f} {unit}"
    factor, prefix = next((p for p in _PREFIXES if abs(value) >= p[0] * 0.9995), (1.0, ""))
    if not unit and factor < 1:
        factor, prefix = 1.0, ""
    if unit == "s" and factor > 1:
        factor, prefix = 1.0, ""
    number = value / factor
    text = f"{number:,.0f}" if abs(number) >= 100 else f"{number:.{digits}g}"
    return f"{text}{' ' if unit else ''}{prefix}{unit}"
