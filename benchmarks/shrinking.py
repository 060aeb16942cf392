"""Shrunk models by tasks: MiniLM fine-tuned on three tasks, made smaller in every way there is here, and by other libraries.

    python -m benchmarks.shrinking [--hours 3] [--only "score sst2"]

The full fine-tuning is one phase per task and seed, which all rows share (kept in $PARETUNE_BENCH, or the folder for temporary files). Scores
are of the whole test split, of models that were saved and opened again. Times come from one process for each task, in which all models take
turns, one text at a time and in batches, with an A/A control; run those cells (`--only time`) on a quiet machine.
"""

from __future__ import annotations

import functools
import operator
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cells, data, opened
from benchmarks.cells import Cell, Table
from paretune.errors import Incompatible
from paretune.pareto import intervals

TASKS = ("sst2", "mrpc", "trec6")
SEEDS = (0, 1, 2)
TRAIN, EPOCHS = 3000, 3
WORK = Path(os.environ.get("PARETUNE_BENCH") or tempfile.gettempdir()) / "paretune-shrinking"
STUDENT = 'full | {} | full + distill(teacher=@1, logits=2.5, hidden=0.5, hidden_by="cosine", layers="last", mix=0.5) + schedule(epochs=10)'
SHAPES = ('keep_layers("0,2,4")', 'keep_layers("0,3")', "ffn(keep=0.2) | attention_heads(keep=4)")
THREE, TWO, THINNER = map(STUDENT.format, SHAPES)
THIN = "thin"  # the recipe of that name: a quarter of the neurons, half of the heads
FP32, BF16, COMPILED, PEER = "fp32", "bf16", "bf16, compiled", "onnxruntime: int8"
ROWS: dict[str, tuple[str, str]] = {  # recipe, and how its saved model is opened (`opened.FORMS`)
    FP32: ("full", "saved"), BF16: ("full | cast", "saved"), COMPILED: ("full | cast", "compiled"), "fp32, compiled": ("full", "compiled"),
    "int8": ("full | int8", "saved"), "int8, static": ('full | int8(mode="static")', "saved"), "bf16 and int8": ("full | cast | int8", "saved"),
    "int8 weights": ("full | int8_weights", "saved"), "int4": ("full | int4", "saved"), "nf4": ("full | nf4", "saved"), "fp8": ("full | fp8", "saved"),
    "LLM.int8()": ("full | llm_int8", "saved"), "onnx": ("full", "onnx"), "int8, onnx": ("full | int8", "onnx"),
    "int8, static, onnx": ('full | int8(mode="static")', "onnx"),
    "magnitude 50 %": ("full | magnitude", "saved"), "magnitude 50 %, retrained": ("full | magnitude | full", "saved"),
    "magnitude 2:4": ('full | magnitude(pattern="2:4")', "saved"),
    "Wanda 50 %": ("full | wanda", "saved"), "half the heads": ("full | attention_heads", "saved"),
    "half the heads, retrained": ("full | attention_heads | full", "saved"), "half the neurons": ("full | ffn", "saved"),
    "half the neurons, retrained": ("full | ffn | full", "saved"), "3 layers, retrained": ('full | keep_layers("0,2,4") | full', "saved"),
    "low rank, half": ("full | low_rank", "saved"), "low rank, half, by activations": ("full | low_rank(activation_aware=True)", "saved"),
    "low rank, half, retrained": ("full | low_rank | full", "saved"),
    "3 layers, distilled": (THREE, "saved"), "2 layers, distilled": (TWO, "saved"), "vocabulary": ("full | vocabulary", "saved"),
    "3 layers, int8": (f"{THREE} | int8", "saved"), "3 layers, bf16 and int8": (f"{THREE} | cast | int8", "saved"),
    "3 layers, vocabulary, bf16 and int8": (f"{THREE} | vocabulary | cast | int8", "saved"),
    "3 layers, vocabulary, int8": (f"{THREE} | vocabulary | int8", "saved"),
    "3 layers, vocabulary, int8, onnx": (f"{THREE} | vocabulary | int8", "onnx"), "2 layers, vocabulary, int8": (f"{TWO} | vocabulary | int8", "saved"),
    "2 layers, vocabulary, int8, onnx": (f"{TWO} | vocabulary | int8", "onnx"), "vocabulary, int8, onnx": ("full | vocabulary | int8", "onnx"),
    "thin layers, distilled": (THIN, "saved"), "thin layers, int8, onnx": (f"{THIN} | int8", "onnx"),
    "thin layers, vocabulary, int8": (f"{THIN} | vocabulary | max_length(128) | int8", "saved"),
    "thin layers, vocabulary, int8, onnx": (f"{THIN} | vocabulary | max_length(128) | int8", "onnx"),
    "thin layers, int8, static, onnx": (f'{THIN} | int8(mode="static")', "onnx"),
    "thin layers, vocabulary, int8, static, onnx": (f'{THIN} | vocabulary | max_length(128) | int8(mode="static")', "onnx"),
    "thinner layers, distilled": (THINNER, "saved"),
    "thinner layers, vocabulary, int8, onnx": (f"{THINNER} | vocabulary | max_length(128) | int8", "onnx"),
    "thinner layers, vocabulary, int8, static, onnx": (f'{THINNER} | vocabulary | max_length(128) | int8(mode="static")', "onnx"),
    "torchao: int8": ("full", "torchao int8"), "torchao: int8, compiled": ("full", "torchao int8 compiled"),
    "torchao: int8 weights": ("full", "torchao int8 weights"), PEER: ("full", "onnxruntime int8"),
}  # fmt: skip
OURS = [name for name, (_, form) in ROWS.items() if form in ("saved", "onnx") and name not in (FP32, BF16)]  # what the targets are for
BATCHES = (8, 16, 32)  # all are timed, and the best counts: a search before it took what one burst of other work left
SAMPLE = 100  # texts that peak memory is measured with
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
        yield Cell(_time(task), functools.partial(timed, task))


