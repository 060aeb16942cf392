"""The searchers of `benchmarks/search.py` once each on this machine, with the same budget, on a task that no pool was made of.

    python -m benchmarks.search_live [--seconds 240]    keeps what it finds in benchmarks/results/search_live.json, for docs/search.md

Needs the folder of data sets (`benchmarks/data.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import data, search
from benchmarks.search import Pool, Way
from paretune.options import Options
from paretune.searches.aims import Aims
from paretune.searches.bench import Cut, Live
from paretune.searches.journal import Entry, Journal, Spent
from paretune.searches.searcher import Effort, Searcher
from paretune.searches.space import read
from paretune.searches.study import Study

POOL = Pool("mpqa", 576, score=0.5, joules=0.1)
GRID = Way("grid")


def searched(way: Way, *, seconds: float) -> list[Entry]:
    """The trials of one search."""
    task = data.task(POOL.task, train=POOL.train, validation=search.VALIDATION, test=search.TEST)
    space, aims = read(way.space), Aims("accuracy", (way.against,), None, search.VALIDATION)
    with tempfile.TemporaryDirectory() as folder:
        given = {"space": space, "backbones": {"minilm": "minilm"}, "out": Path(folder), "options": Options(metering=search.METERING)}
        bench, every = Live(task, **given, costs=(way.against,)), Live(task, **given, costs=(search.COST,))
        if way is GRID:
            return list(_in_order(bench, space.every(), seconds=seconds))
        journal = Journal(Path(folder) / "trials.jsonl")
        study = Study(None, better=aims.better, sampler=way.sampler, seed=0)
        effort = Effort({"train_cpu_s": seconds}, confirm=0, seed=0)
        Searcher(space, bench, study=study, journal=journal, aims=aims, rungs=way.rungs(POOL), effort=effort).trials()
        return [_measured(entry, every) if way.against != search.COST else entry for entry in journal.entries()]


def _measured(entry: Entry, bench: Live) -> Entry:
    """A trial of a searcher that did not look at the joules, with them; it does not pay for that."""
    if (entry.kind, entry.state) != ("trial", "complete"):
        return entry
    return dataclasses.replace(entry, cost=bench.work(entry.recipe, entry.rows, seed=0, watch=lambda spent: None).cost)


def _in_order(bench: Live, recipes: list[str], *, seconds: float) -> Any:
    left = seconds

    def watch(spent: Spent) -> None:
        if (spent["train_cpu_s"] or 0.0) > left:
            raise Cut("the budget is spent", spent)

    for recipe in recipes:
        outcome = bench.work(recipe, POOL.train, seed=0, watch=watch)
        yield Entry("trial", recipe, POOL.train, **{f.name: getattr(outcome, f.name) for f in dataclasses.fields(outcome)})
        left -= outcome.spent["train_cpu_s"] or 0.0
        if left <= 0:
            return


def kept(entries: list[Entry]) -> dict[str, Any]:
    """What the page shows of a search: the volume after each trial, and the best recipes by score."""
    done = [e for e in entries if e.state == "complete" and e.kind == "trial"]
    front = Aims("accuracy", (search.COST,), None, search.VALIDATION).front([e for e in done if e.rows == POOL.train])
    return {
        "curve": search.curve(entries, POOL),
        "trials": len(done), "front": [{"recipe": e.recipe, "score": e.score, search.COST: e.cost[search.COST]} for e in front],
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="One live search with each searcher.")
    parser.add_argument("--seconds", type=float, default=240.0, help="CPU seconds that each may spend")
    asked = parser.parse_args()
    found = {name: kept(searched(way, seconds=asked.seconds)) for name, way in {"grid": GRID, **search.WAYS}.items()}
    search.LIVE.write_text(json.dumps({"seconds": asked.seconds, "task": dataclasses.asdict(POOL), "searches": found}, indent=1) + "\n")
    for name, line in found.items():
        print(f"{name}: {line['trials']} trials, volume {line['curve'][-1][1]:.4f}")


if __name__ == "__main__":
    main()
