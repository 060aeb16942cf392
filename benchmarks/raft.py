"""RAFT: real few-shot tasks with 50 labeled rows each. Their test labels are hidden, so the 50 rows are tested on themselves.

    python -m benchmarks.raft [--hours 1] [--only overruling]

5 x 5-fold: five times, the rows of every class are shuffled and dealt into five folds, each of which is tested once by a model trained
on the other 40. The score is RAFT's, macro F1, over the 50 answers of a round. Alex et al. 2021, arXiv:2109.14076. There are no
rows to choose an epoch or a rate by: rates are the cards' own, and the last epoch counts. Tasks where a class has fewer than
6 rows are left out. Needs the folder of data sets (`benchmarks/data.py`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import paretune as pt
from benchmarks import cells, data
from benchmarks.cells import Cell, Table
from paretune.tasks import Task, metrics

RECIPES = ("prototypes", "imprint", "lora(r=8)", "ia3", "head", "full")
TASKS = {  # the columns that are read
    "ade_corpus_v2": "Sentence", "neurips_impact_statement_risks": "Paper title,Impact statement", "one_stop_english": "Article", "overruling": "Sentence",
    "semiconductor_org_types": "Organization name,Paper title", "tai_safety_research": "Title", "terms_of_service": "Sentence",
    "twitter_complaints": "Tweet text",
}  # fmt: skip
FOLDS = ROUNDS = 5
EPOCHS, BATCH = 12, 8
LONGEST = 256  # characters of a text that are read


def every_cell() -> Iterator[Cell]:
    """Every recipe on every task."""
    for name in TASKS:
        for recipe in RECIPES:
            yield Cell(f"{recipe} {name}", functools.partial(one, recipe, name))


def one(recipe: str, name: str) -> dict[str, Any]:
    """One recipe on one task: macro F1 of every round, and what a fold costs in the mean."""
    whole = rows_of(name)
    truth = whole.train.column("Label")
    scores, kept = [], []
    for turn in range(ROUNDS):
        answers: dict[int, str] = {}
        for tested in dealt(truth, FOLDS, seed=turn):
            found, figures = _fold(recipe, whole, tested, seed=turn)
            answers |= dict(zip(tested, found, strict=True))
            kept.append(figures)
        scores.append(_f1(truth, [answers[place] for place in range(len(truth))]))
    costs = {k: statistics.mean(f[k] for f in kept) for k in ("train_s", "train_cpu_s", "trainable_parameters", "head_parameters")}
    same = {k: kept[0][k] for k in ("recipe", "resolved", "train", "weights_sha256", "environment")}
    chance = _f1(truth, [statistics.mode(truth)] * len(truth))
    return {**same, **costs, "metric": "f1_macro", "task": name, "task_fingerprint": whole.fingerprint, "rows": len(truth), "majority": chance,
            "score": statistics.mean(scores), "scores": scores}  # fmt: skip


def _f1(truth: list[str], answers: list[str]) -> float:
    return metrics.evaluate("f1_macro", truth, predicted=answers)


def _fold(recipe: str, whole: Task, tested: Sequence[int], *, seed: int) -> tuple[list[str], dict[str, Any]]:
    train = type(whole.train)(row for i, row in enumerate(whole.train) if i not in tested)
    given = dataclasses.replace(whole, train=train, test=type(whole.train)(whole.train[i] for i in tested))
    with tempfile.TemporaryDirectory() as out:
        made = data.finished(recipe, given, out=out, seed=seed, epochs=EPOCHS, batch=BATCH)
        return [answer["label"] for answer in made.predict(list(given.test))], data.figures(made, given)


def rows_of(name: str) -> Task:
    """A RAFT task whose rows are all in the training split."""
    (file,) = (data.FOLDER / "raft").glob(f"{name}.jsonl*")
    whole = pt.task(file, text=TASKS[name], label="Label")
    texts = [column for role, column in whole.columns.items() if role != "label"]
    rows = [row | {c: row[c][:LONGEST] for c in texts} for split in ("train", "validation", "test") for row in whole.rows(split)]
    none = type(whole.train)()
    return dataclasses.replace(whole, train=type(whole.train)(rows), validation=none, test=none)


def dealt(labels: Sequence[str], folds: int, *, seed: int) -> list[list[int]]:
    """The places of the labels in so many folds: those of every class shuffled, then dealt like cards, so that each fold has its share."""
    members = collections.defaultdict(list)
    for place, label in enumerate(labels):
        members[label].append(place)
    shuffle = random.Random(seed).shuffle
    for places in members.values():
        shuffle(places)
    cards = [place for label in sorted(members) for place in members[label]]
    return [sorted(cards[fold::folds]) for fold in range(folds)]


def page(table: Table) -> str:
    """docs/raft.md, from the files."""
    rows = []
    for recipe in RECIPES:
        found = [table.found(f"{recipe} {name}") for name in TASKS]
        rows.append([f"`{recipe}`", *map(_rounds, found), _average(found, "score"), cells.mean(found, "train_cpu_s", digits=1)])
    some = [next(filter(None, (table.found(f"{recipe} {name}") for recipe in RECIPES)), None) for name in TASKS]
    majority = ["majority", *(cells.mean_range([f], field="majority").split(" (")[0] for f in some), _average(some, "majority"), "-"]
    return f"""# RAFT: eight real tasks with 50 labeled rows

Macro F1 in percent of MiniLM by {ROUNDS} x {FOLDS}-fold on the 50 public rows (RAFT's test labels are hidden): the mean over {ROUNDS} rounds,
with the lowest and the highest. The rounds share their rows: the range says how much chance lies in the cut and the start, not in the choice of the 50.
{EPOCHS} epochs on 40 rows in batches of {BATCH}, the cards' own rates, nothing chosen; the first {LONGEST} characters of a text.
"Majority" gives always the most frequent class.
`banking_77` and `systematic_review_inclusion` are left out, as some of their classes have fewer than 6 rows; of `tai_safety_research`, whose abstracts
are partly missing, only titles are read. CPU seconds are those of one fold.

{cells.markdown(["recipe", *(name.replace("_", " ") for name in TASKS), "mean", "train CPU s"], [majority, *rows])}

Made by `python -m benchmarks.raft` from the files in `benchmarks/results/raft/`; `--table` makes it again from them.
"""


def _rounds(found: dict[str, Any] | None) -> str:
    return cells.mean_range([{"score": score} for score in found["scores"]]) if found else cells.NOT_RUN


def _average(found: Sequence[dict[str, Any] | None], field: str) -> str:
    return f"{100 * statistics.mean(f[field] for f in found if f):.1f}" if all(found) else cells.NOT_RUN


TABLE = Table("raft", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