def _score(name: str, task: str, seed: int) -> str:
    return f"score {task} {name} {seed}"


def _time(task: str) -> str:
    return f"time {task}"


def score(name: str, task: str, seed: int) -> dict[str, Any]:
    """The test score of a row's model, opened again, its bytes, and with the first seed the memory of a process that opens it; or why it was not exported."""
    from paretune import tasks, training

    recipe, form = ROWS[name]
    given = data.task(task, train=TRAIN, seed=seed)
    made = data.finished(recipe, given, out=str(WORK / task), seed=seed, epochs=EPOCHS)
    kept = data.figures(made, given)
    with tempfile.TemporaryDirectory() as folder:
        try:
            place = opened.prepare(form, made, Path(folder) / "model")
        except Incompatible as refusal:
            return kept | {"score": None, "stored_mb": None, "refused": str(refusal)}
        if form != "saved":
            found = training.predict(opened.model(form, place, given), given, rows=given.test)
            kept |= {"score": tasks.score(given, found, rows=given.test), "score_low": None, "score_high": None, "stored_mb": opened.stored_mb(form, place)}
        return kept | ({"peak_memory_mb": cells.fresh(_peak_mb, form, str(place), task)} if seed == SEEDS[0] else {})


def _peak_mb(form: str, place: str, task: str) -> float:
    """What opening a model and answering some test texts, one at a time, adds to this process, whose libraries and data are loaded."""
    from paretune import inference, training  # noqa: F401, loaded before the memory is looked at
    from paretune.meters import memory

    given = data.task(task, train=TRAIN, seed=SEEDS[0])
    with memory.Peak() as peak:
        training.predict(opened.model(form, Path(place), given), given, rows=given.test[:SAMPLE], batch=1)
    assert peak.reading and peak.reading.value
    return peak.reading.value - peak.before_mb


