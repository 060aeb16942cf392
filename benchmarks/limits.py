"""How near training comes to what this machine can compute, and where the rest goes.

    python -m benchmarks.limits [--hours 1] [--only minilm]

A cell is a model, a text length and a method: steps of the library's own loop, their FLOPs counted on the very batches (products
and attention; norms, masks and activations count 0), over the rate of large matrix products in the same process, number format and
threads. torch's profiler says where the time of such steps goes, in a second training. About half a minute a cell on 2 cores; part of
`make bench`. Needs the folder of data sets (`benchmarks/data.py`).
"""

from __future__ import annotations

import functools
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import paretune as pt
from benchmarks import cells, data
from benchmarks.cells import Cell, Table
from paretune import recipe, surgery, training
from paretune.events import Events
from paretune.meters import flops, system
from paretune.methods.modifiers.schedule import Schedule
from paretune.step import probe
from paretune.tasks import Task

RECIPES = ("full", "lora(r=8)")
MODELS = {"minilm, SST-2": (32, 12), "decoder, 256 tokens": (8, 4), "decoder, 1,024 tokens": (2, 4)}  # batch, steps at least
TARGETS = {"minilm, SST-2": 0.25, "decoder, 1,024 tokens": 0.40}  # shares of the peak
LARGE = 2048  # rows and columns of the products that the peak is taken from
WARM = 2  # steps that are not counted
KINDS = {  # a pattern of torch's operators -> what they do; the first that fits
    r"mm$|linear|addmm|bmm|baddbmm|matmul": "matrix products",
    r"scaled_dot_product|softmax": "attention and softmax",
    r"bernoulli|random|uniform|bitwise|dropout": "dropout masks",
    r"adam|foreach|vector_norm|norm_except": "optimizer and clipping",
    r"copy|clone|contiguous|_to\b|empty|resize|cat\b": "copies and casts",
    r"layer_norm|rms|gelu|silu|tanh|erf|rsqrt|mean|pow": "norms and activations",
}
OTHER = "other operators"
OUTSIDE = "Python and dispatch"


def every_cell() -> Iterator[Cell]:
    """Every model by every recipe."""
    for model in MODELS:
        for text in RECIPES:
            yield Cell(f"{text} {model}", functools.partial(one, text, model))


def one(text: str, name: str) -> dict[str, Any]:
    """A cell: the share of the peak, and where the time went."""
    batch, steps = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        backbone, task = _subject(name, Path(folder), rows=batch * steps)
        model = pt.load(backbone, task)
        (phase,) = recipe.parse(text).phases
        surgery.attach(model, list(phase), name="method", on_top=True)
        schedule = Schedule(lr=1e-4, epochs=1.0, batch=batch, cache=False)
        watch = Watch()
        fitted = training.fit(model, task, schedule=schedule, modifiers=[watch])
        before = peak(fitted.dtype)
        profiled = Profiled()
        training.fit(model, task, schedule=schedule, modifiers=[profiled])
        top = max(before, peak(fitted.dtype))
        counted = flops.PerShape(lambda batch: flops.step(lambda: task.kind.loss(model(**task.kind.inputs(batch)), batch)[0], model))
        with probe.autocast(probe.Pace(fitted.dtype)):  # counting computes
            work = sum(counted(part).value or 0.0 for step in watch.steps[WARM:] for part in step)
    seconds = watch.marks[-1] - watch.marks[WARM - 1]
    tokens = sum(int(part["attention_mask"].sum()) for step in watch.steps[WARM:] for part in step)
    return {
        "score": work / seconds / top, "flops_per_s": work / seconds, "peak_flops_per_s": top, "tokens_per_s": tokens / seconds, "dtype": fitted.dtype,
        "attention": fitted.attention, "steps": len(watch.steps) - WARM, "threads": torch.get_num_threads(), "where": profiled.where(),
        "environment": system.describe(),
    }  # fmt: skip


def _subject(name: str, folder: Path, *, rows: int) -> tuple[str, Task]:
    """(backbone, task): MiniLM with SST-2, or a decoder whose weights are random with blocks of the books."""
    if name.startswith("minilm"):
        return "minilm", data.task("sst2", train=rows, validation=0, test=1)
    length = int(re.sub(r"\D", "", name))
    return data.decoder(folder, length=length), data.books(tokens=rows * length)


