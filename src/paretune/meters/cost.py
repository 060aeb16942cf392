"""Cost: what one run cost to train and what one inference of it costs; the `cost` of run.json."""

from __future__ import annotations

import dataclasses
from typing import Any

from paretune.errors import MeterError, unknown
from paretune.meters.reading import Reading


@dataclasses.dataclass(frozen=True)
class Cost:
    """Every cost of a run, each a number in the unit its name carries, or None with an entry in `reasons`.

    A reason for a quantity that has a value is dropped.

    `energy_per_inference_j` is gross (idle power included), `net_energy_per_inference_j` what an inference adds to idling.
    `intervals` holds each quantity's own 95 % interval; the factor common to all energies of one meter is in `meter` as
    `scale_low` and `scale_high` (1 and 1 where energy was measured). `protocol` names how inference was timed: quick or full.
    """

    train_s: float | None = None
    train_cpu_s: float | None = None
    train_energy_j: float | None = None
    train_peak_mb: float | None = None
    trainable_parameters: int | None = None
    head_parameters: int | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    throughput_per_s: float | None = None
    energy_per_inference_j: float | None = None
    net_energy_per_inference_j: float | None = None
    peak_memory_mb: float | None = None
    stored_mb: float | None = None
    flops_per_inference: int | None = None
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    intervals: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    meter: dict[str, Any] = dataclasses.field(default_factory=dict)
    protocol: str = ""

    def __post_init__(self) -> None:
        for name in (*self.reasons, *self.intervals):
            if name not in MEASURED:
                raise MeterError(unknown("cost", name, allowed=MEASURED))
        reasons = {name: why for name, why in self.reasons.items() if getattr(self, name) is None}
        # without a gross figure there is no net one, for the same reason
        reasons.setdefault("net_energy_per_inference_j", reasons.get("energy_per_inference_j", "the idle power is not known"))
        if self.net_energy_per_inference_j is not None:
            del reasons["net_energy_per_inference_j"]
        object.__setattr__(self, "reasons", reasons)
        silent = [name for name in MEASURED if getattr(self, name) is None and not self.reasons.get(name)]
        if silent:
            raise MeterError(f"a cost that was not measured must say why: give a reason for {', '.join(silent)}")

    def with_readings(self, readings: dict[str, Reading]) -> Cost:
        """This cost with readings put in: value and interval, or the reason there is none."""
        reasons = self.reasons | {name: reading.reason for name, reading in readings.items()}
        intervals = {name: pair for name, pair in self.intervals.items() if name not in readings}
        intervals |= {name: list(r.interval) for name, r in readings.items() if r.value is not None and (r.low, r.high) != (None, None)}
        values = {name: reading.value for name, reading in readings.items()}
        return dataclasses.replace(self, **values, reasons=reasons, intervals=intervals)

    def to_json(self) -> dict[str, Any]:
        """The `cost` of run.json: plain values by field name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cost:
        """The cost that `to_json` wrote.

        Raises:
            MeterError: for a field that no cost has, or one missing without a reason.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in data:
            if name not in fields:
                raise MeterError(unknown("cost", name, allowed=fields))
        return cls(**data)


MEASURED = tuple(field.name for field in dataclasses.fields(Cost) if field.name not in ("reasons", "intervals", "meter", "protocol"))


def unmeasured(reason: str) -> Cost:
    """A cost of which nothing is measured yet, every field for the same reason; fill it with `with_readings` or `dataclasses.replace`."""
    return Cost(reasons=dict.fromkeys(MEASURED, reason))
