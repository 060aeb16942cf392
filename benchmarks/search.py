"""Searchers over a fixed pool: every recipe measured once at each share of the data, every searcher replayed with the recorded figures and costs.

    python -m benchmarks.search [--hours 1] [--only TEXT]    fills missing cells of the pool, replays, and writes docs/search.md and its figure
    python -m benchmarks.search --table                      replays and writes from the files alone

Needs the folder of data sets (`benchmarks/data.py`). Each cell is one run: its validation score chooses, its CPU time is what a replay pays.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cells, data
from benchmarks.cells import Cell, Table
from paretune import runs, store
from paretune.options import Metering, Options
from paretune.pareto import dominance
from paretune.recipe import parse
from paretune.searches import halving
from paretune.searches.aims import Aims
from paretune.searches.bench import ENDLESS_S, Live, Outcome, Watch
from paretune.searches.journal import Entry, Journal, Spent
from paretune.searches.searcher import Effort, Searcher
from paretune.searches.space import Space, read
from paretune.searches.study import Study
from paretune.store import Run

LORA = "lora(r={8, 2, 32}, targets={linear, attention}) + schedule(lr={1e-3, 3e-4, 3e-3}) | {merge, merge | int8}"
SIZES = "bottleneck={96, 12}"
AUTOPEFT = (
    f'{{none, adapter(form="pfeiffer", norms=False, {SIZES})}} + {{none, adapter(form="parallel", norms=False, {SIZES})}}'
    " + {none, prefix(length=12)} + schedule(lr={1e-3, 3e-4})"
)
SPACE = f"{{none, keep_layers()}} | {{{LORA}, {AUTOPEFT}}}"
EPOCHS, BATCH, VALIDATION, TEST = 3.0, 32, 500, 100  # the schedule's own epochs and batch
COST = "energy_per_inference_j"
METERING = Metering(power="idle=2W,busy=6W")
SEEDS = range(100, 120)  # of the replays; the model's constants were chosen on others, 0 to 7
TRIALS = 100  # recipes of each replay
FIGURE = cells.ROOT / "docs" / "search.png"
LIVE = cells.ROOT / "benchmarks" / "results" / "search_live.json"
Found = Callable[[str, int], dict[str, Any]]  # the figures of a recipe on so many rows


@dataclasses.dataclass(frozen=True)
class Pool:
    """A task, its training rows, and the corner of its hypervolumes, stated before the first run: a score and the joules of an inference, both worse than most."""

    task: str
    train: int
    score: float
    joules: float

    @property
    def rungs(self) -> tuple[int, ...]:
        """Training rows, fewest first."""
        return halving.rungs(self.train, epochs=EPOCHS, batch=BATCH)

    def cell(self, recipe: str, rows: int) -> str:
        """The name of a cell."""
        return f"{self.task} {recipe} {rows}"


POOLS = (Pool("trec6", 576, score=0.5, joules=0.1), Pool("sst2", 384, score=0.5, joules=0.15))


def space() -> Space:
    """What is searched."""
    return read(SPACE)


def every_cell() -> Iterator[Cell]:
    """The whole pool."""
    for pool in POOLS:
        for recipe in space().every():
            for rows in reversed(pool.rungs):
                yield Cell(pool.cell(recipe, rows), functools.partial(measured, pool, recipe, rows))


_trained = set[str]()  # ids of the phases that were made in this process
_known = dict[str, dict[str, Any]]()  # by a model's structure, what its inference costs


def measured(pool: Pool, recipe: str, rows: int) -> dict[str, Any]:
    """One cell: the recipe on so many rows. CPU seconds: of each phase, of all else (opening, scoring, saving), and of measuring an inference."""
    task = data.task(pool.task, train=pool.train, validation=VALIDATION, test=TEST)
    bench = Live(task, space=space(), backbones={"minilm": "minilm"}, out=Path(_folder().name), options=Options(metering=METERING), costs=())
    outcome = bench.work(recipe, rows, seed=0, watch=lambda spent: None)
    if outcome.state != "complete":
        raise RuntimeError(f"{recipe}: {outcome.reason}")
    fresh = sum(phase["train_cpu_s"] for phase in outcome.phases if phase["id"] not in _trained)
    _trained.update(phase["id"] for phase in outcome.phases)
    run = Run.read(bench.out / "runs" / outcome.run)
    structure = store.structure(run.model)
    if structure not in _known:
        begun = time.process_time()
        (run,) = runs.measure([run], task, options=bench.options, peaks=False)
        figures = {name: run.record["cost"][name] for name in (COST, "latency_p50_ms", "throughput_per_s")}
        _known[structure] = {**figures, "interval": run.record["cost"]["intervals"].get(COST), "measure_cpu_s": time.process_time() - begun}
    phases = [{name: phase[name] for name in ("id", "train_cpu_s", "examples")} for phase in outcome.phases]
    sizes = {name: run.record["cost"][name] for name in ("trainable_parameters", "stored_mb")}
    other = (outcome.spent["train_cpu_s"] or 0.0) - fresh
    return {"score": outcome.score, "structure": structure, **_known[structure], **sizes, "phases": phases, "other_cpu_s": other}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """Where all cells of this process work: recipes that begin alike share that."""
    return tempfile.TemporaryDirectory()


class Replay:
    """A bench that answers from the pool. What was paid for once is not paid again, as on a machine: a phase that recipes share, measuring models made alike.

    Args:
        found: the figures of a recipe on so many rows.
        measures: does the searcher look at what an inference costs?
    """

    measure_s = 0.0

    def __init__(self, found: Found, *, rungs: tuple[int, ...], measures: bool = True) -> None:
        self.found, self.rungs, self.measures, self.paid = found, rungs, measures, set[str]()

    def key(self, recipe: str, rows: int) -> str:
        """The recipe and the rows, if the recipe composes."""
        parse(recipe).check()
        return f"{recipe} {rows}"

    def timing(self, recipe: str) -> tuple[Spent, Callable[[int], Spent]]:
        """The recipe on the fewest rows is what timing takes; the forecast is the line to what it takes on all."""
        (low, cheap), (high, dear) = ((rows, self._price(self.found(recipe, rows))) for rows in (self.rungs[0], self.rungs[-1]))
        slope = (dear - cheap) / max(1, high - low)
        return _seconds(cheap), lambda rows: _seconds(cheap + slope * (rows - low))

    @staticmethod
    def _price(figures: dict[str, Any]) -> float:
        return figures["other_cpu_s"] + sum(phase["train_cpu_s"] for phase in figures["phases"])

    def work(self, recipe: str, rows: int, *, seed: int, watch: Watch) -> Outcome:
        """The cell's figures, for the CPU time that they took when they were measured."""
        figures = self.found(recipe, rows)
        prices = {phase["id"]: phase["train_cpu_s"] for phase in figures["phases"]}
        if self.measures:
            prices[figures["structure"]] = figures["measure_cpu_s"]
        spent = figures["other_cpu_s"] + sum(price for name, price in prices.items() if name not in self.paid)
        self.paid |= set(prices)
        cost = {name: figures[name] for name in (COST, "stored_mb", "trainable_parameters")}
        return Outcome("complete", _seconds(spent), "", self.key(recipe, rows), "accuracy", figures["score"], {"reasons": {}, **cost}, figures["phases"])

    def measure(self, ids: Sequence[str], *, watch: Watch) -> Spent:
        """Nothing is measured again."""
        return _seconds(0.0)


