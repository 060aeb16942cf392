"""How near training comes to what this machine can compute, and where the rest goes.

    python -m benchmarks.limits [--hours 1] [--only minilm]

A cell is a model, a text length and a method: steps of the library's own loop, their FLOPs counted on the very batches (products
and attention; norms, masks and activations count 0), over the rate of large matrix products in the same process, number format and
threads. torch's profiler says where the time of the same steps went. Needs the folder of data sets (`benchmarks/data.py`).
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
from paretune.tasks import Task

RECIPES = ("full", "lora(r=8)")
MODELS = {"minilm, SST-2": (32, 12), "decoder, 256 tokens": (8, 6), "decoder, 1,024 tokens": (2, 6)}  # batch, steps
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
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            watched = Watch()
            training.fit(model, task, schedule=schedule, modifiers=[watched])
        top = max(before, peak(fitted.dtype))
        work = sum(_flops(model, task, b) for b in watch.batches[WARM:])
    seconds = watch.marks[-1] - watch.marks[WARM - 1]
    tokens = sum(int(b["attention_mask"].sum()) for b in watch.batches[WARM:])
    return {
        "score": work / seconds / top, "flops_per_s": work / seconds, "peak_flops_per_s": top, "tokens_per_s": tokens / seconds, "dtype": fitted.dtype,
        "attention": fitted.attention, "threads": torch.get_num_threads(), "where": _where(profiled), "environment": system.describe(),
    }  # fmt: skip


def _subject(name: str, folder: Path, *, rows: int) -> tuple[str, Task]:
    """(backbone, task): MiniLM with SST-2, or a decoder whose weights are random with blocks of the books."""
    if name.startswith("minilm"):
        return "minilm", data.task("sst2", train=rows, validation=0, test=1)
    length = int(re.sub(r"\D", "", name))
    return data.decoder(folder, length=length), data.books(tokens=rows * length)


class Watch(Events):
    """Marks the time behind each step, by the wall clock where no other is given, and keeps the batches."""

    looks_on = True

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.marks: list[float] = []
        self.batches: list[dict[str, Any]] = []

    def events(self, loop: training.Loop) -> Events:
        return self

    def inputs(self, loop: training.Loop, batch: dict[str, Any]) -> dict[str, Any]:
        self.batches.append(batch)
        return batch

    def after_step(self, loop: training.Loop) -> None:
        self.marks.append(self.clock())


def _flops(model: Any, task: Task, batch: dict[str, Any]) -> float:
    return flops.step(lambda: task.kind.loss(model(**task.kind.inputs(batch)), batch)[0], model).value or 0.0


def peak(dtype: str) -> float:
    """FLOP/s of products of large square matrices: the best of eight."""
    x, y = (torch.randn(LARGE, LARGE, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        x @ y
        best = min(best, time.perf_counter() - started)
    return 2 * LARGE**3 / best


def _where(profiled: profile) -> dict[str, float]:
    """Shares of the profiled wall time by kind of work."""
    found = dict.fromkeys([*KINDS.values(), OTHER], 0.0)
    begun = min(e.time_range.start for e in profiled.events())
    ended = max(e.time_range.end for e in profiled.events())
    for event in profiled.key_averages():
        kind = next((kind for pattern, kind in KINDS.items() if re.search(pattern, event.key)), OTHER)
        found[kind] += event.self_cpu_time_total
    whole = max(ended - begun, sum(found.values()))
    return {kind: us / whole for kind, us in found.items()} | {OUTSIDE: 1 - sum(found.values()) / whole}


def page(table: Table) -> str:
    """docs/limits.md, from the files."""
    found = {f"`{text}`, {model}": table.found(f"{text} {model}") for model in MODELS for text in RECIPES}
    rows = [[name, f["dtype"], f"{f['tokens_per_s']:,.0f}", f"{f['flops_per_s'] / 1e9:,.0f}", f"{f['peak_flops_per_s'] / 1e9:,.0f}", f"{100 * f['score']:.0f}"]
            if f else [name, *[cells.NOT_RUN] * 5] for name, f in found.items()]  # fmt: skip
    kinds = [*KINDS.values(), OTHER, OUTSIDE]
    where = [[name, *(f"{100 * f['where'][kind]:.0f}" for kind in kinds)] if f else [name, *[cells.NOT_RUN] * len(kinds)] for name, f in found.items()]
    some = next(filter(None, found.values()), None)
    machine = f"{some['threads']} threads of {some['environment'].get('cpu')}" if some else cells.NOT_RUN
    return f"""# The machine's limit, and where the rest goes

Training steps of the library's loop, optimizer included. FLOPs are counted on the batches that were trained on, padding included; the peak is that of
products of {LARGE:,} x {LARGE:,} matrices in the same process, number format and threads ({machine}). The decoder is Llama-shaped,
6 layers of width 768 with random weights, on blocks of the books.

{cells.markdown(["steps of", "format", "real tokens/s", "GFLOP/s", "peak GFLOP/s", "share %"], rows)}

Where the wall time of such steps goes, in percent, by torch's profiler (which itself takes some, most of it from small operators):

{cells.markdown(["steps of", *kinds], where)}

Made by `python -m benchmarks.limits` from the files in `benchmarks/results/limits/`; `--table` makes it again from them.
"""


TABLE = Table("limits", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
