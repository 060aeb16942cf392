"""What a training step of each adapter and modifier takes, beside full fine-tuning's.

    python -m benchmarks.method_steps [--rounds 9]

Every method trains on the same texts of SST-2 in one process, through the library's own loop, at the pace that its probe finds: MiniLM,
and a small GPT-2 that ranks answers, as the losses of T-Few do. In each round the methods of a model take turns, every second round
backwards; `full` stands twice as the A/A control. Needs the folder of data sets (`benchmarks/data.py`).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import paretune as pt
from benchmarks import adaptation, cells, data, in_context, limits
from benchmarks.cells import Timing
from paretune import phases, recipe, surgery, training
from paretune.methods.modifiers.schedule import Schedule
from paretune.roles import Modifier
from paretune.tasks import Task

BATCH, STEPS = 16, 8  # the first step warms up
FULL, AGAIN = "full", "full, again"
EPISODES = "ways=2, shots=4"  # an episode of 2 classes, with as many queries as shots, is a batch
MINILM = {AGAIN: "full", "maml": f"full + maml(queries=4, {EPISODES})",
          "maml, order 2": f"full + maml(order=2, queries=4, {EPISODES})", "reptile": f"full + reptile({EPISODES})",
          **{name: text for name, (text, _) in adaptation.METHODS.items()}}  # fmt: skip
RANKED = {FULL: "full", AGAIN: "full", "length_norm": "full + length_norm", "unlikelihood": "full + unlikelihood", "t_few": "t_few"}
SUBJECTS = {"MiniLM": ("minilm", "", MINILM), "books-gpt2, ranking answers": (in_context.GPT2, f"choices({in_context.SPOKEN['sst2']})", RANKED)}


def measured(rounds: int) -> dict[str, Any]:
    """CPU seconds of a step, by model, round and method."""
    task = data.task("sst2", train=BATCH * STEPS, validation=0, test=1)
    found = {}
    for subject, (backbone, readout, recipes) in SUBJECTS.items():
        names = list(recipes)
        found[subject] = [{name: seconds(recipes[name], task, backbone, readout) for name in (names[::-1] if i % 2 else names)} for i in range(rounds)]
    return {"threads": torch.get_num_threads(), "rounds": found}


def seconds(text: str, task: Task, backbone: str, readout: str) -> float:
    """CPU seconds of a step behind the first: the median."""
    model, watch = pt.load(backbone, task, readout=readout or None), limits.Watch(time.process_time)
    if readout:
        pt.shrink(model, readout, task)
    (phase,) = recipe.parse(text).phases
    modifiers = [method for method in phase if isinstance(method, Modifier)]
    adapters, _ = phases.decided(model, [method for method in phase if method not in modifiers], task=task)
    surgery.attach(model, adapters, name="method", on_top=True)
    training.fit(model, task, schedule=Schedule(lr=1e-4, epochs=1.0, batch=BATCH, cache=False), modifiers=[*modifiers, watch])
    return statistics.median(later - sooner for sooner, later in zip(watch.marks, watch.marks[1:], strict=False))


def ratios(found: dict[str, Any], subject: str, name: str) -> list[float]:
    """CPU time over that of `full` in the same round."""
    return [r[name] / r[FULL] for r in found["rounds"][subject]]


def page(found: dict[str, Any]) -> str:
    """docs/method-steps.md, from the file."""
    tables = []
    for subject, (_, _, recipes) in SUBJECTS.items():
        rows = []
        for name in sorted(recipes, key=lambda name: statistics.median(ratios(found, subject, name))):  # noqa: B023
            low, middle, high = statistics.quantiles(ratios(found, subject, name), n=4)
            took = statistics.median(r[name] for r in found["rounds"][subject])
            rows.append([name if name == AGAIN else f"`{recipes[name]}`", f"{1000 * took:.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"])
        tables.append(f"{subject}:\n\n{cells.markdown(['method', 'CPU ms per step', 'CPU time, ratio to full'], rows)}\n")
    count = len(next(iter(found["rounds"].values())))
    return f"""# What a training step takes, by method

SST-2 in batches of {BATCH}, whole steps with the optimizer's, without kept features; {found["threads"]} threads of {found["environment"].get("cpu")}. Medians
of {count} rounds of {STEPS - 1} steps, all methods of a model in turn; the ratios are to `full` of the same round, half of the rounds between the two in brackets,
and "{AGAIN}" is the A/A control. A step of `maml` or `reptile` is an episode of as many texts as a batch has. What a step holds in memory is in
[methods by tasks](adaptation.md).

{chr(10).join(tables)}
Made by `python -m benchmarks.method_steps` from `benchmarks/results/method_steps.json`; `--table` makes it again from the file.
"""


TIMING = Timing("method_steps", measured, page, rounds=9)

if __name__ == "__main__":
    TIMING.main()