class Watch(Events):
    """Marks the time behind each step, by the wall clock where no other is given, and keeps its parts."""

    looks_on = True

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.marks: list[float] = []
        self.steps: list[list[dict[str, Any]]] = [[]]  # of each the batches that passed through the model at once

    def events(self, loop: training.Loop) -> Events:
        return self

    def inputs(self, loop: training.Loop, batch: dict[str, Any]) -> dict[str, Any]:
        self.steps[-1].append(batch)
        return batch

    def after_step(self, loop: training.Loop) -> None:
        self.marks.append(self.clock())
        if loop.step < loop.total:
            self.steps.append([])


class Profiled(Events):
    """Profiles the steps of a training but for the first ones, which warm up, and nothing else of it."""

    looks_on = True

    def __init__(self) -> None:
        self.profile, self.begun, self.wall_us = profile(activities=[ProfilerActivity.CPU]), 0.0, 0.0

    def events(self, loop: training.Loop) -> Events:
        return self

    def after_step(self, loop: training.Loop) -> None:
        if loop.step == WARM:
            self.profile.start()
            self.begun = time.perf_counter()
        elif loop.step == loop.total:
            self.wall_us = 1e6 * (time.perf_counter() - self.begun)
            self.profile.stop()

    def where(self) -> dict[str, float]:
        """Shares of the profiled wall time by kind of work."""
        found = dict.fromkeys([*KINDS.values(), OTHER], 0.0)
        for event in self.profile.key_averages():
            kind = next((kind for pattern, kind in KINDS.items() if re.search(pattern, event.key)), OTHER)
            found[kind] += event.self_cpu_time_total
        whole = max(self.wall_us, sum(found.values()))
        return {kind: us / whole for kind, us in found.items()} | {OUTSIDE: 1 - sum(found.values()) / whole}


def peak(dtype: str) -> float:
    """FLOP/s of products of large square matrices: the best of eight."""
    x, y = (torch.randn(LARGE, LARGE, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        x @ y
        best = min(best, time.perf_counter() - started)
    return 2 * LARGE**3 / best


def page(table: Table) -> str:
    """docs/limits.md, from the files."""
    found = {(model, text): table.found(f"{text} {model}") for model in MODELS for text in RECIPES}
    kinds = [*KINDS.values(), OTHER, OUTSIDE]
    where = [[f"`{text}`, {model}", *(f"{100 * f['where'][kind]:.0f}" for kind in kinds)] if f else [f"`{text}`, {model}", *[cells.NOT_RUN] * len(kinds)]
             for (model, text), f in found.items()]  # fmt: skip
    known = list(filter(None, found.values()))
    machine = f"{known[0]['threads']} threads of {known[0]['environment'].get('cpu')}; commit {cells.when(known)}" if known else cells.NOT_RUN
    return f"""# The machine's limit, and where the rest goes

Training steps of the library's loop, optimizer included, but for the first {WARM}. FLOPs are counted on the batches that were trained on, padding included; the peak is
that of products of {LARGE:,} x {LARGE:,} matrices in the same process, number format and threads ({machine}). The decoder is Llama-shaped,
6 layers of width 768 with random weights, on blocks of the books.

{cells.markdown(["steps of", "format", "real tokens/s", "GFLOP/s", "peak GFLOP/s", "share %", "target %", ""], [_row(*key, f) for key, f in found.items()])}

Where the wall time of such steps goes, in percent, by torch's profiler (which itself takes some, most of it from small operators):

{cells.markdown(["steps of", *kinds], where)}

Made by `python -m benchmarks.limits` from the files in `benchmarks/results/limits/`; `--table` makes it again from them.
"""


def _row(model: str, text: str, found: dict[str, Any] | None) -> list[str]:
    target = TARGETS.get(model)
    figures = [cells.NOT_RUN] * 5
    if found:
        rates = (f"{found[k] / 1e9:,.0f}" for k in ("flops_per_s", "peak_flops_per_s"))
        figures = [found["dtype"], f"{found['tokens_per_s']:,.0f}", *rates, f"{100 * found['score']:.0f}"]
    verdict = cells.verdict(found and found["score"], least=target) if target else ""
    return [f"`{text}`, {model}", *figures, f"at least {100 * target:.0f}" if target else "-", verdict]


TABLE = Table("limits", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