def timed(task: str) -> dict[str, Any]:
    """Times of all models that were not refused in turn, on the first test rows."""
    from paretune import inference
    from paretune.meters import protocol

    given = data.task(task, train=TRAIN, seed=SEEDS[0])
    kept = {name: recipe for name, (recipe, _) in ROWS.items() if not _refused(name, task, SEEDS[:1])}
    made = {name: data.finished(recipe, given, out=str(WORK / task), epochs=EPOCHS) for name, recipe in kept.items()}
    with tempfile.TemporaryDirectory() as folder:
        places = {name: opened.prepare(ROWS[name][1], run, Path(folder) / f"{i}") for i, (name, run) in enumerate(made.items())}
        benches = {name: inference.Bench(opened.model(ROWS[name][1], place, given), given) for name, place in places.items()}
        calls = {(name, 1): bench.one for name, bench in benches.items()} | {(name, n): bench.many(n) for name, bench in benches.items() for n in BATCHES}
        rounds = protocol.Protocol("cell", window_s=0.5, window_n=200, windows=5, warm_s=1.0, search_s=0.0, idle_s=0.0, idle_each=False, shuffled=True)
        timings = protocol.measure({f"{name}, {n}": call for (name, n), call in calls.items()}, protocol=rounds)
    about = timings[f"{FP32}, 1"]
    found = {(name, n): _times(timings[f"{name}, {n}"], n) for name, n in calls}
    rows = {name: {"one": found[name, 1], "batched": max((found[name, n] for n in BATCHES), key=operator.itemgetter("per_s"))} for name in benches}
    return {"score": made[FP32].score, "rows": rows, "aa_wall": about.aa_wall, "aa_cpu": about.aa_cpu, "notes": sorted({t.note for t in timings.values()}),
            "environment": made[FP32].record["environment"], "threads": _threads()}  # fmt: skip


def _times(timing: Any, n: int) -> dict[str, float]:
    """Of calls with n texts."""
    p50, p95 = timing.latency_p50_ms.value, timing.latency_p95_ms.value
    return {"batch": n, "p50_ms": p50, "p95_ms": p95, "cpu_ms_per_text": 1e3 * timing.cpu_s.value / n, "per_s": 1e3 * n / p50}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _refused(name: str, task: str, seeds: Sequence[int] = SEEDS) -> int:
    """With how many seeds the export's gate refused the row's graph."""
    return sum("refused" in (TABLE.found(_score(name, task, seed)) or {}) for seed in seeds)


def points_lost(name: str, task: str, *, by: str = "score") -> list[float] | None:
    """The points that a row lost to fp32 with each seed; None where files are missing, or a graph was refused."""
    pairs = [(TABLE.found(_score(FP32, task, seed)), TABLE.found(_score(name, task, seed))) for seed in SEEDS]
    return None if _refused(name, task) or not all(a and b for a, b in pairs) else [100 * (a[by] - b[by]) for a, b in pairs if a and b]


@functools.cache
def row(name: str, task: str) -> dict[str, Any] | None:
    """What the files say of a row: points lost, MB and times as factors; None where files are missing, or a graph was refused."""
    time, points, plain, stored = TABLE.found(_time(task)), points_lost(name, task), *(TABLE.found(_score(n, task, SEEDS[0])) for n in (FP32, name))
    if time is None or name not in time["rows"] or points is None or plain is None or stored is None:
        return None
    mine, fp32, bf16, compiled = (time["rows"][r] for r in (name, FP32, BF16, COMPILED))
    return {"lost": statistics.mean(points), "interval": intervals.over_seeds(points, [None] * len(points))[0],
            "lost_on_validation": statistics.mean(points_lost(name, task, by="validation_score") or []),
            "smaller": plain["stored_mb"] / stored["stored_mb"], "faster": fp32["one"]["p50_ms"] / mine["one"]["p50_ms"],
            "best_batch": mine["batched"]["per_s"] / bf16["batched"]["per_s"], "to_compiled": mine["batched"]["per_s"] / compiled["batched"]["per_s"]}  # fmt: skip


