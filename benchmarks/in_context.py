"""Examples in the prompt or in the weights: two small language models answer two tasks from 48 labeled texts.

    python -m benchmarks.in_context [--hours 1] [--only sst2]

books-gpt2 (10 M parameters) has read books only and stories260K children's stories, so these rows come near chance: what the table shows is what
each way costs at every answer, and that all of them stand on one frontier. Needs the folder of data sets (`benchmarks/data.py`).
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
MODELS = {"books-gpt2": GPT2, "stories260K": str(data.FOLDER / "checkpoints" / "stories260K")}
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


TOO_LONG = ("stories260K", "8 examples")  # for its 512 positions


def every_cell() -> Iterator[Cell]:
    """Every row on both tasks by both models; seeds outermost."""
    for seed in SEEDS:
        for model in MODELS:
            for task in SPOKEN:
                for name in (name for name in ROWS if (model, name) != TOO_LONG):
                    yield Cell(_cell(model, name, task, seed), functools.partial(one, model, name, task, seed))


def _cell(model: str, name: str, task: str, seed: int) -> str:
    return f"{model} {name} {task} {seed}"


def one(model: str, name: str, task: str, seed: int) -> dict[str, Any]:
    """One run, the operations that an answer of its model takes, and the share of the most frequent label."""
    given = grids.few_of_each(task, OF_EACH[task], seed)
    recipe = ROWS[name].replace(SAID, SPOKEN[task]).replace("SEED", f"seed={seed}")
    with tempfile.TemporaryDirectory() as out:
        made = data.finished(recipe, given, out=out, seed=seed, backbone=MODELS[model], epochs=EPOCHS, batch=BATCH)
        counted = inference.Bench(inference.open_model(made.model, given), given).flops()
    return data.figures(made, given) | {"flops": counted.value, "majority": _majority(given)}


def _majority(given: Task) -> float:
    return collections.Counter(given.test.column(given.columns["label"])).most_common(1)[0][1] / len(given.test)


def page(table: Table) -> str:
    """docs/in_context.md and its figure, from the files."""
    found = {m: {name: {task: [table.found(_cell(m, name, task, s)) for s in SEEDS] for task in SPOKEN} for name in ROWS} for m in MODELS}
    chance = {task: next((f["majority"] for of in found.values() for way in of.values() for f in way[task] if f), None) for task in SPOKEN}
    del found[TOO_LONG[0]][TOO_LONG[1]]
    _figure(found, chance)
    tables = "\n\n".join(f"{model}:\n\n{_table(of, chance)}" for model, of in found.items())
    recipes = "\n".join(f"- {name}: `{recipe.replace(SAID, '...').replace('SEED, ', '')}`" for name, recipe in ROWS.items())
    said = "\n".join(f"- {task}: `{words}`" for task, words in SPOKEN.items())
    return f"""# Examples in the prompt, or in the weights

Two small language models, a GPT-2 of 10 M parameters that has read nothing but books and a Llama of 260,000 that has read children's stories, answer two tasks from
48 labeled texts, as many of each class: accuracy in percent on 500 test texts, the mean
over {len(SEEDS)} seeds with the lowest and the highest (a seed draws the texts, the examples among them and their order). In-context learning needs large
models, and these are none: read the rows against the most frequent label's. What carries over is the price: examples in the prompt need no
training, and every answer reads them again; eight of them are more than the 512 positions of the Llama hold. GFLOP are counted, an answer's mean of both tasks.

{tables}

![Accuracy against the operations of an answer](in_context.png)

{recipes}

where `...` is

{said}

Made by `python -m benchmarks.in_context` from the files in `benchmarks/results/in_context/`; `--table` makes it again from them.
"""


def _table(found: dict[str, dict[str, list[dict[str, Any] | None]]], chance: dict[str, float | None]) -> str:
    majority = ["most frequent label", *(cells.NOT_RUN if share is None else f"{100 * share:.1f}" for share in chance.values()), *["-"] * 3]
    rows = [[name, *map(cells.mean_range, of.values()), *_costs([f for fs in of.values() for f in fs])] for name, of in found.items()]
    return cells.markdown(["way", *SPOKEN, "GFLOP an answer", "trainable", "train CPU s"], [majority, *rows])


def _costs(found: list[dict[str, Any] | None]) -> list[str]:
    flops = [f["flops"] / 1e9 for f in found if f]
    shown = f"{statistics.mean(flops):.2g}" if flops else cells.NOT_RUN
    return [shown, cells.mean(found, "trainable_parameters"), cells.mean(found, "train_cpu_s", digits=1)]


def _figure(found: dict[str, Any], chance: dict[str, float | None]) -> None:
    """docs/in_context.png: a row of panels per model, one per task; the lowest to the highest seed, and the most frequent label's share as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    drawn, panels = plt.subplots(len(MODELS), len(SPOKEN), figsize=(11, 7.5), layout="constrained")
    colors = dict(zip(ROWS, plt.get_cmap("tab10").colors, strict=True))
    for row, (model, of) in zip(panels, found.items(), strict=True):
        for panel, (task, share) in zip(row, chance.items(), strict=True):
            for name, way in of.items():
                runs = [f for f in way[task] if f]
                if runs:
                    flops, scores = statistics.mean(f["flops"] / 1e9 for f in runs), [100 * f["score"] for f in runs]
                    middle = statistics.mean(scores)
                    bar = [[middle - min(scores)], [max(scores) - middle]]
                    panel.errorbar(flops, middle, bar, fmt="s" if "example" in name else "o", color=colors[name], label=name)
            if share is not None:
                panel.axhline(100 * share, color="0.4", linestyle="--", label="most frequent label")
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter("")
            panel.set_title(f"{model}: {task}")
        row[0].set_ylabel("accuracy, percent")
    for panel in panels[-1]:
        panel.set_xlabel("GFLOP an answer")
    drawn.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    drawn.savefig(cells.ROOT / "docs" / "in_context.png", dpi=110)
    plt.close(drawn)


TABLE = Table("in_context", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
