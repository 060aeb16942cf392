"""What batches cut to a CPU's caches (`batches.parts`) and few widths of batches (`batches.width`) save in training.

    python -m benchmarks.step [--rounds 3]

LoRA, one epoch. Each variant trains in a fresh process; they take turns, and one runs twice as the A/A control. Needs the folder of data sets
(`benchmarks/data.py`).
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import cells, rows, step_parts
from benchmarks.cells import Timing
from paretune import batches
from paretune.meters import memory

WHOLE, AS_THEY_COME = "batches whole", "widths as they come"
TOKENS = {"half as many tokens at once": batches.CACHED // 2, "twice as many tokens at once": batches.CACHED * 2, WHOLE: 10**9}
VARIANTS = ("as it is", "as it is, again", *TOKENS, AS_THEY_COME)
SUBJECTS: dict[str, dict[str, Any]] = {"stdlib-topics": {"train": 160, "batch": 32}, "sst2": {"train": 600, "batch": 16}}


def measured(rounds: int) -> dict[str, Any]:
    """The figures of every variant, by subject and round."""
    return {subject: [_round(subject, VARIANTS[:: -1 if i % 2 else 1]) for i in range(rounds)] for subject in SUBJECTS}


def _round(subject: str, variants: tuple[str, ...]) -> dict[str, Any]:
    return {name: cells.fresh(one, subject, name) for name in variants}


def one(subject: str, variant: str) -> dict[str, Any]:
    """The figures of one training in this process."""
    import paretune as pt
    from benchmarks import data

    batches.CACHED = TOKENS.get(variant, batches.CACHED)
    if variant == AS_THEY_COME:
        batches.width = lambda lengths, most: max(lengths)
    train, batch = SUBJECTS[subject]["train"], SUBJECTS[subject]["batch"]
    task = pt.task(subject).subset(train) if subject not in data.TASKS else data.task(subject, train=train, validation=200, test=200)
    with memory.Peak() as peak:
        made = data.one_run('lora(targets="attention")', task, epochs=1, batch=batch)
    return {k: made[k] for k in ("train_s", "train_cpu_s", "score")} | {
        "added_mb": made["train_peak_mb"] - peak.before_mb, "cpu": made["environment"].get("cpu"), "dtype": made["phases"][0]["dtype"]}  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """docs/step.md, from the file."""
    some = found["sst2"][0]["as it is"]
    tables = "".join(_table(subject, found[subject]) for subject in SUBJECTS)
    return f"""# What cut batches and few widths save on a CPU

LoRA of the attention's maps, one epoch with its validation pass and the probe before it, {some["dtype"]}, on {some["cpu"]}. Medians of
{len(found["sst2"])} rounds, a fresh process each, in turn; the ratios are to `as it is` of the same round, with their range; memory is what training adds to the
process. `as it is, again` is the A/A control.

As it is, a batch passes through the model in parts of at most {batches.CACHED:,} tokens, and is padded to a multiple of 4 tokens, of 8 beyond 64, of 16 beyond
128: oneDNN compiles kernels for every shape it meets and keeps them, which costs time once and memory for good.

{tables}Made by `python -m benchmarks.step` from `benchmarks/results/step.json`; `--table` makes it again from the file.

{step_parts.section()}
{rows.section()}"""


def _table(subject: str, rounds: list[dict[str, Any]]) -> str:
    about = SUBJECTS[subject]
    shown = cells.markdown(["variant", "train CPU s", "CPU time, ratio", "wall time, ratio", "memory MB"], (_row(name, rounds) for name in VARIANTS))
    return f"{about['train']} texts of {subject}, batches of {about['batch']}:\n\n{shown}\n\n"


def _row(name: str, rounds: list[dict[str, Any]]) -> list[str]:
    def ratio(key: str) -> str:
        found = [r[name][key] / r["as it is"][key] for r in rounds]
        return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"

    def middle(key: str) -> float:
        return statistics.median(r[name][key] for r in rounds)

    return [name, f"{middle('train_cpu_s'):.1f}", ratio("train_cpu_s"), ratio("train_s"), f"{middle('added_mb'):,.0f}"]


TIMING = Timing("step", measured, page, rounds=3)

if __name__ == "__main__":
    TIMING.main()