def _seconds(cpu: float) -> Spent:
    return {"train_s": cpu, "train_cpu_s": cpu, "train_energy_j": None}


@dataclasses.dataclass(frozen=True)
class Way:
    """A searcher: what it searches, how it samples, whether it begins on few rows, and what it sets the score against."""

    sampler: str
    cheap_first: bool = False
    space: str = SPACE
    against: str = COST

    def rungs(self, pool: Pool) -> tuple[int, ...]:
        """The rows of its trials."""
        return pool.rungs if self.cheap_first else pool.rungs[-1:]


WAYS = {
    "paretune": Way("auto", cheap_first=True),
    "Optuna's TPE": Way("tpe"),
    "random, few rows first": Way("random", cheap_first=True),
    "random": Way("random"),
    "AutoPEFT's space and aim": Way("gp", space=AUTOPEFT, against="trainable_parameters"),
}
Curve = list[tuple[float, float]]  # (CPU seconds spent, hypervolume of what has seen all rows) after each trial


def replayed(way: Way, pool: Pool, found: Found, *, seed: int) -> Curve:
    """One search, until the space is used up."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "trials.jsonl")
        searched, aims = read(way.space), Aims("accuracy", (way.against,), None, VALIDATION)
        study = Study(None, better=aims.better, sampler=way.sampler, seed=seed)
        effort = Effort({"train_cpu_s": ENDLESS_S}, trials=TRIALS, confirm=0, seed=seed)
        bench = Replay(found, rungs=way.rungs(pool), measures=way.against == COST)
        Searcher(searched, bench, study=study, journal=journal, aims=aims, rungs=way.rungs(pool), effort=effort).trials()
        return curve(journal.entries(), pool)


def grid(pool: Pool, found: Found) -> Curve:
    """The recipes in the order in which the space lists them, a method's default first, on all rows."""
    bench, entries = Replay(found, rungs=(pool.train,)), []
    for recipe in space().every():
        outcome = bench.work(recipe, pool.train, seed=0, watch=lambda spent: None)
        entries.append(Entry("trial", recipe, pool.train, **{f.name: getattr(outcome, f.name) for f in dataclasses.fields(outcome)}))
    return curve(entries, pool)


