"""Tables of recipes by tasks: few examples, little data, ranks and places of LoRA, prompts, causal models.

    python -m benchmarks.grids few-shot [--hours 1]       (or defaults, low-data, batches, dropout, lora-ranks, prompts, causal)

Needs the folder of data sets (`benchmarks/data.py`). Rates are the cards' own; nothing is chosen on the test rows.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import cells, data
from benchmarks.cells import Cell, Table
from paretune import inference, tasks, training
from paretune.store import Run
from paretune.tasks import Task


@dataclasses.dataclass(frozen=True)
class Grid:
    """Recipes (rows) by tasks (columns), several seeds a cell."""

    title: str
    about: str
    recipes: tuple[str, ...]
    columns: dict[str, Callable[[int], Task]]  # what a column is called -> its task for a seed
    epochs: Callable[[Task], float] = lambda task: 3.0
    batch: int | None = None
    backbone: str = "minilm"
    seeds: tuple[int, ...] = (0, 1, 2)
    times: float = 100.0  # scores are shown as percentages
    also: Callable[[Run, Task], dict[str, float]] = lambda run, task: {}  # further figures of a run
    fields: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # the figures shown of a column, where not the score alone
    claims: tuple[tuple[str, str, str], ...] = ()  # what the weaker recipes have in their text, the stronger in its place, who found that
    claimed: str = "score"  # the figure that the claims are about
    intervals: bool = False  # are scores shown with 95 % intervals over seeds (Student's t), not with the lowest and the highest?

    def cells(self) -> Iterator[Cell]:
        """Every recipe on every task; seeds outermost."""
        for seed in self.seeds:
            for recipe in self.recipes:
                for column in self.columns:
                    yield Cell(f"{recipe} {column} {seed}", functools.partial(self.run, recipe, column, seed))

    def run(self, recipe: str, column: str, seed: int) -> dict[str, Any]:
        """One run."""
        task = self.columns[column](seed)
        with tempfile.TemporaryDirectory() as out:
            made = data.finished(recipe, task, out=out, seed=seed, backbone=self.backbone, epochs=self.epochs(task), batch=self.batch)
            return data.figures(made, task) | self.also(made, task)

    def page(self, table: Table) -> str:
        """The page, from the files."""
        rows = []
        for recipe in self.recipes:
            found = {c: [table.found(f"{recipe} {c} {s}") for s in self.seeds] for c in self.columns}
            every = [f for fs in found.values() for f in fs]
            scores = [cells.mean_interval(found[c]) if self.intervals else cells.mean_range(found[c], field=field, times=self.times) for c, field in self._shown()]
            rows.append([f"`{recipe}`", *scores, cells.mean(every, "trainable_parameters"), cells.mean(every, "train_cpu_s")])
        shown = cells.markdown(["recipe", *(c if field == "score" else f"{c}, {field}" for c, field in self._shown()), "trainable", "train CPU s"], rows)
        made = f"Made by `python -m benchmarks.grids {table.name}` from the files in `benchmarks/results/{table.name}/`; `--table` makes it again from them."
        spread = "the half width of its 95 % interval (Student's t)" if self.intervals else "the lowest and the highest"
        about = f"{self.about} Mean over {len(self.seeds)} seeds, with {spread}."
        return "\n\n".join([f"# {self.title}", about, shown, *self._order(table), made]) + "\n"

    def _order(self, table: Table) -> list[str]:
        """What the literature found, beside what was found here, where it says something of these recipes."""
        if not self.claims:
            return []
        return [f"The order that the literature found, and the order here, by {self.claimed}, in points between runs of the same task and seed "
                "(95 % intervals, Student's t):",
                cells.order(self.claims, functools.partial(self._gaps, table))]  # fmt: skip

    def _gaps(self, table: Table, weaker: str, stronger: str) -> list[float]:
        names = [(r, r.replace(weaker, stronger)) for r in self.recipes if weaker in r]
        pairs = [[table.found(f"{recipe} {c} {s}") for recipe in pair] for pair in names for c in self.columns for s in self.seeds]
        return [self.times * (b[self.claimed] - a[self.claimed]) for a, b in pairs if a and b and self.claimed in a]

    def _shown(self) -> list[tuple[str, str]]:
        return [(c, field) for c in self.columns for field in self.fields.get(c, ("score",))]


def few_of_each(name: str, shots: int, seed: int) -> Task:
    """A data set with so many training rows of each class."""
    whole = data.task(name, validation=100, test=500)
    rows = list(whole.train)
    random.Random(seed).shuffle(rows)
    label, kept = whole.columns["label"], []
    for row in rows:
        if sum(k[label] == row[label] for k in kept) < shots:
            kept.append(row)
    return dataclasses.replace(whole, train=type(whole.train)(kept))


def _few(name: str, *shots: int) -> dict[str, Callable[[int], Task]]:
    return {f"{name}, {k} of each": functools.partial(few_of_each, name, k) for k in shots}


def _little(name: str, *sizes: int) -> dict[str, Callable[[int], Task]]:
    return {f"{name}, {n} texts": lambda seed, n=n: data.task(name, train=n, validation=100, test=500, seed=seed) for n in sizes}


def _visits(total: int) -> Callable[[Task], float]:
    """As many epochs as make about so many examples, from 3 to 30."""
    return lambda task: float(min(30, max(3, round(total / len(task.train)))))


_SPOKEN = {"BLEU": ("bleu", 100.0), "NIST": ("nist", 1.0), "ROUGE-L": ("rouge_l", 100.0), "chrF": ("chrf", 100.0)}  # heading -> metric, times
_CAUSAL = ("full", "lora(r=8)", "adapter", "prefix", "bitfit")
_DROPPING = ("lora(r=8)", "adapter", "ia3")

GRIDS = {
    "few-shot": Grid(
        title="Few examples of each class",
        about="Accuracy in percent on 500 test texts; about 1,200 examples visited in training (from 3 to 30 epochs), in batches of 16.",
        recipes=("prototypes", "imprint", "lora(r=8)", "ia3", "head", "full"),
        columns=_few("trec6", 5, 10, 50) | _few("banking77", 5, 10, 50), epochs=_visits(1200), batch=16,
    ),
    "low-data": Grid(
        title="Little data",
        about="Accuracy in percent on 500 test texts of SST-2; about 1,500 examples visited in training, in batches of 16.",
        recipes=("full", "prefix", "prompt", "lora(r=8)"), columns=_little("sst2", 50, 100, 200, 500), epochs=_visits(1500), batch=16,
        claims=(("full", "prefix", "Li & Liang 2021, figure 3"), ("prompt", "prefix", "Liu et al. 2022, P-tuning v2")),
    ),
    "lora-ranks": Grid(
        title="Ranks and places of LoRA",
        about="Accuracy in percent on 500 test texts of SST-2; 400 training texts, 5 epochs in batches of 16 (Hu et al. 2021, tables 5 and 6, ask the same of GPT-3).",
        recipes=tuple(f'lora(r={r}, targets="{places}")' for places in ("query", "query value", "attention") for r in (1, 2, 4, 8, 64)),
        columns=_little("sst2", 400), epochs=lambda task: 5.0, batch=16,
        claims=(
            ('"query"', '"query value"', "Hu et al. 2021, table 5"), ('"query value"', '"attention"', "equal in Hu et al. 2021, table 5"),
            ("r=1", "r=8", "equal in Hu et al. 2021, table 6"), ("r=8", "r=64", "equal in Hu et al. 2021, table 6"),
        ),
    ),
    "defaults": Grid(
        title="The cards' rates after one epoch",
        about="Accuracy in percent on 900 test texts of SST-2 after one epoch of 3,000 sentences with each card's own rate. A rate that is too low shows here.",
        recipes=("full", "lora(r=8)", 'lora(r=8, targets="query value")', "adapter", "bitfit", "ia3", "top_layers(k=2)", "head"),
        columns={"sst2": lambda seed: data.task("sst2", train=3000, validation=200, test=900, seed=seed)}, epochs=lambda task: 1.0,
    ),
    "batches": Grid(
        title="Batches for little data",
        about="Accuracy in percent on 500 test texts of SST-2 after three epochs, the cards' own rates: as many examples are visited whatever the batch.",
        recipes=tuple(f"{method} + schedule(batch={size})" for method in ("lora(r=8)", "full") for size in (32, 16, 8)), columns=_little("sst2", 100, 300),
    ),
    "dropout": Grid(
        title="Dropout around adapters",
        about="Accuracy in percent on 500 test texts after three epochs, the cards' own rates. `dropout=False` takes the dropout of the checkpoint (BERT's 0.1) out of "
        "all that a step computes, the frozen layers and the head; with `dropout=True`, the default, it stays. CPU seconds are of one thread, at most one run on a core.",
        recipes=tuple(f"{method} + schedule(dropout={kept})" for method in _DROPPING for kept in (True, False)),
        columns=_little("sst2", 400, 2000) | _little("trec6", 2000), seeds=(0, 1, 2, 3, 4), intervals=True,
        claims=tuple((text.format(False), text.format(True), "Srivastava et al. 2014, of networks that learn as a whole")
                     for text in (*(f"{method} + schedule(dropout={{}})" for method in _DROPPING), "dropout={}")),
    ),
    "prompts": Grid(
        title="Length and start of a prompt",
        about="Accuracy in percent on 500 test texts of SST-2; 400 training texts, 8 epochs in batches of 16 (Lester et al. 2021, figure 3).",
        recipes=tuple(f'prompt(init="{start}", length={n})' for start in ("random", "vocabulary", "classes") for n in (1, 5, 20, 50)),
        columns=_little("sst2", 400), epochs=lambda task: 8.0, batch=16,
        claims=(
            ("random", "vocabulary", "Lester et al. 2021, figure 3b"), ("vocabulary", "classes", "Lester et al. 2021, figure 3b"),
            ("length=1", "length=20", "Lester et al. 2021, figure 3a"), ("length=20", "length=50", "equal in Lester et al. 2021, figure 3a"),
        ),
    ),
    "causal": Grid(
        title="A causal model adapted to one author and to data-to-text",
        about="books-gpt2 (10 M parameters). Perplexity on Conan Doyle's test books after one epoch on 300,000 characters of him; E2E after three on 1,000 "
        "texts: perplexity of the references (their first), and the scores of greedy answers to 100 test inputs with all references (NIST in bits, the others "
        "in percent; METEOR and CIDEr are left out, for which no kept library works without downloads). "
        "The epoch is chosen by perplexity on validation. The model has seen books only, and a fortieth of E2E's training texts is little: "
        "the order of the methods can be compared with the literature's (Hu et al. 2021, table 3), the level cannot.",
        recipes=_CAUSAL, columns={"books_doyle": lambda seed: _doyle(seed), "e2e_nlg": lambda seed: _e2e(seed)},
        epochs=lambda task: 3.0 if task.kind.name == "generation" else 1.0,
        backbone=str(data.FOLDER / "checkpoints" / "books-gpt2"), times=1.0,
        also=lambda run, task: _spoken(run, task), fields={"e2e_nlg": ("score", *_SPOKEN)},
        claims=tuple((weaker, stronger, f"Hu et al. 2021, table 3: {bleu}") for weaker, stronger, bleu in (
            ("adapter", "full", "66.3, 68.2"), ("full", "prefix", "68.2, 69.7"), ("full", "lora(r=8)", "68.2, 70.4"), ("prefix", "lora(r=8)", "69.7, 70.4"),
        )), claimed="BLEU",
    ),
}  # fmt: skip


def _doyle(seed: int) -> Task:
    """One part of the books for training and testing, cut so that a run takes a minute."""
    whole = data.task("books_doyle")
    cut = {"train": 300_000, "validation": 20_000, "test": 60_000}
    parts = {split: _beginning(whole.rows(split), whole.columns["text"], characters) for split, characters in cut.items()}
    return dataclasses.replace(whole, **parts)


def _e2e(seed: int) -> Task:
    """Data to text, trained and chosen by perplexity."""
    cut = data.task("e2e_nlg", train=1000, validation=100, test=100, seed=seed)
    return dataclasses.replace(cut, metric="perplexity", kind=cut.kind.scored_by("perplexity"))


def _spoken(run: Run, task: Task) -> dict[str, float]:
    """The scores of what the model answers to the test inputs, where it is to answer."""
    if task.kind.name != "generation":
        return {}
    asked = dataclasses.replace(task, metric="bleu", kind=task.kind.scored_by("bleu"))
    texts = training.predict(inference.open_model(run.model, asked), asked, rows=asked.test)
    return {
        heading: times * tasks.score(dataclasses.replace(asked, metric=metric), texts, rows=asked.test) for heading, (metric, times) in _SPOKEN.items()
    }


def _beginning(rows: Any, column: str, characters: int) -> Any:
    kept, left = [], characters
    for row in rows:
        if left > 0:
            kept.append({**row, column: row[column][:left]})
            left -= len(row[column])
    return type(rows)(kept)


TABLES = {name: Table(name, grid.cells, grid.page) for name, grid in GRIDS.items()}


def main() -> None:
    """The first argument names the table."""
    if len(sys.argv) < 2 or sys.argv[1] not in TABLES:
        raise SystemExit(f"which table? One of {', '.join(TABLES)}")
    TABLES[sys.argv.pop(1)].main()


if __name__ == "__main__":
    main()