def verdicts(task: str) -> Iterator[str]:
    """Each target with the row of ours that comes nearest by validation scores, and whether it is met; then whether int8 is ever slower than bf16."""
    known = {name: found for name in OURS if (found := row(name, task))}
    for what, *asked in TARGETS:
        if not known:
            yield f"- {task}, {what}: {cells.NOT_RUN}"
            continue
        name = max(known, key=lambda n: _reach(known[n], asked, lost="lost_on_validation"))  # noqa: B023
        r, (faster, batch, smaller, lost), met = known[name], asked, _reach(known[name], asked, lost="lost") == len(asked)
        low, high = r["interval"] or (r["lost"], r["lost"])
        yield (f"- {task}, {what}: **{'met' if met else 'not met'}**, nearest: {name}, {r['faster']:.1f} times as fast as fp32 at batch 1 (asked {faster:g}), "
               f"{r['best_batch']:.2f} times eager bf16 at the best batch ({f'asked {batch:g}' if batch else 'not asked'}; {r['to_compiled']:.2f} times compiled bf16), "
               f"{r['smaller']:.1f} times as small ({smaller:g}), {r['lost']:.1f} points lost ({low:.1f} to {high:.1f}; {lost:g} at most)")  # fmt: skip
    for name in ("int8", "bf16 and int8"):
        yield f"- {task}, {name} never slower than bf16: {_never_slower(name, task)}"


def _reach(r: dict[str, Any], asked: Sequence[float], *, lost: str) -> float:
    """How much of a target is reached, of 4."""
    faster, batch, smaller, most = asked
    parts = (r["faster"] / faster, r["best_batch"] / batch if batch else 1.0, r["smaller"] / smaller, 1.0 if r[lost] <= most else 0.0)
    return sum(min(1.0, part) for part in parts)


def _never_slower(name: str, task: str) -> str:
    time = TABLE.found(_time(task))
    if time is None:
        return cells.NOT_RUN
    ratios = {how: time["rows"][name][how]["p50_ms"] / time["rows"][name][how]["batch"] / (time["rows"][BF16][how]["p50_ms"] / time["rows"][BF16][how]["batch"])
              for how in ("one", "batched")}  # fmt: skip
    said = "met" if max(ratios.values()) <= 1 + time["aa_wall"] else "not met"
    return f"**{said}**, {ratios['one']:.2f} times its time at batch 1 and {ratios['batched']:.2f} at the best batch (A/A {100 * time['aa_wall']:.0f} %)"


def sentence() -> str:
    """What README.md says: of the row that comes nearest to the target of a deployable model on all tasks, and of onnxruntime's own way."""
    asked = TARGETS[0][1:]
    known = {name: [row(name, task) for task in TASKS] for name in (*OURS, PEER)}
    name = max((n for n in OURS if None not in known[n]), key=lambda n: min(_reach(r, asked, lost="lost_on_validation") for r in known[n] if r))

    def spread(who: str, field: str) -> str:
        found = [r[field] for r in known[who] if r]
        return " to ".join(dict.fromkeys((f"{min(found):.1f}", f"{max(found):.1f}")))

    recipe, form = ROWS[name]
    return (f"`{recipe}`{' as an ONNX graph' if form == 'onnx' else ''} answers one text {spread(name, 'faster')} times as fast as full fine-tuning in fp32 on SST-2, "
            f"MRPC and TREC, is {spread(name, 'smaller')} times as small and scores {spread(name, 'lost')} points less (means of {len(SEEDS)} seeds); with "
            f"onnxruntime's own int8 it is {spread(PEER, 'faster')} times as fast, {spread(PEER, 'smaller')} times as small, and "
            f"{spread(PEER, 'lost')} points less")  # fmt: skip


def code(recipe: str) -> str:
    """A recipe in a table, where a bare | would end the cell."""
    return "`" + recipe.replace("|", "\\|") + "`"


