"""How true a plan is: what `paretune plan` expects of a run, and what the run then takes.

    python -m benchmarks.plan [--hours 1] [--only TEXT] [--afresh]       about a quarter of an hour on 2 cores

Plan and run each have a process of their own, forked from one that has the libraries and nothing else, one right after the other. Peak memory is that of
the process; the disk is looked at from outside while the run is at work. Where the machine has no meter, joules are estimates on both sides, from the
same power profile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import cells, data
from benchmarks.cells import Cell, Table

WITHIN, OFTEN = 0.25, 0.9  # how near a plan is to come, and in how many of the runs
PROFILE = "laptop"  # the power profile
OUT = "out"  # the run's folder, in a job's own
LOOK_S = 0.1  # between two looks at the disk
FIGURES = {"cpu_s": "CPU s", "wall_s": "wall s", "peak_mb": "peak MB", "disk_mb": "disk MB, at most", "saved_mb": "disk MB, that stay", "energy_j": "J"}
SIZES = {"small": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
         "wide": {"hidden_size": 768, "num_hidden_layers": 3, "num_attention_heads": 12, "intermediate_size": 3072}}  # fmt: skip
WORK = (  # backbone, task, training rows, epochs, recipe
    ("minilm", "sst2", 512, 2, "lora(r=8)"),
    ("minilm", "mrpc", 192, 2, "full"),
    ("small", "sst2", 2048, 3, "full"),
    ("minilm", "trec6", 512, 3, "head"),
    ("wide", "sst2", 192, 1, "bitfit"),
    ("minilm", "stsb", 256, 1, "keep_layers | full"),
    ("minilm", "sst2", 512, 2, "adapter + random_subset(keep=0.5)"),
    ("small", "mrpc", 768, 2, "lora(r=4) | merge | int8"),
    ("minilm", "mpqa", 768, 2, "top_layers(k=2)"),
    ("minilm", "stdlib-topics", 96, 1, "ia3"),
    ("wide", "trec6", 192, 1, "full"),
    ("minilm", "sst2", 256, 2, "full | full + distill(teacher=@1)"),
    ("minilm", "cola", 512, 2, "prefix(length=10)"),
    ("minilm", "sst2", 384, 2, "full + qat"),
    ("small", "stdlib-topics", 256, 2, "adapter"),
    ("minilm", "trec6", 512, 2, "compacter"),
    ("minilm", "rte", 128, 1, "lora(r=16)"),
    ("minilm", "sst2", 384, 1, "nf4 | lora(r=8)"),
    ("small", "cola", 2048, 2, "bitfit"),
    ("minilm", "sst2", 512, 1, "lora(r=8) + schedule(batch=64, lr=1e-3)"),
)


def every_cell() -> Iterator[Cell]:
    """One for each piece of work."""
    for work in WORK:
        yield Cell(_name(*work), functools.partial(compare, *work))


def _name(backbone: str, task: str, rows: int, epochs: int, recipe: str) -> str:
    return f"{backbone} {task} {rows} x {epochs} {recipe}"


def compare(*work: Any) -> dict[str, Any]:
    """Expected and actual figures; `score` is the ratio of CPU seconds, `load` how many processes were at work on the machine before."""
    import paretune.flow
    import paretune.planning.plan  # noqa: F401 - the forked processes have all libraries

    load = os.getloadavg()[0]
    expected, actual = _apart(_expect, *work), _apart(_run, *work)
    return {"expected": expected, "actual": actual, "score": expected["cpu_s"] / actual["cpu_s"], "load": load}


def _apart(job: Callable[..., dict[str, Any]], *work: Any) -> dict[str, Any]:
    """What the job finds in a process of its own, and the MB that its folder has on disk: the most seen (where it is not foreseen), and at the end."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        child = fork.Process(target=lambda: theirs.send(job(folder, *work)))
        child.start()
        theirs.close()
        seen = [0.0]
        while not ours.poll(LOOK_S):
            seen.append(_on_disk(Path(folder) / OUT))
        found = ours.recv()
        child.join()
        saved = _on_disk(Path(folder) / OUT)
    return {"disk_mb": max(*seen, saved), "saved_mb": saved} | found


def _on_disk(folder: Path) -> float:
    """MB of all files; one with two names counts once, one that vanishes while it is looked at not at all."""
    sizes = {}
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                about = os.stat(os.path.join(root, name))
                sizes[about.st_ino] = about.st_size
    return sum(sizes.values()) / 1e6


def _planned(folder: str, *work: Any) -> Any:
    from paretune import flow
    from paretune.options import Metering, Options, Training

    backbone, name, rows, epochs, recipe = work
    if name == "stdlib-topics":
        import paretune as pt

        whole = pt.task(name).subset(rows, seed=0)
        task = dataclasses.replace(whole, validation=data.few(whole.validation, 64), test=data.few(whole.test, 64))
    else:
        task = data.task(name, train=rows, validation=128, test=128)
    options = Options(Training(epochs=epochs), metering=Metering(profile=PROFILE))
    ((_, plan),) = flow.plan_frontier(task, backbone=_backbone(backbone, Path(folder)), recipes=[recipe], out=Path(folder) / OUT, options=options)
    return plan


