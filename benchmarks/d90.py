"""How hard is MRPC for MiniLM: how many numbers have to learn, for 90 % of full fine-tuning's score?

    python -m benchmarks.d90 [--hours 1]

A cell is `pt.d90` with one dimension. Full fine-tuning, which each is compared with, runs once for the cells of one seed that are
filled together. Aghajanyan et al. 2020, arXiv:2012.13255, table 1. Needs the folder of data sets (`benchmarks/data.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paretune as pt
from benchmarks import cells, data
from benchmarks.cells import Cell, Table
from paretune import store
from paretune.options import Options, Training

DIMS = (50, 100, 200, 500, 1000, 2000, 5000)
SEEDS = (0, 1, 2)
TRAIN, VALIDATION, TEST, EPOCHS = 800, 600, 300, 6
MAJORITY = 2753 / 4076  # of MRPC's training pairs


def every_cell() -> Iterator[Cell]:
    """Every dimension; seeds outermost."""
    for seed in SEEDS:
        for d in DIMS:
            yield Cell(_cell(d, seed), functools.partial(one, d, seed))


def _cell(d: int, seed: int) -> str:
    return f"{d} {seed}"


@functools.lru_cache(maxsize=1)
def _folder(seed: int) -> tempfile.TemporaryDirectory[str]:
    """Where the runs of a seed are kept, full fine-tuning among them, until the next seed's turn."""
    return tempfile.TemporaryDirectory()


def one(d: int, seed: int) -> dict[str, Any]:
    """Does this dimension reach 90 %?"""
    cut = data.task("mrpc", train=TRAIN, validation=VALIDATION, test=TEST, seed=seed)
    task, out = dataclasses.replace(cut, metric="matthews"), _folder(seed).name
    found = pt.d90(task, backbone="minilm", dims=[d], out=out, seed=seed, options=Options(Training(epochs=EPOCHS)))
    made = next(run for run in store.finished(Path(out)) if f"(d={d}," in run.record["resolved"])
    return {**data.figures(made, task), "d": d, "d90": found.d90, "score": found.scores[d], "test_score": made.record["score"], "full": found.full}


def page(table: Table) -> str:
    """docs/d90.md, from the files."""
    found = {d: [table.found(_cell(d, seed)) for seed in SEEDS] for d in DIMS}
    rows = [[f"{d:,}", cells.mean_range(fs), _share(fs), cells.mean(fs, "train_cpu_s")] for d, fs in found.items()]
    full = [next(filter(None, (fs[i] for fs in found.values())), None) for i in range(len(SEEDS))]
    least = [f"seed {seed}: {_least([fs[i] for fs in found.values()])}" for i, seed in enumerate(SEEDS)]
    return f"""# d90 of MRPC

How many numbers have to learn, in a random subspace of all linear maps of MiniLM (`intrinsic_dimension(d)`, structure-aware), for 90 % of
what full fine-tuning reaches? Matthews correlation in percent, on {VALIDATION} validation pairs, as `pt.d90` decides by; the mean over
{len(SEEDS)} seeds with the lowest and the highest. The paper takes accuracy, of which {100 * MAJORITY:.0f} % are had by always answering "paraphrase"; Matthews
gives that 0, so it asks for more. {TRAIN} training pairs, {EPOCHS} epochs at most, the cards' own rates.

Full fine-tuning: {cells.mean_range(full, field="full")}. **d90**: {"; ".join(least)}.

{cells.markdown(["d", "Matthews", "share of full", "train CPU s"], rows)}

Made by `python -m benchmarks.d90` from the files in `benchmarks/results/d90/`; `--table` makes it again from them.
"""


def _share(found: list[dict[str, Any] | None]) -> str:
    shares = [f["score"] / f["full"] for f in found if f]
    return f"{100 * statistics.mean(shares):.0f} %" if shares else cells.NOT_RUN


def _least(found: list[dict[str, Any] | None]) -> str:
    """The least dimension that was enough, as far as all below it were tried."""
    enough = [f["d90"] for f in found if f and f["d90"]]
    if not enough:
        return cells.NOT_RUN if None in found else f"over {DIMS[-1]:,}"
    return f"{min(enough):,}" + (" or less" if None in found[: DIMS.index(min(enough))] else "")


TABLE = Table("d90", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