def curve(entries: Sequence[Entry], pool: Pool) -> Curve:
    """The hypervolume of score and joules, trial by trial."""
    corner, aims = np.array([-pool.score, pool.joules]), Aims("accuracy", (COST,), None, VALIDATION)
    found, spent, reached = [], 0.0, []
    for entry in entries:
        spent += entry.spent["train_cpu_s"] or 0.0
        reached += [entry] if (entry.kind, entry.state, entry.rows) == ("trial", "complete", pool.train) else []
        found.append((spent, dominance.hypervolume(aims.losses(reached), corner) if reached else 0.0))
    return found


def cost_to(line: Curve, volume: float) -> float | None:
    """The CPU seconds after which a curve reaches a volume; None where it never does."""
    return next((spent for spent, reached in line if reached >= volume), None)


def page(table: Table) -> str:
    """The page and its figure, from the cells; 'not run' where some are missing."""
    head = f"# Searchers over a fixed pool\n\n{_about()}\n"
    missing = [cell.name for cell in every_cell() if table.found(cell.name) is None]
    if missing:
        return f"{head}\n{len(missing)} of {sum(1 for _ in every_cell())} cells: {cells.NOT_RUN}.\n"
    curves = {pool.task: _curves(pool, kept(table, pool)) for pool in POOLS}
    _draw(curves)
    parts = [f"## {pool.task}\n\n{_table(pool, curves[pool.task])}" for pool in POOLS]
    made = "Made by `python -m benchmarks.search --table` from `benchmarks/results/search/`."
    return "\n\n".join([head.strip(), "![hypervolume over CPU seconds](search.png)", _target(curves), *parts, *_live(), made]) + "\n"


def _target(curves: dict[str, dict[str, list[Curve]]]) -> str:
    """What a quarter of random search's cost buys, on the task on which it buys least."""
    bought = []
    for found in curves.values():
        cost, volume = _end(found["random"])
        bought.append(statistics.median(max((v for s, v in line if s <= 0.25 * cost), default=0.0) for line in found["paretune"]) / volume)
    least = ", ".join(f"{share:.1%} on {task}" for task, share in zip(curves, bought, strict=True))
    return f"The target was all of random search's volume for a quarter of its cost. A quarter buys {least}: the target is {'met' if min(bought) >= 1 else 'not met'}."


def _end(lines: list[Curve]) -> tuple[float, float]:
    """CPU seconds and volume at the end, medians."""
    cost, volume = (statistics.median(line[-1][k] for line in lines) for k in (0, 1))
    return cost, volume


def _live() -> list[str]:
    """One search with each searcher, on a task without a pool; nothing where that was not run."""
    if not LIVE.is_file():
        return []
    found = json.loads(LIVE.read_text())
    rows = []
    for name, line in found["searches"].items():
        half, whole = (max((v for s, v in line["curve"] if s <= share * found["seconds"]), default=0.0) for share in (0.5, 1.0))
        first, *_, last = [*line["front"], *line["front"]]
        rows.append([name, str(line["trials"]), f"{half:.4f}", f"{whole:.4f}", *map(_told, (first, last))])
    task = found["task"]
    about = (
        f"Each searcher once on this machine, on {task['task']} ({task['train']} training rows), of which there is no pool, "
        f"with {found['seconds']:g} CPU s for all that it does, proposing included; "
        f"hypervolume up to {task['score']:g} and {task['joules']:g} J. One run each: no interval."
    )
    head = ["searcher", "trials", "volume at half of it", "at its end", "its best score", "its cheapest to run"]
    return [f"## Live\n\n{about}\n\n{cells.markdown(head, rows)}\n\nMade by `python -m benchmarks.search_live`."]


