"""The Long Range Arena on two cores: every attention transform in one small encoder, trained from nothing on six tasks.

    python -m benchmarks.long_range [--hours 2] [--only listops]
    python -m benchmarks.long_range --full --only "linformer listops 0"     the paper's sizes: days on two cores, hours on a GPU

The tasks, the encoder and the full sizes are in `benchmarks/arena.py`. The encoder has as many positions as the task's longest input,
so that what is spread over positions is spread over tokens. Speed and memory are of one training step at lengths 1,024 to 4,096, batch 1,
each method in turn with full attention as its own control.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import paretune as pt
from benchmarks import arena, cells, data, growth, windows
from benchmarks.arena import ARENA, SMALL
from benchmarks.cells import Cell, Table

METHODS = {
    "full attention": "", "blockwise": "blockwise(blocks=4)", "longformer": "longformer(window=64)", "reformer": "reformer(bucket_size=64)",
    "linformer": "linformer(k=64)", "perceiver": "perceiver(latents=64)", "based": "based(window=64)",
}  # fmt: skip
PUBLISHED = {"full attention": "Transformer", "longformer": "Longformer", "reformer": "Reformer", "linformer": "Linformer"}  # their names in the paper's table
CONTROL, ROUNDS = "full attention", 5
SEEDS, LENGTHS = (0, 1, 2), (1024, 2048, 3072, 4096)
LR, BATCH, VALIDATION, TEST = 2e-3, 4, 200, 400
LIMIT_S = 300.0  # of CPU time may a training take
PICTURE = cells.ROOT / "docs" / "long_range.png"
GUIDE = cells.ROOT / "docs" / "guide" / "long-texts.md"


def every_cell() -> Iterator[Cell]:
    """Speeds first, since they are quick; then scores, seeds outermost."""
    for method in METHODS:
        for length in LENGTHS:
            yield Cell(f"{method} step {length}", functools.partial(step, method, length))
    for seed in SEEDS:
        for name in ARENA:
            for method in METHODS:
                yield Cell(f"{method} {name} {seed}", functools.partial(cells.fresh, one, method, name, seed))


def every_full_cell() -> Iterator[Cell]:
    """The paper's sizes, every method with its own defaults."""
    for seed, name, method in itertools.product(SEEDS, arena.LARGE, METHODS):
        yield Cell(_full_name(method, name, seed), functools.partial(cells.fresh, one_full, method, name, seed))


def _full_name(method: str, name: str, seed: int) -> str:
    return f"full size, {method} {name} {seed}"


def one(method: str, name: str, seed: int) -> dict[str, Any]:
    """One method trained on one task."""
    here = ARENA[name]
    task = here.task().subset(here.train, seed=seed)
    trained = f"full + head(pooling='mean') + schedule(lr={LR}, batch={BATCH}, epochs={here.epochs}, warmup=0.1, patience=99, dtype='fp32')"
    recipe = f"{METHODS[method]} | {trained}".removeprefix(" | ")
    return _trained(recipe, task, seed=seed, backbone=arena.encoder(here))


def one_full(method: str, name: str, seed: int) -> dict[str, Any]:
    """One method trained in the paper's size."""
    large = arena.full(name)
    task = arena.LARGE[name](large.rows)
    recipe = large.trained("" if method == CONTROL else method, rows=len(task.train))
    return _trained(str(recipe), task, seed=seed, backbone=arena.encoder(ARENA[large.task], **large.encoder))


def _trained(recipe: str, task: Any, *, seed: int, backbone: str) -> dict[str, Any]:
    """The figures of a run, with the steps of its training."""
    few = dataclasses.replace(task, validation=data.few(task.validation, VALIDATION), test=data.few(task.test, TEST))
    found = data.one_run(recipe, few, seed=seed, backbone=backbone)
    steps = sum(phase.get("steps", 0) for phase in found["phases"])
    return found | {"steps": steps, "cpu_s_per_step": found["train_cpu_s"] / steps}


def ready(method: str, length: int) -> Callable[[], None]:
    """One training step of an encoder of that many positions with this attention on random tokens, batch 1, all of it learning."""
    import torch

    here = dataclasses.replace(ARENA["pathfinder"], longest=length)
    torch.manual_seed(0)
    model = pt.load(arena.encoder(here))
    if METHODS[method]:
        ((transform,),) = pt.parse(METHODS[method]).phases
        pt.shrink(model, transform)
    model.train().requires_grad_(True)
    tokens = torch.randint(4, 4 + len(here.vocabulary), (1, length))

    def work() -> None:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state.square().mean().backward()

    work()
    return work


