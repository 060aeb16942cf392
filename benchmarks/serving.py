"""What adapters that stay apart cost at each answer, what memory that stays between answers saves, and how much faster many rows can be answered.

    python -m benchmarks.serving [--rounds 7]

MiniLM on SST-2. Ways take turns within a round, every second round backwards; the merged model runs twice as the A/A control. Needs the
folder of data sets (`benchmarks/data.py`) and, for graphs, `paretune[onnx]`.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import paretune as pt
from benchmarks import cells, data
from benchmarks.cells import Timing
from paretune import inference, serving
from paretune.meters import memory

RECIPES = ("lora(r=8)", 'lora(r=8, targets="query value")', "lora(r=64)", "ia3")
BATCHES = {1: 200, 32: 10}  # texts at a time, and how many times in a round
FORMATS = {"fp32": None, "bf16": "cast", "int8": "int8", "int8 between bf16": "cast | int8"}  # of the backbone
STAYS, GOES = "stays", "goes back"
MERGED, AGAIN, SAVED = "merged", "merged, again", "as saved"
ROWS = 1000


def measured(rounds: int) -> dict[str, Any]:
    """CPU seconds of one answer and of many."""
    return {"threads": torch.get_num_threads(), "unmerged": unmerged(rounds), "kept": kept((rounds + 1) // 2), "many": many(rounds)}


def unmerged(rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of an answer by batch, with the adapter apart and merged."""
    given = data.task("sst2", train=8, validation=1, test=200)
    benches = {MERGED: _bench(RECIPES[0], given, merged=True), AGAIN: _bench(RECIPES[0], given, merged=True)}
    benches |= {recipe: _bench(recipe, given, merged=False) for recipe in RECIPES}
    return {str(batch): _timed({name: b.one if batch == 1 else b.many(batch) for name, b in benches.items()}, rounds, times) for batch, times in BATCHES.items()}


def _bench(recipe: str, given: Any, *, merged: bool) -> inference.Bench:
    model = pt.adapt(pt.load("minilm", given), recipe).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "paretune" in name:
            torch.nn.init.normal_(parameter, std=0.01)  # as if it had learned
    return inference.Bench(pt.shrink(model, pt.Merge()) if merged else model, given)


def kept(rounds: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """CPU seconds of an answer by format, batch and what becomes of freed memory, each time in a process of its own: glibc's rule learns from what was freed before."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {name: {str(n): {STAYS: [], GOES: []} for n in BATCHES} for name in FORMATS}
    for i in range(rounds):
        for name, way in list(itertools.product(FORMATS, (STAYS, GOES)))[:: 1 if i % 2 else -1]:
            for batch, seconds in cells.fresh(_answers, name, way).items():
                found[name][batch][way].append(seconds)
    return found


def _answers(name: str, way: str) -> dict[str, float]:
    """CPU seconds of an answer by batch, in this process."""
    given, recipe = data.task("sst2", train=8, validation=1, test=200), FORMATS[name]
    model = pt.load("minilm", given).eval().requires_grad_(False)
    bench = inference.Bench(pt.shrink(model, recipe) if recipe else model, given)
    with memory.kept_between_calls() if way == STAYS else contextlib.nullcontext():
        return {str(n): _timed({"": bench.one if n == 1 else bench.many(n)}, 1, times)[""][0] for n, times in BATCHES.items()}


def _timed(ways: dict[str, Callable[[], Any]], rounds: int, times: int) -> dict[str, list[float]]:
    """CPU seconds of one call, by way and round; a first round only warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name in list(ways)[:: 1 if i % 2 else -1]:
            begun = time.process_time()
            for _ in range(times):
                ways[name]()
            taken[name].append((time.process_time() - begun) / times)
    return {name: seconds[1:] for name, seconds in taken.items()}


def many(rounds: int) -> dict[str, Any]:
    """CPU seconds of answering many rows, as `paretune predict` may: the saved model's way, and what else it tries."""
    given = data.task("sst2", train=200, validation=50, test=ROWS)
    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as entered:
        made = data.finished(RECIPES[0], given, out=out, epochs=1)
        task = inference.task_of(made)
        answers = {SAVED: serving.plain(inference.open_model(made.model, task), task)}
        for way in serving.ways(made, inference.open_model(made.model, task), task=task):
            answers[way.name] = way.ready(entered)
        rows = list(given.test)
        truth = answers[SAVED](rows)
        same = {name: sum(map(serving.alike, truth, answer(rows))) for name, answer in answers.items()}
        return {"cpu_s": _timed({name: lambda answer=answer: answer(rows) for name, answer in answers.items()}, rounds, 1), "alike": same}


def page(found: dict[str, Any]) -> str:
    """docs/serving.md, from the file."""
    rows = []
    for name in (MERGED, AGAIN, *RECIPES):
        shown = [f"{1e3 * statistics.median(times[name]):.2f} ({_ratio(times, name, MERGED)})" for times in found["unmerged"].values()]
        rows.append([name if name in (MERGED, AGAIN) else f"`{name}`", *shown])
    stays = [[name, *(f"{1e3 * statistics.median(times[STAYS]):.2f} ({_ratio(times, GOES, STAYS)})" for times in by.values())] for name, by in found["kept"].items()]
    times = found["many"]["cpu_s"]
    faster = [[name, f"{ROWS / statistics.median(times[name]):,.0f}", _ratio(times, SAVED, name), f"{found['many']['alike'][name]:,} of {ROWS:,}"] for name in times]
    return f"""# Answers: adapters left on, and many rows

MiniLM on SST-2, {found["threads"]} threads of {found["environment"].get("cpu")}; CPU time, medians of {len(times[SAVED])} rounds with the range of the ratios.

## Adapters that stay apart

Milliseconds of CPU time of a call, and times as much as with `{RECIPES[0]}` merged ("{AGAIN}" is the A/A control). `export` merges
(`--to hf` and `--to onnx`, where an adapter can be merged); several adapters on one backbone, or one to be switched off, stay apart (`--keep-adapters`).

{cells.markdown(["adapter", *(f"{n} at a time" for n in BATCHES)], rows)}

## Memory that stays between answers

What a batch lets go, the next one asks for again. glibc gives the end of its heap back in between, by a rule that learns from what was freed before, and the kernel
makes the pages anew; `paretune predict`, `measure` and evaluations keep it until they end. CPU milliseconds of a call of the backbone with a head, and how many
times as many it takes without that, each in {len(found["kept"]["fp32"]["1"][STAYS])} processes of its own. (Where a format times its kernels first, glibc has learned
from that.)

{cells.markdown(["weights", *(f"{n} at a time" for n in BATCHES)], stays)}

## Many rows

What `paretune predict` finds for a large file: {ROWS:,} test sentences with `{RECIPES[0]}`, left on. "Alike" are answers with the same label and probabilities
within {serving.APART:g}. A faster way takes over once a trial costs less than {serving.SHARE:.0%} of the time spent, if {serving.ALIKE:.0%} of the answers are alike.

{cells.markdown(["way", "rows per CPU second", "times as fast as saved", "alike"], faster)}

Made by `python -m benchmarks.serving` from `benchmarks/results/serving.json`; `--table` makes it again from the file.
"""


def _ratio(times: dict[str, list[float]], above: str, below: str) -> str:
    ratios = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
    return f"{statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}"


TIMING = Timing("serving", measured, page, rounds=7)

if __name__ == "__main__":
    TIMING.main()