def _told(end: dict[str, Any]) -> str:
    recipe = end["recipe"].replace("|", "\\|")  # which would end the cell
    return f"`{recipe}`: {end['score']:.3f}, {end[COST]:.3f} J"


def kept(table: Table, pool: Pool) -> Found:
    """The figures of a pool. Of models made alike the first measured one's costs count for all, as in a search."""
    known: dict[str, dict[str, Any]] = {}
    costs: dict[str, dict[str, Any]] = {}
    for recipe in space().every():
        for rows in reversed(pool.rungs):
            figures = table.found(pool.cell(recipe, rows))
            assert figures is not None, pool.cell(recipe, rows)
            shared = costs.setdefault(figures["structure"], {name: figures[name] for name in (COST, "measure_cpu_s")})
            known[pool.cell(recipe, rows)] = {**figures, **shared}
    return lambda recipe, rows: known[pool.cell(recipe, rows)]


def _curves(pool: Pool, found: Found) -> dict[str, list[Curve]]:
    return {"grid": [grid(pool, found)], **{name: [replayed(way, pool, found, seed=seed) for seed in SEEDS] for name, way in WAYS.items()}}


def _table(pool: Pool, curves: dict[str, list[Curve]]) -> str:
    cost, volume = _end(curves["random"])
    rows = []
    for name, lines in curves.items():
        cells_ = []
        for share in (0.9, 0.95, 0.99, 1.0):
            costs = sorted(c if (c := cost_to(line, share * volume)) is not None else float("inf") for line in lines)
            middle = statistics.median(costs)
            cells_.append(f"{middle:,.0f} ({middle / cost:.0%})" if np.isfinite(middle) else "-")
        rows.append([name, *cells_, f"{statistics.median(line[-1][1] for line in lines) / volume:.1%}", f"{statistics.median(line[-1][0] for line in lines):,.0f}"])
    head = ["searcher", "CPU s to 90 % of it", "to 95 %", "to 99 %", "to all of it", "its own end", "CPU s to its end"]
    about = f"Random search has spent {cost:,.0f} CPU s after {TRIALS} trials (medians of {len(SEEDS)} seeds) and has then a hypervolume of {volume:.4f}."
    return f"{about}\n\n{cells.markdown(head, rows)}"


def _about() -> str:
    corners = "; ".join(f"{pool.task} {pool.score:g} and {pool.joules:g} J" for pool in POOLS)
    sizes = "; ".join(f"{pool.task} {', '.join(map(str, pool.rungs))}" for pool in POOLS)
    return (
        f"The pool: the {len(space().every())} recipes of\n\n    {SPACE}\n\non minilm, {EPOCHS:g} epochs (training rows: {sizes}), each trained once on one thread "
        f"and scored on {VALIDATION} validation rows; models that are made alike were measured once. Joules are estimates from CPU time at a stated power "
        f"({METERING.power}). A replay pays the CPU seconds that its trials took when they were measured, what recipes share once: training, opening, scoring, "
        f"and measuring inference where the searcher looks at it. The hypervolume is that of validation accuracy and joules of an inference, of recipes that have "
        f"seen all rows, up to a corner stated before the first run ({corners}). "
        f"Medians over {len(SEEDS)} seeds ({SEEDS[0]} to {SEEDS[-1]}; the constants of paretune's model were chosen on seeds 0 to 7 of these pools), "
        f"of {TRIALS} trials each."
    )


def _draw(curves: dict[str, dict[str, list[Curve]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(curves), figsize=(6 * len(curves), 4.2), squeeze=False)
    for axes, (task, found) in zip(all_axes[0], curves.items(), strict=True):
        at = np.linspace(0, max(line[-1][0] for line in found["random"]), 400)
        for name, lines in found.items():
            volumes = np.array([[max((v for s, v in line if s <= t), default=0.0) for t in at] for line in lines])
            axes.plot(at, np.median(volumes, axis=0), label=name)
            axes.fill_between(at, *np.quantile(volumes, [0.1, 0.9], axis=0), alpha=0.15)
        axes.set(title=task, xlabel="CPU seconds spent", ylabel="hypervolume (accuracy x joules per inference)")
        axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    Table("search", every_cell, page).main()