def step(method: str, length: int) -> dict[str, Any]:
    """CPU seconds of a step, in turn with full attention's; the memory that a step of each adds to a process of its own that has the model."""
    import torch

    from paretune.meters import memory, system

    torch.set_num_threads(1)  # one that waits for others would be counted as if it worked
    steps = {name: ready(name, length) for name in (method, CONTROL)}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    again: list[float] = []
    for _ in range(ROUNDS):
        for name, work in steps.items():
            taken[name].append(_cpu_s(work))
        again.append(_cpu_s(steps[CONTROL]))
    peaks = {name: memory.child_peak("benchmarks.long_range:ready", [name, length]).over_mb.value for name in steps}
    cpu_s, full_s = statistics.median(taken[method]), statistics.median(taken[CONTROL])
    return {"method": method, "length": length, "score": full_s / cpu_s, "step_cpu_s": cpu_s, "full_step_cpu_s": full_s, "full_again_cpu_s": statistics.median(again),
            "peak_mb": peaks[method], "full_peak_mb": peaks[CONTROL], "environment": system.describe()}  # fmt: skip


def _cpu_s(work: Callable[[], None]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


# --- what the files say -----------------------------------------------------------------------------------------------------------


def exponents(table: Table) -> dict[str, tuple[float, float]]:
    """Of each method whose steps were measured at all lengths: b of CPU time and of memory ~ n^b."""
    found = {}
    for method in METHODS:
        steps = [(n, f) for n in LENGTHS if (f := table.found(f"{method} step {n}"))]
        fitted = [growth.exponent([(n, f[field]) for n, f in steps], whole=True) for field in ("step_cpu_s", "peak_mb")]
        if len(steps) == len(LENGTHS) and None not in fitted:
            found[method] = tuple(fitted)
    return found


def sentence(method: str, table: Table) -> str | None:
    """What a method's card says of its measured complexity; None where it was not measured."""
    found = exponents(table)
    if not {method, CONTROL} <= set(found):
        return None
    return f"From {LENGTHS[0]:,} to {LENGTHS[-1]:,} tokens a training step's CPU time grew as n^{found[method][0]:.1f}, full attention's as n^{found[CONTROL][0]:.1f}"


def pays_from(method: str, table: Table) -> str:
    """The first of the lengths from which on a step of the method takes less CPU time than both measurements of full attention's."""
    steps = [(n, table.found(f"{method} step {n}")) for n in LENGTHS]
    if any(f is None for _, f in steps):
        return cells.NOT_RUN
    slower = max((n for n, f in steps if f["step_cpu_s"] >= min(f["full_step_cpu_s"], f["full_again_cpu_s"])), default=0)
    return f"{min(n for n in LENGTHS if n > slower):,}" if slower < LENGTHS[-1] else f"not up to {LENGTHS[-1]:,}"


def of_seeds(table: Table, method: str, name: str) -> list[dict[str, Any] | None]:
    """The runs of a method on a task, or None where one was not made."""
    return [table.found(f"{method} {name} {seed}") for seed in SEEDS]


def figure(table: Table) -> bool:
    """docs/long_range.png: accuracy against CPU seconds of a step, a panel for each task; False, and no picture, where no run was made."""
    import numpy as np
    from matplotlib.figure import Figure

    from paretune.pareto import dominance

    drawn = Figure(figsize=(12, 7.5), layout="constrained")
    for panel, name in zip(drawn.subplots(2, 3).flat, ARENA, strict=True):
        runs = {m: [f for f in of_seeds(table, m, name) if f] for m in METHODS}
        points = {m: (statistics.mean(f["cpu_s_per_step"] for f in found), 100 * statistics.mean(f["score"] for f in found)) for m, found in runs.items() if found}
        panel.set(title=name, xlabel=f"CPU seconds of a step of {BATCH} examples", ylabel="accuracy, percent")
        for method, (x, y) in points.items():
            scores, color = [100 * f["score"] for f in runs[method]], f"C{list(METHODS).index(method)}"
            panel.errorbar(x, y, yerr=[[y - min(scores)], [max(scores) - y]], fmt="o", color=color, capsize=3, label=method)
        panel.axhline(100 * ARENA[name].chance, color="0.6", linestyle=":", linewidth=1, zorder=0, label="chance")
        if points:
            at = np.array(list(points.values()))
            panel.set_xlim(0, 1.1 * at[:, 0].max())
        if above_chance(table, name):
            best = sorted(map(tuple, at[dominance.non_dominated(at * [1, -1])]))
            panel.step(*zip(*best, strict=True), where="post", color="0.6", linewidth=1, zorder=0, label="frontier")
    shown = {label: handle for panel in drawn.axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    drawn.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(METHODS) + 2, frameon=False)
    if not any(f for m in METHODS for name in ARENA for f in of_seeds(table, m, name)):
        return False
    drawn.savefig(PICTURE, dpi=100)
    return True


# --- the page ---------------------------------------------------------------------------------------------------------------------


def of_task(table: Table, name: str) -> str:
    """The table of one task: accuracy, speed, memory and time here, beside what the paper has."""
    theirs = {row["model"]: row for row in arena.published()}
    head = ["attention", "accuracy, %", "steps per CPU s", "peak memory, MB", "training, CPU s", *(f"step at {n:,}, CPU s" for n in LENGTHS), "published accuracy, %"]
    rows = []
    for method, spelled in METHODS.items():
        found = of_seeds(table, method, name)
        paces = [f and {"steps_per_cpu_s": 1 / f["cpu_s_per_step"]} for f in found]
        steps = ([table.found(f"{method} step {n}")] for n in LENGTHS)
        model, column = PUBLISHED.get(method), ARENA[name].published
        known = theirs[model][column] if model and column else "-"
        rows.append([f"`{spelled}`" if spelled else method, cells.mean_interval(found), cells.mean(paces, "steps_per_cpu_s", digits=2),
                     cells.mean(found, "train_peak_mb"), cells.mean(found, "train_cpu_s"), *(cells.mean(f, "step_cpu_s", digits=2) for f in steps), known])  # fmt: skip
    here, filled = ARENA[name], cells.markdown(head, rows)
    told = f"At most {here.longest:,} tokens; {here.train:,} training examples at most, seen {here.epochs:g} times. {learned(table, name)}"
    return f"## {name.capitalize()}\n\n{told}\n\n{filled}"


def above_chance(table: Table, name: str) -> list[str]:
    """The methods that learned a task at all: in each of their runs the score's 95 % interval lies above chance."""
    runs = {m: [f for f in of_seeds(table, m, name) if f] for m in METHODS}
    return [m for m, found in runs.items() if found and all(f["score_low"] > ARENA[name].chance for f in found)]


def learned(table: Table, name: str) -> str:
    """A sentence on them."""
    if not any(f for m in METHODS for f in of_seeds(table, m, name)):
        return "No method was trained on it yet."
    able = above_chance(table, name)
    chance = f"Chance is {100 * ARENA[name].chance:.0f} %; the 95 % interval of every run's score is above it for"
    return f"{chance} {', '.join(able)}." if able else f"{chance} no method, so that the table compares nothing but cost."


def run_times(table: Table) -> str:
    """A sentence about the five minutes."""
    runs = {f["cell"]: f["train_cpu_s"] for m in METHODS for name in ARENA for f in of_seeds(table, m, name) if f}
    over = [f"{cell} ({cpu_s:,.0f} s)" for cell, cpu_s in runs.items() if cpu_s > LIMIT_S]
    if not runs:
        return f"Training shall take at most {LIMIT_S:.0f} CPU seconds; none was done yet."
    kept = f"More than the {LIMIT_S:.0f} that it may take: {', '.join(over)}." if over else f"All are within the {LIMIT_S:.0f} that it may take."
    return f"Of {len(runs)} trainings the longest took {max(runs.values()):,.0f} CPU seconds. {kept}"


def step_tables(table: Table) -> str:
    """What a step takes by length, and how that grows."""
    found = {(m, n): table.found(f"{m} step {n}") for m in METHODS for n in LENGTHS}
    fitted, lengths = exponents(table), [f"{n:,} tokens" for n in LENGTHS]

    def grid(show: Callable[[dict[str, Any]], str], *further: tuple[str, Callable[[str], str]]) -> str:
        rows = [[m, *(show(f) if (f := found[m, n]) else cells.NOT_RUN for n in LENGTHS), *(get(m) for _, get in further)] for m in METHODS]
        return cells.markdown(["attention", *lengths, *(title for title, _ in further)], rows)

    def power(i: int) -> tuple[str, Callable[[str], str]]:
        return "exponent of n", lambda m: f"{fitted[m][i]:.2f}" if m in fitted else cells.NOT_RUN

    controls = [f["full_again_cpu_s"] / f["full_step_cpu_s"] for f in found.values() if f]
    spread = f"{min(controls):.2f} to {max(controls):.2f}" if controls else cells.NOT_RUN
    return f"""Forward and backward, batch 1, fp32, one thread, an encoder of as many positions. How many times less CPU time than full attention, in turn in one
process, medians of {ROUNDS} (full attention against itself: {spread}), and the first of these lengths from which on it is less:

{grid(lambda f: f"{f['score']:.2f}x", ("pays from", lambda m: "-" if m == CONTROL else pays_from(m, table)))}

CPU seconds, with the exponent b of n^b by least squares of the logarithms. All else in a layer grows with n, so that it is 1 for what is linear and below 2 for
full attention:

{grid(lambda f: f"{f['step_cpu_s']:.2f}", power(0))}

Peak memory that a step adds to a process with the model, MB:

{grid(lambda f: f"{f['peak_mb']:,.0f}", power(1))}"""


def of_full_size(table: Table) -> str:
    """What the full configurations are, and what was run of them."""
    rows = []
    for name in arena.LARGE:
        large, shape = arena.full(name), arena.full(name).encoder
        made = [f for m in METHODS for s in SEEDS if (f := table.found(_full_name(m, name, s)))]
        size = "/".join(str(shape[k]) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"))
        rows.append([f"`benchmarks/lra/{name}.json`", f"{shape['max_position_embeddings']:,}", size, f"`{large.recipe}`", f"{large.steps:,}",
                     ", ".join(f"{f['cell'].removeprefix('full size, ')}: {100 * f['score']:.1f}" for f in made) or cells.NOT_RUN])  # fmt: skip
    differ = "\n".join(f"- {name}: {arena.full(name).differs}" for name in arena.LARGE)
    return f"""{cells.markdown(["file", "tokens", "width/heads/layers/feed-forward", "recipe", "steps", "accuracy here, %"], rows)}

Where they are not the paper's own:

{differ}"""


def page(table: Table) -> str:
    """docs/long_range.md, from the files."""
    tasks = "\n\n".join(of_task(table, name) for name in ARENA)
    told = "Accuracy against CPU seconds of a step; bars from the lowest to the highest seed; a frontier where a method left chance"
    picture = f"\n![{told}]({PICTURE.name})\n" if figure(table) else ""
    paper = [list(row.values()) for row in arena.published()]
    return f"""# The Long Range Arena on two cores

One encoder of {SMALL["num_hidden_layers"]} layers, width {SMALL["hidden_size"]} and {SMALL["num_attention_heads"]} heads, trained from nothing in fp32, its head on
the mean over tokens; all methods with the same rate ({LR}), batches of {BATCH}, examples and epochs. They were chosen by some twenty runs on passages and pictures
with `perceiver`, `linformer` and `longformer` and one seed: with the first token's head, a rate of 0.001 and batches of 16 none left chance in so few steps.
Accuracy is on {TEST} test examples at most, the mean over {len(SEEDS)} seeds with its 95 % interval (Student's t). Trainings ran
side by side, so that their time is CPU time. A step is of {BATCH} examples; peak memory is that of the process with its libraries; what a step at a length takes
is further below. The published accuracies are of larger models after 5,000 to 62,400 steps on other data: not comparable in level with what a few minutes on
two cores reach.
{run_times(table)}
{picture}
{tasks}

## Cost of a training step

{step_tables(table)}

## As published

Tay et al. 2020, accuracy in percent; FAIL is chance.

{cells.markdown([c.replace("_", " ") for c in arena.published()[0]], paper)}

## In full size

`python -m benchmarks.long_range --full` trains these, each method with its own defaults; on two cores that takes days.

{of_full_size(table)}

Made by `python -m benchmarks.long_range` from the files in `benchmarks/results/long_range/`; `--table` makes it again from them.
"""


def paying(table: Table) -> str:
    """From which length on each method pays, from the step cells and those of `benchmarks.windows`."""
    small = f"{SMALL['num_hidden_layers']} layers of width {SMALL['hidden_size']}, CPU time"
    rows = [[f"`{METHODS[m]}`", small, pays_from(m, table)] for m in METHODS if m != CONTROL]
    timed = json.loads(windows.FILE.read_text()) if windows.FILE.is_file() else []
    large, alone = f"4 layers of width {windows.HEADS * windows.SIZE}", f"attention alone, {windows.HEADS} heads of {windows.SIZE} features"
    for threads, clock in ((1, "one thread, CPU time"), (2, "two threads, by the clock")):
        for what, subject, way in (("step", large, windows.LONGFORMER), ("attention", alone, windows.CHUNKS)):
            at = windows.pays_from(timed, what, threads=threads, way=way)
            rows.append([f"`longformer(window={windows.WINDOW}, global_tokens=0)`", f"{subject}, {clock}", at])
    return cells.markdown(["attention", "of what", "pays from (tokens)"], rows)


def in_guide(guide: str, table: Table) -> str:
    """The text of the guide's page with the table of today's files in it."""
    begin, end = "--table` -->\n", "<!-- end -->"
    before, rest = guide.split(begin)
    return f"{before}{begin}\n{paying(table)}\n\n{end}{rest.split(end)[1]}"


def table(every: Callable[[], Iterable[Cell]] = every_cell) -> Table:
    """The table, which is filled with these cells; the page shows all."""
    return Table("long_range", every, page)


if __name__ == "__main__":
    full = "--full" in sys.argv
    if full:
        sys.argv.remove("--full")
    table(every_full_cell if full else every_cell).main()
    GUIDE.write_text(in_guide(GUIDE.read_text(), table()))
