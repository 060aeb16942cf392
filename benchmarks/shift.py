"""Which layers should change? A model of SST-2, adapted with few texts to a shift of the data or of the labels.

    python -m benchmarks.shift [--hours 1]

The domain shifts from film reviews to phrases of the news (MPQA); the labels shift where SST-2's own are swapped. Lee et al. 2022,
arXiv:2210.11466, find that a shift of the labels asks for the last layers and one of the inputs for the first. The model of SST-2 is
trained once for the cells of one seed that are filled together. Needs the folder of data sets (`benchmarks/data.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import cells, data
from benchmarks.cells import Cell, Table
from paretune.methods.adapters.surgical import FACT
from paretune.tasks import Task

SEEDS = (0, 1, 2)
SOURCE, TRAIN, VALIDATION, TEST, EPOCHS, BATCH = 1500, 50, 100, 500, 20, 16
BLOCKS = ("embeddings", "0", "1", "2", "3", "4", "5")
ALONE = {block: f'surgical(blocks="{block}")' for block in BLOCKS}
RECIPES = ("head", "full", "surgical", *ALONE.values())


def few(name: str, seed: int) -> Task:
    """A few texts of a data set of two classes, 0 and 1."""
    return data.task(name, train=TRAIN, validation=VALIDATION, test=TEST, seed=seed)


def swapped(task: Task) -> Task:
    """The same texts, each with the other one of two labels."""
    other, label = dict(zip(task.labels, reversed(task.labels), strict=True)), task.columns["label"]
    turned = {split: type(task.train)(row | {label: other[row[label]]} for row in task.rows(split)) for split in ("train", "validation", "test")}
    return dataclasses.replace(task, **turned)


SHIFTS: dict[str, Callable[[int], Task]] = {
    "sst2 to mpqa": functools.partial(few, "mpqa"),
    "sst2 with labels swapped": lambda seed: swapped(few("sst2", seed)),
}


CLAIMS = (  # the weaker, the stronger, who found that
    *((f"full, {shift}", f"surgical, {shift}", "Lee et al. 2022") for shift in SHIFTS),
    (f"{ALONE['0']}, sst2 with labels swapped", f"{ALONE['5']}, sst2 with labels swapped", "Lee et al. 2022"),
    (f"{ALONE['5']}, sst2 to mpqa", f"{ALONE['0']}, sst2 to mpqa", "Lee et al. 2022"),
)


def every_cell() -> Iterator[Cell]:
    """Every recipe at every shift; seeds outermost."""
    for seed in SEEDS:
        for shift in SHIFTS:
            for recipe in RECIPES:
                yield Cell(f"{recipe} {shift} {seed}", functools.partial(one, recipe, shift, seed))


@functools.lru_cache(maxsize=1)
def _source(seed: int) -> tuple[tempfile.TemporaryDirectory[str], str]:
    """MiniLM fine-tuned on SST-2: the folder that keeps it until the next seed's turn, and the model's within."""
    out = tempfile.TemporaryDirectory()
    given = data.task("sst2", train=SOURCE, validation=200, test=TEST, seed=seed)
    return out, str(data.finished("full", given, out=out.name, seed=seed).model)


def one(recipe: str, shift: str, seed: int) -> dict[str, Any]:
    """One recipe, begun where SST-2 was learned."""
    return data.one_run(recipe, SHIFTS[shift](seed), seed=seed, backbone=_source(seed)[1], epochs=EPOCHS, batch=BATCH)


def page(table: Table) -> str:
    """docs/shift.md and its figure, from the files."""
    rows = []
    _figure(table)
    for recipe in RECIPES:
        found = {shift: [table.found(f"{recipe} {shift} {seed}") for seed in SEEDS] for shift in SHIFTS}
        every = [f for fs in found.values() for f in fs]
        chosen = [", ".join(_chosen(f) for f in fs if f) or cells.NOT_RUN for fs in found.values()] if recipe == "surgical" else ["-"] * len(SHIFTS)
        rows.append([f"`{recipe}`", *map(cells.mean_range, found.values()), *chosen, cells.mean(every, "trainable_parameters"),
                     cells.mean(every, "train_cpu_s")])  # fmt: skip
    return f"""# A shift, and the layers that follow it

