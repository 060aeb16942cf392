"""The machine: what run.json records of it and `paretune doctor` shows, and which number format is fast on it."""

from __future__ import annotations

import dataclasses
import functools
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from paretune.meters import clock, energy

CPUINFO = Path("/proc/cpuinfo")
STACK = ((384, 1536), (1536, 384), (384, 384))  # a small model's maps
# what makes bf16 or int8 fast on a processor
RELEVANT = ("amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "bf16", "i8mm", "sve")


@dataclasses.dataclass(frozen=True)
class Fastest:
    """`dtype` is `bf16` or `fp32`; `ratio` is fp32's time over bf16's in a small training step: above 1 bf16 is faster."""

    dtype: str
    ratio: float


def describe() -> dict[str, Any]:
    """The machine in plain values: processor, cores, flags that matter, threads, memory, versions, cards. Takes milliseconds, opens no meter."""
    model, flags = _processor()
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "cpu": model,
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "logical_cores": psutil.cpu_count(),
        "cpu_flags": flags,
        "threads": torch.get_num_threads(),
        "memory_mb": round(psutil.virtual_memory().total / 1e6),
        "cards": cards,
        "system": platform.system(),
        "release": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def meters() -> dict[str, str]:
    """Each kind of energy meter: empty when it is here, else why not and how to get it."""
    return energy.survey()


@functools.cache
def fastest_dtype(device: str = "cpu", *, shapes: tuple[tuple[int, int], ...] = STACK, rows: int = 256, limit_s: float = 0.7) -> Fastest:
    """Times forward and backward of a small stack of linear maps in fp32 and under bf16 autocast, in turn, by one thread on a CPU; the medians decide.

    Some processors do bf16 over twice as fast, others slower than fp32, and their names don't tell. Bf16 must win by a tenth.

    Args:
        device: where to try.
        shapes: of the maps, (I, O) each.
        rows: tokens that pass at once.
        limit_s: about how long to take.
    """
    with torch.random.fork_rng():  # what is drawn here must not shift what a seed gives
        layers = torch.nn.Sequential(*(torch.nn.Linear(*shape) for shape in shapes)).to(device)
    inputs = torch.ones(rows, shapes[0][0], device=device)
    times: dict[bool, list[float]] = {False: [], True: []}
    with torch.enable_grad(), clock.one_thread():
        for low in times:
            _step(layers, inputs, low)
        until = time.perf_counter() + limit_s
        while len(times[True]) < 3 or (time.perf_counter() < until and len(times[True]) < 15):
            for low, taken in times.items():
                taken.append(_step(layers, inputs, low))
    ratio = statistics.median(times[False]) / statistics.median(times[True])
    return Fastest("bf16" if ratio > 1.1 else "fp32", ratio)


def _step(layers: torch.nn.Module, inputs: torch.Tensor, low: bool) -> float:
    now = clock.ticks(inputs.device.type)
    start = now()
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=low):
        loss = layers(inputs).float().square().mean()
    loss.backward()
    if inputs.device.type == "cuda":
        torch.cuda.synchronize()
    return now() - start


def _processor() -> tuple[str, list[str]]:
    try:
        text = CPUINFO.read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    have = set(flags[1].split()) if flags else set()
    return model[1] if model else platform.processor() or platform.machine(), [flag for flag in RELEVANT if flag in have]