def _backbone(name: str, folder: Path) -> str:
    """A name, or a folder with a BERT of another size, with values of no matter, and MiniLM's tokenizer."""
    if name not in SIZES:
        return name
    import torch
    import transformers

    from paretune import backbones

    tokenizer = transformers.AutoTokenizer.from_pretrained(backbones.find("minilm").source)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **SIZES[name])).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def _expect(folder: str, *work: Any) -> dict[str, Any]:
    import torch

    from paretune.planning import plan

    found = plan.expect(_planned(folder, *work))
    stages = [{"name": s.name, "cpu_s": s.took.cpu_s, "peak_mb": s.peak_mb, "flops": s.flops, "work_mb": s.work_mb} for s in found.stages]
    return {"cpu_s": found.training.cpu_s, "wall_s": found.training.wall_s, "peak_mb": found.peak_mb, "disk_mb": found.disk_mb, "saved_mb": found.saved_mb,
            "energy_j": found.energy.value, "rehearsal_s": found.rehearsal_s, "threads": torch.get_num_threads(), "stages": stages}  # fmt: skip


def _run(folder: str, *work: Any) -> dict[str, Any]:
    from paretune import phases
    from paretune.meters import energy, system

    records = phases.walk(_planned(folder, *work))
    stages = [{k: r.get(k) for k in ("spelling", "train_cpu_s", "train_peak_mb", "train_flops", "dtype", "attention", "steps")} for r in records]
    joules = [r["train_energy_j"] for r in records]
    return {"cpu_s": sum(r["train_cpu_s"] for r in records), "wall_s": sum(r["train_s"] for r in records), "peak_mb": max(r["train_peak_mb"] for r in records),
            "energy_j": None if None in joules else sum(joules), "meter": energy.find(profile=PROFILE).source, "stages": stages,
            "environment": system.describe()}  # fmt: skip


def page(table: Table) -> str:
    """docs/plan.md."""
    found = {work: table.found(_name(*work)) for work in WORK}
    counted = [f for f in found.values() if f is not None and not _older(f)]
    older = sum(f is not None and _older(f) for f in found.values())
    return f"""# How true a plan is

What `paretune plan` expects of a run's training, and what the run then took ([how it works](guide/plan.md)). {len(counted)} of {len(WORK)} runs are done. A plan is
to come within {WITHIN:.0%} of the actual figure in {OFTEN:.0%} of the runs:

{cells.markdown(["figure", f"within {WITHIN:.0%}", ""], ([title, *_count(counted, key)] for key, title in FIGURES.items()))}

Each figure below is what was expected / what it was, and the quotient. The runs are short, so that this table can be made again; the longer a run, the less a plan's
share of chance. {_about(counted)} `small` is a BERT of 4 layers of width 128, `wide` one of 3 layers of width 768.

{cells.markdown(["backbone", "task", "rows", "epochs", "recipe", *FIGURES.values()], (_row(work, f) for work, f in found.items()))}

{_of_older(older)}Made by `python -m benchmarks.plan`; each run is a file in `benchmarks/results/plan/`.
"""


def _older(found: dict[str, Any]) -> bool:
    """Is it from before the disk and joules were compared?"""
    return "disk_mb" not in found["expected"]


def _of_older(count: int) -> str:
    if not count:
        return ""
    return f"""The {count} rows marked (older) are not counted: other jobs were at work on the same cores, and most of them were planned before a plan counted kernels of
bf16 (so its memory is too low there), padding within a subset, and validations that read kept features; the size of a kernel was fitted to the first five.

"""


def _about(counted: list[dict[str, Any]]) -> str:
    if not counted:
        return ""
    here, loads, commits = counted[0]["actual"]["environment"], [f["load"] for f in counted], sorted({f["commit"] for f in counted})
    return f"""{here["cpu"]}, {here["threads"]} threads; commit {", ".join(commits)}. Before the runs {min(loads):.1f} to {max(loads):.1f} processes
were at work on the machine (its load over a minute, which a run before raises). Joules on both sides: {counted[0]["actual"]["meter"]}."""


def _count(counted: list[dict[str, Any]], key: str) -> tuple[str, str]:
    """(how many runs were foretold, whether these are as many as they are to be)."""
    near = [abs(ratio - 1) <= WITHIN for f in counted if (ratio := _ratio(f, key)) is not None]
    if not near:
        return cells.NOT_RUN, cells.NOT_RUN
    return f"{sum(near)} of {len(near)}", cells.verdict(sum(near) / len(near), least=OFTEN) if len(counted) == len(WORK) else "not all were run"


def _ratio(found: dict[str, Any], key: str) -> float | None:
    expected, actual = found["expected"].get(key), found["actual"].get(key)
    return expected / actual if expected is not None and actual else None


def _row(work: tuple[Any, ...], found: dict[str, Any] | None) -> list[str]:
    backbone, task, rows, epochs, recipe = work
    older = " (older)" if found is not None and _older(found) else ""
    figures = [cells.NOT_RUN if found is None else _pair(found, key) for key in FIGURES]
    return [backbone + older, task, str(rows), str(epochs), f"`{recipe}`".replace("|", "\\|"), *figures]


def _pair(found: dict[str, Any], key: str) -> str:
    ratio = _ratio(found, key)
    if ratio is None:
        return "-"
    expected, actual = (f"{v:,.3g}" if v < 1000 else f"{v:,.0f}" for v in (found["expected"][key], found["actual"][key]))
    return f"{expected} / {actual} ({ratio:.2f})"


if __name__ == "__main__":
    Table("plan", every_cell, page).main()
