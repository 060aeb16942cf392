"""Learning to learn: intents of BANKING77 that were never trained on, told apart after five examples of each.

    python -m benchmarks.episodes [--hours 1]

57 intents are for the start, 20 are held out, in four groups of five. A start is MiniLM as it is, or trained on the 57: plainly, by
MAML or by Reptile. From each start every group is learned from 25 texts, by a few steps of `full` or by `prototypes`. The starts made
of episodes keep their head: they answer a group by the first five outputs, as in every episode; the others have a new one.
Needs the folder of data sets (`benchmarks/data.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import cells, data
from benchmarks.cells import Cell, Table
from paretune.tasks import Rows, Task

EPISODES = ("maml(ways=5, shots=5, inner_steps=3)", "maml(order=2, ways=5, shots=5, inner_steps=3)", "reptile(ways=5, shots=5)")
STARTS = ("", "full", *(f"full + {method} + schedule(lr=5e-5, epochs=2.0)" for method in EPISODES))
ADAPTED = ("full + schedule(batch=25, epochs=3.0)", "full + schedule(batch=25, epochs=10.0)", "prototypes")  # 3 and 10 steps on all 25 texts
SEEDS = (0, 1, 2)
HELD_OUT, WAYS, SHOTS, ASKED = 20, 5, 5, 20  # intents, intents of a group, training texts and test texts of each
TRAIN, VALIDATION, EPOCHS = 1000, 150, 2


def every_cell() -> Iterator[Cell]:
    """Every start; seeds outermost."""
    for seed in SEEDS:
        for start in STARTS:
            yield Cell(_cell(start, seed), functools.partial(one, start, seed))


def _cell(start: str, seed: int) -> str:
    return f"{start or 'untrained'} {seed}"


def one(start: str, seed: int) -> dict[str, Any]:
    """One start, and from it every group by every way of adapting: the mean accuracy over the groups."""
    whole = data.task("banking77", seed=seed)
    known, held_out = parted(whole.labels, seed=seed)
    with tempfile.TemporaryDirectory() as out:
        backbone, costs = "minilm", {"train_cpu_s": 0.0}
        if start:
            given = of_intents(whole, known)
            made = data.finished(start, given, out=out, seed=seed, epochs=EPOCHS)
            backbone, costs = str(made.model), data.figures(made, given)
        found = {}
        for recipe in ADAPTED:
            keeps_head = start not in ("", "full") and recipe != "prototypes"  # which reads no head
            groups = [group(whole, held_out[at : at + WAYS], labels=known if keeps_head else known[:WAYS], seed=seed) for at in range(0, HELD_OUT, WAYS)]
            found[recipe] = [data.one_run(recipe, g, seed=seed, backbone=backbone)["score"] for g in groups]
    means = {recipe: statistics.mean(scores) for recipe, scores in found.items()}
    return {**costs, "start": start, "seed": seed, **means, "groups": found, "score": means[ADAPTED[1]]}


def parted(labels: Sequence[str], *, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The intents to start with, and those held out."""
    mixed = random.Random(seed).sample(list(labels), len(labels))
    return tuple(mixed[HELD_OUT:]), tuple(mixed[:HELD_OUT])


def of_intents(whole: Task, intents: tuple[str, ...]) -> Task:
    """Some of the intents, with as many texts as the start is trained on."""
    label = whole.columns["label"]
    train, validation, test = (Rows(row for row in whole.rows(s) if row[label] in intents) for s in ("train", "validation", "test"))
    cut = dataclasses.replace(whole, labels=intents, train=train, validation=data.few(validation, VALIDATION), test=data.few(test, VALIDATION))
    return cut.subset(TRAIN)


def group(whole: Task, intents: Sequence[str], *, labels: tuple[str, ...], seed: int) -> Task:
    """Held-out intents under the names of the first labels: a few texts to learn from, none to choose by, and some to be asked."""
    label, mixed = whole.columns["label"], random.Random(seed)

    def some(rows: Rows, n: int) -> Rows:
        of_each = [[row for row in rows if row[label] == intent] for intent in intents]
        return Rows(row | {label: labels[i]} for i, own in enumerate(of_each) for row in mixed.sample(own, n))

    return dataclasses.replace(whole, labels=labels, train=some(whole.train, SHOTS), validation=Rows(), test=some(whole.test, ASKED))


def page(table: Table) -> str:
    """docs/episodes.md, from the files."""
    rows = []
    for start in STARTS:
        found = [table.found(_cell(start, seed)) for seed in SEEDS]
        name = f"`{start}`" if start else "MiniLM as it is"
        rows.append([name, *(cells.mean_range(found, field=recipe) for recipe in ADAPTED), cells.mean(found, "train_cpu_s")])
    return f"""# New intents from five examples of each

Accuracy in percent on held-out intents of BANKING77, {WAYS} at a time ({100 // WAYS} % is chance), after {SHOTS} examples of each: the mean over
four groups of intents and {len(SEEDS)} seeds, with the lowest and the highest seed; {ASKED} test texts of each intent. A start is trained on {TRAIN:,} texts of
the other 57 intents, {EPOCHS} epochs.
A start made of episodes keeps the head that it learned, and answers a group by the first {WAYS} outputs; the others begin with a new head.
MiniLM was trained as a sentence encoder on a billion pairs: as it is, it tells new intents apart already, and a start has to be better than that to be worth its time.

{cells.markdown(["start", *(f"then `{recipe}`" for recipe in ADAPTED), "CPU s of the start"], rows)}

Made by `python -m benchmarks.episodes` from the files in `benchmarks/results/episodes/`; `--table` makes it again from them.
"""


TABLE = Table("episodes", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
