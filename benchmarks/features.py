"""What frozen features save, and what the dropout that they leave out does to the score.

    python -m benchmarks.features [--hours 1] [--only time]

MiniLM on SST-2. Time: the CPU seconds of an epoch's training steps, whole passes and kept features in turn in one process, whole passes twice as the A/A
control. Scores: each recipe with `cache=False` (dropout in what is frozen, as in what learns) and with `cache=True` (none there), over seeds.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import cells, data
from benchmarks.cells import Cell, Table

TIMED = {  # recipe -> how many of the six layers are left, and what their backward pass takes, in forward passes: 1 where weights are frozen
    "head": (0, 2), "top_layers(k=1)": (1, 2), "top_layers(k=2)": (2, 2), "top_layers(k=4)": (4, 2), 'lora(targets="*.layer.5.*.query *.layer.5.*.value")': (1, 1),
}  # fmt: skip
VARIANTS = {"whole passes": False, "whole passes, again": False, "kept": True}  # the schedule's cache
EXAMPLES, BATCH, EPOCHS, ROUNDS = 256, 32, 3, 3
SCORED, SEEDS, TRAIN, VALIDATION, TEST = ("head", "top_layers(k=2)"), (0, 1, 2), 600, 200, 872
LAYERS = 6


def every_cell() -> Iterator[Cell]:
    """A cell for each timed recipe, then one for each recipe, kind of pass and seed; seeds outermost."""
    for recipe in TIMED:
        yield Cell(f"time {recipe}", functools.partial(timed, recipe))
    for seed in SEEDS:
        for recipe in SCORED:
            for cache in (False, True):
                yield Cell(_scored(recipe, cache, seed), functools.partial(_score, recipe, cache, seed))


def _scored(recipe: str, cache: bool, seed: int) -> str:
    return f"score {recipe} cache={cache} {seed}"


def _score(recipe: str, cache: bool, seed: int) -> dict[str, Any]:
    given = data.task("sst2", train=TRAIN, validation=VALIDATION, test=TEST, seed=seed)
    return data.one_run(f"{recipe} + schedule(cache={cache}, epochs={EPOCHS}, batch={BATCH})", given, seed=seed)


class Clock:
    """A modifier that only looks at the clock: CPU seconds of each epoch's steps."""

    def events(self, loop: Any) -> Any:
        """Its handlers."""
        from paretune.training import Events

        self.seconds: list[float] = []
        clock = self

        class Ticking(Events):
            def plan(self, loop: Any, visited: Any, *, steps: int) -> None:
                clock.begun = time.process_time()

            def epoch_ends(self, loop: Any) -> None:
                clock.seconds.append(time.process_time() - clock.begun)

        return Ticking()


def timed(recipe: str) -> dict[str, Any]:
    """CPU seconds of each epoch, by variant, round by round."""
    from paretune.meters import system

    given = data.task("sst2", train=EXAMPLES, validation=64, test=64)
    _epochs(recipe, given, cache=False)  # the number format is probed, and everything is loaded
    rounds = []
    for i in range(ROUNDS):
        order = list(VARIANTS)[::-1] if i % 2 else list(VARIANTS)
        rounds.append({name: _epochs(recipe, given, cache=VARIANTS[name]) for name in order})
    last = rounds[-1]["kept"]
    return {"rounds": rounds, "dtype": last["dtype"], "attention": last["attention"], "score": last["score"], "machine": system.describe()["cpu"]}


def _epochs(recipe: str, given: Any, *, cache: bool) -> dict[str, Any]:
    import paretune as pt
    from paretune import training

    model, clock = pt.load("minilm", given), Clock()
    pt.adapt(model, recipe)
    schedule = pt.Schedule(lr=1e-3, epochs=EPOCHS, batch=BATCH, cache=cache)
    fitted = training.fit(model, given, schedule=schedule, modifiers=[clock])
    return {"cpu_s": clock.seconds, "dtype": fitted.dtype, "attention": fitted.attention, "score": fitted.epochs[-1]["validation_score"]}


def page(table: Table) -> str:
    """docs/features.md, from the files."""
    some = next((f for recipe in TIMED if (f := table.found(f"time {recipe}"))), {})
    head = ["recipe", "layers left", "an epoch, whole (CPU s)", "first epoch, kept", "later epochs, kept", "times faster, by the layers", "later epochs, times faster",
            "again, ratio (A/A)"]  # fmt: skip
    scores = ["recipe", "cache=False: dropout in what is frozen", "cache=True: none there"]
    return f"""# Frozen features: an epoch's cost, and the score

What is frozen below all that learns is computed once per example, without dropout, and kept ([adapt](guide/adapt.md)).

## An epoch's training steps

MiniLM on {EXAMPLES} texts of SST-2, batch {BATCH}, CPU seconds of the training steps of an epoch (validation left out), one thread of {some.get("machine", "?")}
that others use, too. {ROUNDS} rounds, the variants in turn in one process; the ratio of each round is that of its later epochs, given with its range.
`whole passes, again` is the A/A control. By the layers: n layers, k of them left, a backward pass of b forward passes (2, or 1 where the layer's weights are frozen)
make (n + b k) / (k + b k); embeddings, the head and the reading of what was kept are not counted.

{cells.markdown(head, (_time_row(recipe, table.found(f"time {recipe}")) for recipe in TIMED))}

## The score

Test accuracy in percent, {TRAIN} texts, {EPOCHS} epochs, {len(SEEDS)} seeds (lowest to highest), test texts: {TEST}. The two columns of a row differ in
nothing else.

{cells.markdown(scores, ([f"`{r}`", *(cells.mean_range([table.found(_scored(r, c, s)) for s in SEEDS]) for c in (False, True))] for r in SCORED))}

Made by `python -m benchmarks.features` from `benchmarks/results/features/`; `--table` makes it again from the files.
"""


def by_layers(left: int, backward: float) -> float:
    """How many times as long a whole pass takes as one that begins where the layers left do, forward and backward, in forward passes through a layer."""
    return (LAYERS + backward * left) / (left + backward * left) if left else float("inf")


def _time_row(recipe: str, found: dict[str, Any] | None) -> list[str]:
    left, backward = TIMED[recipe]
    expected = f"{by_layers(left, backward):.1f}" if left else "no layer is left"
    if found is None:
        return [f"`{recipe}`", f"{left} of {LAYERS}", *[cells.NOT_RUN] * 3, expected, *[cells.NOT_RUN] * 2]
    rounds = found["rounds"]

    def later(r: dict[str, Any], name: str) -> float:
        return statistics.mean(r[name]["cpu_s"][1:])

    def middle(values: list[float], digits: int) -> str:
        return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    return [
        f"`{recipe}`", f"{left} of {LAYERS}", f"{statistics.median(later(r, 'whole passes') for r in rounds):.2f}",
        f"{statistics.median(r['kept']['cpu_s'][0] for r in rounds):.2f}", f"{statistics.median(later(r, 'kept') for r in rounds):.3f}", expected,
        middle([later(r, "whole passes") / later(r, "kept") for r in rounds], 1),
        middle([later(r, "whole passes, again") / later(r, "whole passes") for r in rounds], 2),
    ]  # fmt: skip


TABLE = Table("features", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
