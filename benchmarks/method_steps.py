"""What a training step of each adapter takes, beside full fine-tuning's.

    python -m benchmarks.method_steps [--rounds 9]

Every method trains MiniLM on the same texts of SST-2 in one process, through the library's own loop, at the pace that its probe
finds. In each round the methods take turns, every second round backwards; `full` stands twice as the A/A control. Needs the
folder of data sets (`benchmarks/data.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import paretune as pt
from benchmarks import adaptation, cells, data, limits
from paretune import phases, recipe, surgery, training
from paretune.meters import system
from paretune.methods.modifiers.schedule import Schedule
from paretune.tasks import Task

BATCH, STEPS = 16, 8  # the first step warms up
AGAIN = "full, again"
RECIPES = {AGAIN: "full", "dora": "dora"} | {name: text for name, (text, _) in adaptation.METHODS.items()}
FILE = Path(__file__).parent / "results" / "method_steps.json"
PAGE = Path(__file__).parent.parent / "docs" / "method-steps.md"


def main() -> None:
    """Runs the rounds and writes the file and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--table", action="store_true", help="only write the page from the file")
    asked = parser.parse_args()
    if not asked.table:
        task = data.task("sst2", train=BATCH * STEPS, validation=0, test=1)
        names = list(RECIPES)
        rounds = [{name: seconds(RECIPES[name], task) for name in (names[::-1] if i % 2 else names)} for i in range(asked.rounds)]
        FILE.write_text(json.dumps({"environment": system.describe(), "threads": torch.get_num_threads(), "rounds": rounds}, indent=1) + "\n")
    PAGE.write_text(page(json.loads(FILE.read_text())))


def seconds(text: str, task: Task) -> float:
    """CPU seconds of a step behind the first: the median."""
    model, watch = pt.load("minilm", task), limits.Watch(time.process_time)
    (phase,) = recipe.parse(text).phases
    adapters, _ = phases.decided(model, list(phase), task=task)
    surgery.attach(model, adapters, name="method", on_top=True)
    training.fit(model, task, schedule=Schedule(lr=1e-4, epochs=1.0, batch=BATCH, cache=False), modifiers=[watch])
    return statistics.median(later - sooner for sooner, later in zip(watch.marks, watch.marks[1:], strict=False))


def page(found: dict[str, Any]) -> str:
    """docs/method-steps.md, from the file."""
    rounds = found["rounds"]

    def row(name: str) -> list[str]:
        ratios = [r[name] / r["full"] for r in rounds]
        low, _, high = statistics.quantiles(ratios, n=4)
        return [name if name == AGAIN else f"`{RECIPES[name]}`", f"{1000 * statistics.median(r[name] for r in rounds):.0f}",
                f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"]  # fmt: skip

    order = sorted(RECIPES, key=lambda name: statistics.median(r[name] / r["full"] for r in rounds))
    cpu = found["environment"].get("cpu")
    return f"""# What a training step takes, by method

MiniLM on SST-2 in batches of {BATCH}, whole steps with the optimizer's, without kept features; {found["threads"]} threads of
{cpu}. Medians of {len(rounds)} rounds of {STEPS - 1} steps, all methods in turn;
the ratios are to `full` of the same round, half of the rounds between the two in brackets, and "{AGAIN}" is the A/A control.

{cells.markdown(["method", "CPU ms per step", "CPU time, ratio to full"], map(row, order))}

Made by `python -m benchmarks.method_steps` from `benchmarks/results/method_steps.json`; `--table` makes it again from the file.
"""


if __name__ == "__main__":
    main()
