"""A bench without models: every recipe has a score, a size and a price that follow from its text, and time is counted, not passed."""

from __future__ import annotations

import hashlib
import os
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from paretune.recipe import parse
from paretune.searches.aims import Aims
from paretune.searches.bench import Cut, Outcome, Watch
from paretune.searches.journal import Journal, Spent
from paretune.searches.searcher import Effort, Searcher
from paretune.searches.space import read
from paretune.searches.study import Study
from paretune.searches.table import TableLines

RUNGS = (100, 300, 900)
SPACE = "lora(r={1, 2, 4, 8, 16, 32}, targets={attention, ffn}) | {none, merge | int8}"
FIXED_S, TAIL_S = 2.0, 1.0


def spent(seconds: float) -> Spent:
    return {"train_s": seconds, "train_cpu_s": seconds, "train_energy_j": 5.0 * seconds}


def per_row_s(recipe: str) -> float:
    return 0.002 * (1 + int(re.search(r"r=(\d+)", recipe)[1]) / 8 if "r=" in recipe else 2)


def score(recipe: str, rows: int, seed: int = 0) -> float:
    """A power law in the rows whose level rises with the rank, with a little luck of the seed."""
    rank = int(re.search(r"r=(\d+)", recipe)[1]) if "r=" in recipe else 8
    luck = int(hashlib.sha256(f"{recipe} {seed}".encode()).hexdigest()[:4], 16) / 65536
    return 0.9 - 0.1 / rank - (0.02 if "int8" in recipe else 0.0) - 0.8 * rows**-0.5 + 0.002 * luck


def stored_mb(recipe: str) -> float:
    return 25.0 if "int8" in recipe else 90.0


class Pool:
    """`slow` says how many times longer than its forecast a recipe takes; `fails` which recipes fail; `told` keeps what was worked on."""

    measure_s = 0.0

    def __init__(self, *, slow: Callable[[str], float] = lambda recipe: 1.0, fails: Callable[[str], bool] = lambda recipe: False, after: int = 10**9) -> None:
        self.slow, self.fails, self.after = slow, fails, after
        self.told: list[tuple[str, int, int]] = []
        self.measured: list[list[str]] = []

    def key(self, recipe: str, rows: int) -> str:
        return f"{parse(recipe).check().resolved} {rows}"

    def timing(self, recipe: str) -> tuple[Spent, Callable[[int], Spent]]:
        return spent(1.5), lambda rows: spent(FIXED_S + rows * per_row_s(recipe))

    def work(self, recipe: str, rows: int, *, seed: int, watch: Watch) -> Outcome:
        self.told.append((recipe, rows, seed))
        if len(self.told) > self.after:
            raise KeyboardInterrupt
        training = rows * per_row_s(recipe) * self.slow(recipe)
        used, step = FIXED_S - TAIL_S, 0.05
        end = used + training
        try:
            while used < end:
                used = min(end, used + step)
                watch(spent(used))
        except Cut as cut:
            return Outcome("cut", spent(used), str(cut))
        if self.fails(recipe):
            return Outcome("failed", spent(used), "its loss is no number")
        cost = {"stored_mb": stored_mb(recipe), **spent(training), "reasons": {}}
        return Outcome("complete", spent(used + TAIL_S), "", f"{self.key(recipe, rows)} {seed}", "accuracy", score(recipe, rows, seed), cost, [])

    def measure(self, ids: Sequence[str], *, watch: Watch) -> Spent:
        self.measured.append(list(ids))
        watch(spent(1.0))
        return spent(1.0)


def searcher(folder: Path, bench: Pool, *, budget: dict[str, float] | None = None, trials: int | None = None, space: str = SPACE, seed: int = 0,
             sampler: str = "random", kept: bool = False, rungs: tuple[int, ...] = RUNGS, confirm: int = 1,
             aims: Aims = Aims("accuracy", ("stored_mb",), None, 400), shared: str | None = None,
             starts: Sequence[dict] = ()) -> Searcher:  # fmt: skip
    """A searcher whose journal, and study where it is kept, lie in the folder; or both in a `shared` database, under the folder's name."""
    url = shared or (f"sqlite:///{folder}/study.db" if kept else None)
    study = Study(url, name=str(folder), better=aims.better, sampler=sampler, seed=seed)
    effort = Effort(budget or {}, trials, confirm, seed, tuple(starts))
    journal = Journal(TableLines(shared, study=str(folder)) if shared else folder / "trials.jsonl")
    return Searcher(read(space), bench, study=study, journal=journal, aims=aims, rungs=rungs, effort=effort)


def child(work: Callable[[], object]) -> int:
    """A process of its own that does this and ends."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid
