"""Shrunk models by tasks: MiniLM fine-tuned on three tasks, made smaller in every way there is here, and by other libraries.

    python -m benchmarks.shrinking [--hours 3] [--only sst2]

The full fine-tuning is one phase per task and seed, which all rows share (kept in $PARETUNE_BENCH, or the folder for temporary files). Scores
are of the whole test split, of models that were saved and opened again. A row's times come from one process in which it, fp32 and bf16 take
turns, with an A/A control; run those cells (`--only time`) on a quiet machine.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import cells, data, opened
from benchmarks.cells import Cell, Table

TASKS = ("sst2", "mrpc", "trec6")
SEEDS = (0, 1, 2)
TRAIN, EPOCHS = 3000, 3
WORK = Path(os.environ.get("PARETUNE_BENCH") or tempfile.gettempdir()) / "paretune-shrinking"
STUDENT = 'full | keep_layers("{}") | full + distill(teacher=@1, logits=2.5, hidden=0.5, hidden_by="cosine", layers="last", mix=0.5)'
THREE, TWO = STUDENT.format("0,2,4"), STUDENT.format("0,3")
FP32, BF16 = "fp32", "bf16"
ROWS: dict[str, tuple[str, str]] = {  # recipe, and how its saved model is opened (`opened.FORMS`)
    FP32: ("full", "saved"), BF16: ("full | cast", "saved"), "bf16, compiled": ("full | cast", "compiled"), "fp32, compiled": ("full", "compiled"),
    "int8": ("full | int8", "saved"), "int8, static": ('full | int8(mode="static")', "saved"), "bf16 and int8": ("full | cast | int8", "saved"),
    "int8 weights": ("full | int8_weights", "saved"), "int4": ("full | int4", "saved"), "nf4": ("full | nf4", "saved"), "fp8": ("full | fp8", "saved"),
    "LLM.int8()": ("full | llm_int8", "saved"), "onnx": ("full", "onnx"), "int8, onnx": ("full | int8", "onnx"),
    "magnitude 50 %": ("full | magnitude", "saved"), "magnitude 50 %, retrained": ("full | magnitude | full", "saved"),
    "Wanda 50 %": ("full | wanda", "saved"), "half the heads": ("full | attention_heads", "saved"),
    "half the heads, retrained": ("full | attention_heads | full", "saved"), "half the neurons": ("full | ffn", "saved"),
    "half the neurons, retrained": ("full | ffn | full", "saved"), "3 layers, retrained": ('full | keep_layers("0,2,4") | full', "saved"),
    "low rank, half": ("full | low_rank", "saved"), "low rank, half, by activations": ("full | low_rank(activation_aware=True)", "saved"),
    "3 layers, distilled": (THREE, "saved"), "2 layers, distilled": (TWO, "saved"), "vocabulary": ("full | vocabulary", "saved"),
    "3 layers, int8": (f"{THREE} | int8", "saved"), "3 layers, vocabulary, int8": (f"{THREE} | vocabulary | int8", "saved"),
    "3 layers, vocabulary, int8, onnx": (f"{THREE} | vocabulary | int8", "onnx"), "2 layers, vocabulary, int8": (f"{TWO} | vocabulary | int8", "saved"),
    "2 layers, vocabulary, int8, onnx": (f"{TWO} | vocabulary | int8", "onnx"), "vocabulary, int8, onnx": ("full | vocabulary | int8", "onnx"),
    "torchao: int8": ("full", "torchao int8"), "torchao: int8, compiled": ("full", "torchao int8 compiled"),
    "torchao: int8 weights": ("full", "torchao int8 weights"), "onnxruntime: int8": ("full", "onnxruntime int8"),
}  # fmt: skip
TARGETS = (  # what must be: times as fast as fp32 at batch 1, as bf16 at the best batch, times as small as fp32, points lost at most
    ("deployable", 4.0, 1.4, 3.5, 1.0),
    ("combined", 10.0, 0.0, 10.0, 3.0),
)


def every_cell() -> Iterator[Cell]:
    """Scores, seeds outermost, the fine-tuning before what is made of it; then times, of the models of seed 0."""
    for seed in SEEDS:
        for task in TASKS:
            for name in ROWS:
                yield Cell(_score(name, task, seed), functools.partial(score, name, task, seed))
    for task in TASKS:
        for name in ROWS:
            yield Cell(_time(name, task), functools.partial(timed, name, task))


def _score(name: str, task: str, seed: int) -> str:
    return f"score {name} {task} {seed}"


def _time(name: str, task: str) -> str:
    return f"time {name} {task}"


def score(name: str, task: str, seed: int) -> dict[str, Any]:
    """The test score of a row's model, opened again, and its bytes."""
    from paretune import tasks, training

    recipe, form = ROWS[name]
    given = data.task(task, train=TRAIN, seed=seed)
    made = data.finished(recipe, given, out=str(WORK / task), seed=seed, epochs=EPOCHS)
    kept = data.figures(made, given)
    if form == "saved":
        return kept
    with tempfile.TemporaryDirectory() as folder:
        place = opened.prepare(form, made, Path(folder) / "model")
        found = training.predict(opened.model(form, place, given), given, rows=given.test)
        return kept | {"score": tasks.score(given, found, rows=given.test), "score_low": None, "score_high": None, "stored_mb": opened.stored_mb(form, place)}