Accuracy in percent on {TEST} test texts, the mean over {len(SEEDS)} seeds with the lowest and the highest. MiniLM is fine-tuned on
{SOURCE:,} texts of SST-2 and then adapted to the shifted data with {TRAIN} texts, {EPOCHS} epochs at most in batches of {BATCH}, the cards' own rates;
the epoch is chosen on {VALIDATION} validation texts.
`surgical` chooses its block by the relative gradient norm over the {TRAIN} texts; what it chose stands beside, seed by seed.

![Accuracy of each block tuned alone, above the relative gradient norms that the blocks are ranked by](shift.png)

{cells.markdown(["recipe", *SHIFTS, *(f"block, {shift}" for shift in SHIFTS), "trainable", "train CPU s"], rows)}

What Lee et al. found, and what is so here, in points between runs of the same seed:

{cells.order(CLAIMS, functools.partial(_gaps, table))}

Made by `python -m benchmarks.shift` from the files in `benchmarks/results/shift/`; `--table` makes it again from them.
"""


def _gaps(table: Table, weaker: str, stronger: str) -> list[float]:
    """By how many points the second is ahead, seed by seed; each is "recipe, shift"."""
    (first, shift), (second, _) = (text.split(", ") for text in (weaker, stronger))
    pairs = [(table.found(f"{first} {shift} {seed}"), table.found(f"{second} {shift} {seed}")) for seed in SEEDS]
    return [100 * (b["score"] - a["score"]) for a, b in pairs if a and b]


def _chosen(found: dict[str, Any]) -> str:
    """The block with the largest relative gradient norm."""
    norms = _norms(found)
    return max(norms, key=norms.__getitem__)


def _norms(found: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix(FACT): value for name, value in found["phases"][-1]["facts"].items() if name.startswith(FACT)}


def _figure(table: Table) -> None:
    """docs/shift.png: a column per shift, above what tuning each block alone gives, below what the blocks are ranked by."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, panels = plt.subplots(2, len(SHIFTS), figsize=(9, 5.2), sharex=True, layout="constrained")
    for (above, below), shift in zip(panels.T, SHIFTS, strict=True):
        for recipe, line in (("full", "--"), ("head", ":")):
            if scores := _scores(table, recipe, shift):
                above.axhline(statistics.mean(scores), color="0.4", linestyle=line, label=f"{recipe}, mean")
        for block in BLOCKS:
            if scores := _scores(table, ALONE[block], shift):
                above.plot([block] * len(scores), scores, "o", color="#0072B2")
        norms = [_norms(f) for seed in SEEDS if (f := table.found(f"surgical {shift} {seed}"))]
        for block in BLOCKS if norms else ():
            below.bar(block, statistics.mean(of[block] for of in norms), color="#B8BEC4")
        above.set_title(shift)
        below.set_xlabel("block: embeddings, then the layers")
        below.set_xticks(range(len(BLOCKS)), [block.removesuffix("eddings") for block in BLOCKS])
        above.legend(frameon=False)
    panels[0][0].set_ylabel("accuracy, percent, of\nthe block tuned alone")
    panels[1][0].set_ylabel("‖∇L‖ / ‖θ‖ of the block\nbefore training")
    drawn.savefig(cells.ROOT / "docs" / "shift.png", dpi=110)
    plt.close(drawn)


def _scores(table: Table, recipe: str, shift: str) -> list[float]:
    return [100 * f["score"] for seed in SEEDS if (f := table.found(f"{recipe} {shift} {seed}"))]


TABLE = Table("shift", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
