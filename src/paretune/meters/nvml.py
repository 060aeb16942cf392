"""NVML: the energy counter of NVIDIA cards (Volta and later), through nvidia-ml-py (`pip install paretune[gpu]`)."""

from __future__ import annotations

from paretune.errors import MeterError
from paretune.meters.clock import Moment
from paretune.meters.meter import Meter
from paretune.meters.reading import Reading


class Nvml(Meter):
    """Joules of one card, the whole card and nothing but the card.

    Args:
        index: the card's number as NVML counts them.

    Raises:
        MeterError: when there is no such card, library or counter, with what to do.
    """

    name = "nvml"
    measures_idle = True
    least_s = 2.0  # the counter moves about every 0.1 s: 5 % of this window
    note = "the card alone, without processor and memory; on A100 and H100 the sensor looks at about a quarter of the time (arXiv 2312.02741)"

    def __init__(self, index: int = 0) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise MeterError("NVML needs the package nvidia-ml-py: pip install 'paretune[gpu]'") from error
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._card = pynvml.nvmlDeviceGetHandleByIndex(index)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._card)
            card = pynvml.nvmlDeviceGetName(self._card)
        except pynvml.NVMLError as error:
            raise MeterError(f"NVML has no energy counter for card {index}: {error}") from error
        self.source = f"NVML energy counter, {card}"

    def counters(self) -> dict[str, float]:
        """Joules since the driver was loaded."""
        return {"nvml_j": self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card) / 1e3}

    def between(self, start: Moment, end: Moment) -> Reading:
        """Joules of the card."""
        return Reading(end.counters["nvml_j"] - start.counters["nvml_j"], "J", source=self.source)