def timed(name: str, task: str) -> dict[str, Any]:
    """Times of a row's model beside fp32 and bf16, in turn, on the first test rows; and the memory of a process that opens it."""
    from paretune import inference
    from paretune.meters import protocol

    given = data.task(task, train=TRAIN, seed=0)
    made = {row: data.finished(ROWS[row][0], given, out=str(WORK / task), epochs=EPOCHS) for row in dict.fromkeys((name, FP32, BF16))}
    with tempfile.TemporaryDirectory() as folder:
        places = {row: opened.prepare(ROWS[row][1], run, Path(folder) / f"{i}") for i, (row, run) in enumerate(made.items())}
        benches = {row: inference.Bench(opened.model(ROWS[row][1], place, given), given) for row, place in places.items()}
        rounds = protocol.Protocol("cell", window_s=1.0, window_n=200, windows=5, warm_s=2.0, search_s=0.0, idle_s=0.0, idle_each=False, shuffled=True)
        timings = protocol.measure({row: bench.one for row, bench in benches.items()}, protocol=rounds)
        rates = {row: bench.throughput(limit_s=3.0) for row, bench in benches.items()}
        (peak,) = inference.peak_memory([places[name]]) if opened.alone(ROWS[name][1]) else (None,)
    of = {row: {"p50_ms": t.latency_p50_ms.value, "p95_ms": t.latency_p95_ms.value, "cpu_s": t.cpu_s.value, "per_s": rates[row].value,
                "best_batch": rates[row].source} for row, t in timings.items()}  # fmt: skip
    about = timings[name]
    return {"score": made[name].score, "rows": of, "aa_wall": about.aa_wall, "aa_cpu": about.aa_cpu, "note": about.note,
            "peak_memory_mb": peak.value if peak else None, "environment": made[name].record["environment"], "threads": _threads()}  # fmt: skip


def _threads() -> int:
    import torch

    return torch.get_num_threads()


@functools.cache
def row(name: str, task: str) -> dict[str, float] | None:
    """What a row's files say of a task: points, points lost to fp32, MB and times, as factors, too; None where files are missing."""
    scores = [TABLE.found(_score(name, task, seed)) for seed in SEEDS]
    plain = [TABLE.found(_score(FP32, task, seed)) for seed in SEEDS]
    time = TABLE.found(_time(name, task))
    if None in (*scores, *plain, time):
        return None
    mean = {which: statistics.mean(100 * f["score"] for f in found) for which, found in (("row", scores), ("plain", plain))}
    mine, fp32, bf16 = (time["rows"][r] for r in (name, FP32, BF16))
    stored = scores[0]["stored_mb"]
    return {"lost": mean["plain"] - mean["row"], "stored_mb": stored, "smaller": plain[0]["stored_mb"] / stored, "faster": fp32["p50_ms"] / mine["p50_ms"],
            "best_batch": mine["per_s"] / bf16["per_s"], "cpu": fp32["cpu_s"] / mine["cpu_s"]}  # fmt: skip


