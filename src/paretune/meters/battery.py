"""How many inferences, and how many hours, a battery charge buys."""

from __future__ import annotations

import dataclasses

from paretune.errors import BudgetError
from paretune.meters.cost import Cost
from paretune.meters.reading import Reading, missing
from paretune.units import read


@dataclasses.dataclass(frozen=True)
class Battery:
    """A battery by its label, and what of that reaches the device.

    `usable_share` of the charge may be drawn, `state_of_health` is left of a new battery's, `efficiency` gets through the voltage converters.
    """

    capacity_j: float
    usable_share: float = 1.0
    state_of_health: float = 1.0
    efficiency: float = 0.85

    def __post_init__(self) -> None:
        if self.capacity_j <= 0:
            raise BudgetError(f"a battery must hold some energy, as in 15Wh or 3000mAh@3.7V, not {self.capacity_j:g} J")
        for name in ("usable_share", "state_of_health", "efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise BudgetError(f"a battery's {name} is a share above 0 and up to 1, not {getattr(self, name)}")

    @classmethod
    def parse(cls, text: str) -> Battery:
        """The battery of that label: `15Wh`, `3000 mAh @ 3.7 V`, `54kJ`; a share of 0.85 gets through the converters, all the rest is usable."""
        return cls(read(text, "energy"))

    @property
    def usable_j(self) -> float:
        """Joules that reach the device per charge."""
        return self.capacity_j * self.usable_share * self.state_of_health * self.efficiency


@dataclasses.dataclass(frozen=True)
class Charge:
    """What one charge buys: a number of inferences, and the hours that it lasts."""

    inferences: Reading
    hours: Reading


def inferences_per_charge(
    usable_j: float, gross_j: float, *, net_j: float | None = None, idle_w: float | None = None, rate_per_s: float | None = None
) -> float:
    """`N = usable / gross` when inference never rests; `N(r) = r usable / (idle + r net)` at r inferences a second.

    Args:
        usable_j: joules that reach the device per charge.
        gross_j: joules of one inference, idle power included.
        net_j: joules an inference adds to idling; with a rate.
        idle_w: watts of the device at rest; with a rate.
        rate_per_s: inferences a second, None for as many as it can.

    Raises:
        BudgetError: for a rate without idle power and net energy, or a rate that is not positive.
    """
    if rate_per_s is None:
        return usable_j / gross_j
    if net_j is None or idle_w is None:
        raise BudgetError("inferences per charge at a rate need idle power and net energy; without them only the saturated case is known")
    if rate_per_s <= 0:
        raise BudgetError(f"a rate must be positive, as in 1/s, not {rate_per_s:g}/s")
    return rate_per_s * usable_j / (idle_w + rate_per_s * net_j)


def charge(battery: Battery, cost: Cost, *, rate_per_s: float | None = None) -> Charge:
    """What a charge of the battery buys of the model with that cost.

    The interval is that of the inference's energy, carried through. The factor common to all energies of a meter turns over into the
    readings' `scale`; the battery's own tolerance, common to all models too, is left out.

    Args:
        battery: the battery.
        cost: a run's cost; its `meter` has `idle_w`.
        rate_per_s: inferences a second, None for saturated.

    Returns:
        None with a reason where energy was not measured, or the model cannot keep up with the rate.
    """
    why = _why_not(cost, rate_per_s)
    if why:
        return Charge(missing("", why), missing("h", why))
    meter, idle = cost.meter, cost.meter.get("idle_w")
    gross, net = cost.energy_per_inference_j, cost.net_energy_per_inference_j

    def count(joules: float) -> float:
        return inferences_per_charge(battery.usable_j, joules, net_j=joules, idle_w=idle, rate_per_s=rate_per_s)

    name, energy = ("energy_per_inference_j", gross) if rate_per_s is None else ("net_energy_per_inference_j", net)
    ends = [count(max(joules, 0.0)) for joules in reversed(cost.intervals.get(name, []))]
    inferences = Reading(
        count(energy),
        "",
        *ends,
        source=meter.get("source", ""),
        estimate=meter.get("estimate", False),
        protocol=cost.protocol,
        scale=(1 / meter.get("scale_high", 1.0), 1 / meter.get("scale_low", 1.0)),
    )
    seconds = _seconds_each(gross, net, idle) if rate_per_s is None else 1 / rate_per_s
    if not seconds:
        return Charge(inferences, missing("h", cost.reasons.get("net_energy_per_inference_j", "the idle power is not known")))
    return Charge(inferences, inferences.times(seconds / 3600, "h"))


def _seconds_each(gross: float, net: float | None, idle: float | None) -> float | None:
    """How long one inference takes, out of the idle energy that is in its gross energy."""
    return (gross - net) / idle if net is not None and idle else None


def _why_not(cost: Cost, rate_per_s: float | None) -> str:
    if cost.energy_per_inference_j is None:
        return cost.reasons["energy_per_inference_j"]
    if rate_per_s is None:
        return ""
    idle, net = cost.meter.get("idle_w"), cost.net_energy_per_inference_j
    if net is None or idle is None:
        return cost.reasons.get("net_energy_per_inference_j", "the idle power is not known")
    each = _seconds_each(cost.energy_per_inference_j, net, idle)
    if each and rate_per_s * each > 1:
        return f"it takes {each * 1000:.3g} ms for one inference and cannot do {rate_per_s:g} a second"
    return ""
