"""Examples in the prompt or in the weights: a small language model answers two tasks from 48 labeled texts.

    python -m benchmarks.in_context [--hours 1] [--only sst2]

books-gpt2 (10 M parameters) has read books only, so these rows come near chance: what the table shows is what each way costs at every
answer, and that all of them stand on one frontier. Needs the folder of data sets (`benchmarks/data.py`).
"""

from __future__ import annotations

import collections
import functools
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks import cells, data, grids
from benchmarks.cells import Cell, Table
from paretune import inference
from paretune.tasks import Task

GPT2 = str(data.FOLDER / "checkpoints" / "books-gpt2")
SEEDS, EPOCHS, BATCH = (0, 1, 2), 15, 16
OF_EACH = {"sst2": 24, "trec6": 8}  # training texts of each class: 48 of both tasks
SPOKEN = {  # a task -> how its labels are said
    "sst2": 'template="{text} It was {label}", words=["terrible", "great"]',
    "trec6": 'template="{text} This asks for {label}",'
    ' words=["a short form", "a reason", "a thing", "a person", "a place", "a number"]',
}  # fmt: skip
SAID = "SAID"  # where a recipe takes the task's words
ROWS = {
    "choices": f"choices({SAID})", "no example in the prompt": f"in_context(shots=0, {SAID})", "4 examples": f"in_context(shots=4, SEED, {SAID})",
    "4 examples, not calibrated": f"in_context(shots=4, SEED, calibrate=False, {SAID})", "8 examples": f"in_context(shots=8, SEED, {SAID})",
    "choices, LoRA": f"choices({SAID}) | lora(r=8)", "choices, T-Few": f"choices({SAID}) | t_few", "LoRA and a head": "lora(r=8)",
    "full and a head": "full", "prototypes": "prototypes",
}  # fmt: skip


def every_cell() -> Iterator[Cell]:
    """Every row on both tasks; seeds outermost."""
    for seed in SEEDS:
        for task in SPOKEN:
            for name in ROWS:
                yield Cell(_cell(name, task, seed), functools.partial(one, name, task, seed))


def _cell(name: str, task: str, seed: int) -> str:
    return f"{name} {task} {seed}"


def one(name: str, task: str, seed: int) -> dict[str, Any]:
    """One run, the operations that an answer of its model takes, and the share of the most frequent label."""
    given = grids.few_of_each(task, OF_EACH[task], seed)
    recipe = ROWS[name].replace(SAID, SPOKEN[task]).replace("SEED", f"seed={seed}")
    with tempfile.TemporaryDirectory() as out:
        made = data.finished(recipe, given, out=out, seed=seed, backbone=GPT2, epochs=EPOCHS, batch=BATCH)
        counted = inference.Bench(inference.open_model(made.model, given), given).flops()
    return data.figures(made, given) | {"flops": counted.value, "majority": _majority(given)}


def _majority(given: Task) -> float:
    return collections.Counter(given.test.column(given.columns["label"])).most_common(1)[0][1] / len(given.test)


def page(table: Table) -> str:
    """docs/in_context.md and its figure, from the files."""
    found = {name: {task: [table.found(_cell(name, task, seed)) for seed in SEEDS] for task in SPOKEN} for name in ROWS}
    some = {task: next(filter(None, (f for of in found.values() for f in of[task])), None) for task in SPOKEN}
    majority = ["most frequent label", *(f"{100 * f['majority']:.1f}" if f else cells.NOT_RUN for f in some.values()), *["-"] * 3]
    rows = [[name, *map(cells.mean_range, of.values()), *_costs([f for fs in of.values() for f in fs])] for name, of in found.items()]
    if all(some.values()):
        _figure(found, some)
    recipes = "\n".join(f"- {name}: `{recipe.replace(SAID, '...').replace('SEED, ', '')}`" for name, recipe in ROWS.items())
    said = "\n".join(f"- {task}: `{words}`" for task, words in SPOKEN.items())
    return f"""# Examples in the prompt, or in the weights

A GPT-2 of 10 M parameters that has read nothing but books answers two tasks from 48 labeled texts, as many of each class: accuracy in percent on 500 test texts, the mean
over {len(SEEDS)} seeds with the lowest and the highest (a seed draws the texts, the examples among them and their order). In-context learning needs large
models, and this is none: read the rows against the most frequent label's. What carries over is the price: examples in the prompt need no
training, and every answer reads them again. GFLOP are counted, an answer's mean of both tasks.

{cells.markdown(["way", *SPOKEN, "GFLOP an answer", "trainable", "train CPU s"], [majority, *rows])}

![Accuracy against the operations of an answer](in_context.png)

{recipes}

where `...` is

{said}

Made by `python -m benchmarks.in_context` from the files in `benchmarks/results/in_context/`; `--table` makes it again from them.
"""


def _costs(found: list[dict[str, Any] | None]) -> list[str]:
    flops = [f["flops"] / 1e9 for f in found if f]
    return [f"{statistics.mean(flops):.2f}" if flops else cells.NOT_RUN, cells.mean(found, "trainable_parameters"), cells.mean(found, "train_cpu_s", digits=1)]


def _figure(found: dict[str, dict[str, list[dict[str, Any] | None]]], some: dict[str, Any]) -> None:
    """docs/in_context.png: a panel per task, the lowest to the highest seed, and the most frequent label's share as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    drawn, panels = plt.subplots(1, len(SPOKEN), figsize=(11, 4.5), layout="constrained")
    colors = plt.get_cmap("tab10").colors
    for panel, task in zip(panels, SPOKEN, strict=True):
        for (name, of), color in zip(found.items(), colors, strict=True):
            runs = [f for f in of[task] if f]
            if runs:
                flops, scores = statistics.mean(f["flops"] / 1e9 for f in runs), [100 * f["score"] for f in runs]
                middle = statistics.mean(scores)
                panel.errorbar(flops, middle, [[middle - min(scores)], [max(scores) - middle]], fmt="s" if "example" in name else "o", color=color, label=name)
        panel.axhline(100 * some[task]["majority"], color="0.4", linestyle="--", label="most frequent label")
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
        panel.set_xlabel("GFLOP an answer")
        panel.set_title(task)
    panels[0].set_ylabel("accuracy, percent")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    drawn.savefig(cells.ROOT / "docs" / "in_context.png", dpi=110)
    plt.close(drawn)


TABLE = Table("in_context", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