def verdicts(task: str) -> Iterator[str]:
    """Each target with the row of ours that comes nearest, and whether it is met."""
    known = {name: found for name in ROWS if ": " not in name and (found := row(name, task))}
    for what, faster, batch, smaller, lost in TARGETS:
        if not known:
            yield f"- {task}, {what}: {cells.NOT_RUN}"
            continue

        def reach(r: dict[str, float], asked: tuple[float, float, float, float] = (faster, batch, smaller, lost)) -> float:
            parts = [r["faster"] / asked[0], r["best_batch"] / asked[1] if asked[1] else 1.0, r["smaller"] / asked[2], 1.0 if r["lost"] <= asked[3] else 0.0]
            return sum(min(1.0, part) for part in parts)

        name = max(known, key=lambda n: reach(known[n]))
        r, met = known[name], reach(known[name]) == 4.0
        yield (f"- {task}, {what}: **{'met' if met else 'not met'}**, nearest: {name}, {r['faster']:.1f} times as fast as fp32 at batch 1 (asked {faster:g}), "
               f"{r['best_batch']:.2f} times bf16 at the best batch ({f'asked {batch:g}' if batch else 'not asked'}), {r['smaller']:.1f} times as small "
               f"({smaller:g}), {r['lost']:.1f} points lost ({lost:g} at most)")  # fmt: skip


def _line(name: str, task: str) -> list[str]:
    scores = [TABLE.found(_score(name, task, seed)) for seed in SEEDS]
    time = TABLE.found(_time(name, task))
    size = next((f"{f['stored_mb']:.1f}" for f in scores if f and f.get("stored_mb")), cells.NOT_RUN)
    if time is None:
        return [name, cells.mean_range(scores), size, *[cells.NOT_RUN] * 6]
    mine, fp32, bf16 = (time["rows"][r] for r in (name, FP32, BF16))
    peak = f"{time['peak_memory_mb']:,.0f}" if time["peak_memory_mb"] else ""
    return [name, cells.mean_range(scores), size, peak, f"{mine['p50_ms']:.2f}, {mine['p95_ms']:.2f}", f"{fp32['p50_ms'] / mine['p50_ms']:.2f}",
            f"{1e3 * mine['cpu_s']:.1f}", f"{mine['per_s']:,.0f} ({mine['per_s'] / bf16['per_s']:.2f})", f"{100 * time['aa_wall']:.0f}"]  # fmt: skip


def code(recipe: str) -> str:
    """A recipe in a table, where a bare | would end the cell."""
    return "`" + recipe.replace("|", "\\|") + "`"


def page(table: Table) -> str:
    """docs/shrinking.md, from the files."""
    head = ["model", "score", "MB", "peak MB", "ms: p50, p95", "times as fast as fp32", "CPU ms", "examples/s (to bf16's)", "A/A %"]
    tables = "\n\n".join(f"## {task}\n\n{cells.markdown(head, (_line(name, task) for name in ROWS))}" for task in TASKS)
    recipes = cells.markdown(["model", "recipe", "opened as"], ([name, code(recipe), form] for name, (recipe, form) in ROWS.items()))
    targets = "\n".join(line for task in TASKS for line in verdicts(task))
    return f"""# Shrinking MiniLM on three tasks

The score is the mean over {len(SEEDS)} seeds with the lowest and the highest, on the whole test split, after {EPOCHS} epochs on up to {TRAIN:,} texts; all rows of a task
and seed start from the same fine-tuned weights. MB are all files that opening the model reads. Milliseconds are of one text at a time, tokenizing
apart; a row, fp32 and bf16 took turns in one process, and factors are within that process, as is the A/A control (how far two measurements of one
model differ). Examples a second are at the best batch. Peak memory is of a fresh process, over what it held before the model.

## Targets

{targets}

{tables}

## What the rows are

{recipes}

Made by `python -m benchmarks.shrinking` from the files in `benchmarks/results/shrinking/`; `--table` makes it again from them.
"""


TABLE = Table("shrinking", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