def _scored(name: str, task: str) -> list[str]:
    found = [TABLE.found(_score(name, task, seed)) for seed in SEEDS]
    points, refused = points_lost(name, task), _refused(name, task)
    said = f"{statistics.mean(points):+.1f}" if points else f"refused in {refused} of {len(SEEDS)}" if refused else cells.NOT_RUN
    found = [f if f and "refused" not in f else None for f in found]
    return [name, cells.mean_interval(found), said, cells.mean(found, "stored_mb", digits=1), cells.mean(found[:1], "peak_memory_mb")]


def _timed(name: str, task: str) -> list[str]:
    time = TABLE.found(_time(task))
    if time is None or name not in time["rows"]:
        return [name, *["refused" if _refused(name, task, SEEDS[:1]) else cells.NOT_RUN] * 8]
    one, many = (time["rows"][name][how] for how in ("one", "batched"))
    to = {other: many["per_s"] / time["rows"][other]["batched"]["per_s"] for other in (BF16, COMPILED)}
    return [name, f"{one['p50_ms']:.2f}, {one['p95_ms']:.2f}", f"{time['rows'][FP32]['one']['p50_ms'] / one['p50_ms']:.2f}", f"{one['cpu_ms_per_text']:.1f}",
            f"{many['batch']}", f"{many['p50_ms']:.1f}, {many['p95_ms']:.1f}", f"{many['cpu_ms_per_text']:.2f}", f"{many['per_s']:,.0f}",
            f"{to[BF16]:.2f}, {to[COMPILED]:.2f}"]  # fmt: skip


def _section(task: str) -> str:
    time = TABLE.found(_time(task))
    scores = cells.markdown(["model", "score", "points lost", "MB", "peak MB"], (_scored(name, task) for name in ROWS))
    head = ["model", "ms: p50, p95", "times as fast as fp32", "CPU ms", "best batch", "its ms: p50, p95", "CPU ms a text", "texts/s", "to bf16's: eager, compiled"]
    aa = ""
    if time:
        machine = f"{time['environment']['cpu']} ({', '.join(time['environment']['cpu_flags'])})"
        aa = (f"Times: {time['threads']} threads of {machine}; commit {cells.when([time])}. "
              f"A/A: {100 * time['aa_wall']:.1f} % of wall time, {100 * time['aa_cpu']:.1f} % of CPU time.")  # fmt: skip
    return f"## {task}\n\n{scores}\n\n{cells.markdown(head, (_timed(name, task) for name in ROWS))}\n\n{aa}"


def page(table: Table) -> str:
    """docs/shrinking.md, from the files."""
    tables = "\n\n".join(map(_section, TASKS))
    recipes = cells.markdown(["model", "recipe", "opened as"], ([name, code(recipe), form] for name, (recipe, form) in ROWS.items()))
    targets = "\n".join(line for task in TASKS for line in verdicts(task))
    return f"""# Shrinking MiniLM on three tasks

The score is the mean over {len(SEEDS)} seeds with the half width of its 95 % interval over them (Student's t), on the whole test split, after {EPOCHS} epochs
on up to {TRAIN:,} texts; all rows of a task and seed start from the same fine-tuned weights, and points lost are to fp32 with the same seed. MB are all files that
opening the model reads. Peak memory is what opening it and answering {SAMPLE} texts, one at a time, adds to a process of its own whose libraries are loaded. Times are
of one process in which all models of a task took turns, tokenizing apart; the best batch is that of {", ".join(map(str, BATCHES))} with most texts a second;
the A/A control is how far two measurements of one model differ.
"Refused": `paretune export` wrote no graph, since its answers to test rows differed from the model's by more than is tolerated; such a row counts for no
target.

## Targets

The row of a target is chosen by validation scores.

{targets}

{tables}

## What the rows are

{recipes}

Made by `python -m benchmarks.shrinking` from the files in `benchmarks/results/shrinking/`; `--table` makes it again from them.
"""


TABLE = Table("shrinking", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
