"""The same work in paretune, peft, adapters, transformers' Trainer and a plain loop, side by side.

    make bench          measures every cell anew, three quarters of an hour; or
    python -m benchmarks.contest [--afresh] [--hours 1] [--only mrpc]

A cell is a subject and a method. Its contestants work in turn (A B C ..., then ... C B A, and so on), each in a process of its own
that keeps its library loaded; only one works at a time. All get the same encodings, batch, epochs and rate, and the same
parameters learn. Time and memory are from before the model is loaded until it is trained. Needs the folder of data sets
(`benchmarks/data.py`) and, for the `adapters` library, `make .venv-oracles/ready`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import paretune as pt
from benchmarks import adaptation, cells, data, peers
from benchmarks.cells import Cell, Table
from paretune import backbones, recipe, surgery, tasks, training
from paretune.meters import system
from paretune.methods.modifiers.schedule import Schedule
from paretune.step import short_attention
from paretune.tasks import Task

ROUNDS, LONGEST = 3, 256
OURS, AGAIN, DOCUMENTED, GIVEN, ADAPTERS, PLAIN = "paretune", "paretune again", "as documented", "given our format", "adapters", "plain loop"


@dataclasses.dataclass(frozen=True)
class Method:
    """What learns: the recipe, and the same in the other libraries (a configuration's name and arguments)."""

    recipe: str
    rate: float
    peft: tuple[str, dict[str, Any]] | None = None
    adapters: tuple[str, dict[str, Any]] | None = None
    itself: str = ""  # what learns without any adapter
    epochs: int = 1


LORA = {"r": 8, "lora_alpha": 16}
METHODS = {
    "lora": Method('lora(r=8, targets="query value")', 3e-3, ("LoraConfig", LORA | {"target_modules": ["query", "value"]}),
                   ("LoRAConfig", {"r": 8, "alpha": 16})),
    "adapter": Method('adapter(bottleneck=24, form="pfeiffer")', 3e-3, None, ("SeqBnConfig", {"reduction_factor": 16})),
    "ia3": Method("ia3", 1e-2, ("IA3Config", {}), ("IA3Config", {})),
    "bitfit": Method("bitfit", 3e-3, itself="bitfit"),
    "full": Method("full", 1e-4, itself="full"),
    "head": Method("head", 3e-3, itself="head", epochs=5),
    "top layers": Method("top_layers(k=2)", 1e-4, itself="top_layers", epochs=5),
    "lora of a decoder": Method('lora(r=8, targets="query value")', 1e-3, ("LoraConfig", LORA | {"target_modules": ["q_proj", "v_proj"]})),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and its data."""

    rows: int
    batch: int
    methods: tuple[str, ...]
    length: int = 0  # tokens of a decoder's blocks; 0 is MiniLM


SUBJECTS = {
    "SST-2": Subject(640, 32, ("lora", "adapter", "ia3", "bitfit", "full", "head", "top layers")),
    "MRPC": Subject(320, 32, ("lora", "adapter", "full")),
    "decoder, 256 tokens": Subject(40, 8, ("lora of a decoder", "full"), 256),
    "decoder, 1,024 tokens": Subject(10, 2, ("lora of a decoder", "full"), 1024),
}
PAGE, SERVE = "benchmarks", "--serve"  # docs/benchmarks.md; the option of the process that does paretune's jobs


def every_cell() -> Iterator[Cell]:
    """Every subject by each of its methods."""
    for name, subject in SUBJECTS.items():
        for method in subject.methods:
            yield Cell(_cell(name, method), functools.partial(one, name, method))


def _cell(subject: str, method: str) -> str:
    return f"{method}, {subject}"


def one(subject: str, method: str) -> dict[str, Any]:
    """The rounds of a cell: figures by contestant; the score is how many times the CPU time of paretune the documented way needs."""
    about, how = SUBJECTS[subject], METHODS[method]
    rounds: list[dict[str, Any]] = []
    pace: dict[str, str] = {}  # as paretune chose it in the first round
    with tempfile.TemporaryDirectory() as folder:
        if about.length:
            data.decoder(Path(folder), length=about.length)
        source, task = _subject(subject, folder)
        train, test = (data.encoded(task, split, source=source, longest=about.length or LONGEST) for split in ("train", "test"))
        given = {"source": source, "outputs": len(task.labels) or None, "lr": how.rate, "epochs": how.epochs, "batch": about.batch}
        for turn in range(ROUNDS):
            found: dict[str, Any] = {}
            for name, who in list(_contestants(how).items())[:: 1 if turn % 2 == 0 else -1]:
                if name in (OURS, AGAIN):
                    job = {**who, **given, "seed": turn, "subject": subject}
                else:
                    job = {**who, **given, "seed": turn, "train": train, "test": test, "like_ours": None if name == DOCUMENTED else pace}
                found[name] = _figures(task, _asked(who["library"], job), visited=len(train) * how.epochs)
                pace = pace or found[name].get("pace", {})
            rounds.append(found)
    return {"score": statistics.median(r[DOCUMENTED]["cpu_s"] / r[OURS]["cpu_s"] for r in rounds), "pace": pace, "rounds": rounds,
            "train": len(train), "tokens": sum(len(e["input_ids"]) for e in train), "environment": system.describe()}  # fmt: skip


def _contestants(how: Method) -> dict[str, dict[str, Any]]:
    """Who can do the method, and what is asked of each; paretune is first, since others are given what it chose."""
    trainer = {"library": "peft", "config": how.peft[0], "arguments": how.peft[1]} if how.peft else {"library": "transformers", "config": how.itself}
    plain = {**trainer, "library": "plain"} if how.peft or how.itself else {"library": "plain", "config": "bottleneck"}
    ours = {"library": "paretune", "config": how.recipe}
    adapters = {"library": "adapters", "config": how.adapters[0], "arguments": how.adapters[1]} if how.adapters else None
    first = trainer if how.peft or how.itself else adapters  # who documents the method
    every = {OURS: ours, DOCUMENTED: first, GIVEN: first, ADAPTERS: adapters if adapters is not first else None, PLAIN: plain, AGAIN: ours}
    return {name: who for name, who in every.items() if who}


def _asked(library: str, job: dict[str, Any]) -> dict[str, Any]:
    """A job's answer; a process that is new does its first job twice, since libraries load some of their parts at work."""
    if library == "paretune":
        command: tuple[str, ...] = (sys.executable, "-m", "benchmarks.contest", SERVE)
    else:
        command = (adaptation.INTERPRETERS.get(library, sys.executable), peers.__file__)
    if command not in _WORKERS:
        _WORKERS[command] = peers.Worker(*command)
        _WORKERS[command].ask(job)
    return _WORKERS[command].ask(job)


_WORKERS: dict[tuple[str, ...], peers.Worker] = {}  # they live as long as this process


def _subject(name: str, folder: str) -> tuple[str, Task]:
    """(backbone, task); a decoder is in the folder."""
    about = SUBJECTS[name]
    if about.length:
        return folder, data.books(tokens=about.rows * about.length)
    return str(backbones.find("minilm").source), data.task(name.lower().replace("-", ""), train=about.rows, validation=0, test=400)


def _figures(task: Task, found: dict[str, Any], *, visited: int) -> dict[str, Any]:
    """What is kept of an answer."""
    kept = {"examples_per_s": visited / found["whole_s"], "cpu_s": found["whole_cpu_s"], "added_mb": found["added_mb"], "peak_mb": found["train_peak_mb"]}
    answers = found.get("predictions")
    if answers is None:
        return kept | {"score": found["score"], "pace": found["pace"]}
    if task.labels:
        return kept | {"score": tasks.score(task, torch.tensor(answers).softmax(-1).tolist(), rows=task.test), "versions": found["versions"]}
    return kept | {"score": math.exp(statistics.mean(answers)), "versions": found["versions"]}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What paretune makes of a job, as `pt.fit` does it by default."""
    backbone, task = _subject(job["subject"], job["source"])
    (phase,) = recipe.parse(job["config"]).phases
    torch.manual_seed(job["seed"])
    with peers.Window() as spent:
        model = pt.load(backbone, task)
        surgery.attach(model, list(phase), name="method", on_top=True)
        schedule = Schedule(lr=job["lr"], epochs=float(job["epochs"]), batch=job["batch"])
        fitted = training.fit(model, task, schedule=schedule, settings=training.Settings(seed=job["seed"]))
    answers = training.predict(model, task, rows=task.test)
    pace = {"dtype": fitted.dtype, "attention": "eager" if fitted.attention == short_attention.NAME else fitted.attention}  # the others have not ours
    return {**spent.figures, "score": tasks.score(task, answers, rows=task.test), "pace": pace}


def page(table: Table) -> str:
    """docs/benchmarks.md, from the files."""
    found = {(s, m): table.found(_cell(s, m)) for s, subject in SUBJECTS.items() for m in subject.methods}
    some = next(filter(None, found.values()), None)
    return f"""# The same work in paretune and in others

{_about(some) if some else cells.NOT_RUN}

CPU time of the others over that of paretune in the same round (above 1, paretune needs less): the median of {ROUNDS} rounds, with the lowest and the highest.
"{AGAIN}" is the A/A control. "{DOCUMENTED}" is the library's Trainer as its documentation shows it (peft for LoRA and (IA)3, `adapters` for the bottleneck
adapter, transformers for the rest), "{GIVEN}" the same with the number format and attention kernel that paretune chose and with batches of like
length, "{ADAPTERS}" the `adapters` library with those, "{PLAIN}" a loop written by hand, with those, too. In paretune's first round the timing of formats and
kernels is counted in, which its process then remembers (in the very first cell before its rounds): the lowest figures are of that round.

{cells.markdown(["method", "examples/s", *_OTHERS], _rows(found, _ratios))}

Peak memory that training adds to what the process held with its libraries loaded, MB; medians.

{cells.markdown(["method", OURS, *_OTHERS], _rows(found, _memory))}

Scores: accuracy in percent on 400 test texts, of the decoder, whose weights were random, perplexity; medians. After 20 steps chance in the order of the texts
makes many points of difference: [methods by tasks](adaptation.md) has the scores of longer trainings.

{cells.markdown(["method", OURS, *_OTHERS], _rows(found, _scores))}

Made by `make bench` (`python -m benchmarks.contest`) from the files in `benchmarks/results/{PAGE}/`; `--table` makes it again from them.
"""


_OTHERS = (AGAIN, DOCUMENTED, GIVEN, ADAPTERS, PLAIN)


def _about(some: dict[str, Any]) -> str:
    machine = some["environment"]
    versions = {k: v for r in some["rounds"] for f in r.values() for k, v in f.get("versions", {}).items()}
    sizes = "; ".join(f"{name}: {s.rows} examples in batches of {s.batch}" for name, s in SUBJECTS.items())
    longer = ", ".join(f"{m.epochs} of `{m.recipe}`" for m in METHODS.values() if m.epochs > 1)
    return f"""MiniLM on two tasks, and a Llama-shaped decoder of 6 layers of width 768 on blocks of the books. {sizes}. One epoch, but {longer}. Loading the model is
counted in. {machine.get("cpu")}, {machine["threads"]} threads; {", ".join(f"{k} {v}" for k, v in versions.items())}; commit {some["commit"]}, {some["date"]}."""


def _rows(found: dict[tuple[str, str], dict[str, Any] | None], shown: Any) -> list[list[str]]:
    return [[f"{m.removesuffix(' of a decoder')}, {s}", *(shown(f) if f else [cells.NOT_RUN] * (1 + len(_OTHERS)))] for (s, m), f in found.items()]


def _median(cell: dict[str, Any], name: str, field: str) -> float | None:
    return statistics.median(r[name][field] for r in cell["rounds"]) if name in cell["rounds"][0] else None


def _ratios(cell: dict[str, Any]) -> list[str]:
    shown = [f"{_median(cell, OURS, 'examples_per_s'):,.0f}"]
    for name in _OTHERS:
        ratios = sorted(r[name]["cpu_s"] / r[OURS]["cpu_s"] for r in cell["rounds"] if name in r)
        shown.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else "-")
    return shown


def _memory(cell: dict[str, Any]) -> list[str]:
    return ["-" if (mb := _median(cell, name, "added_mb")) is None else f"{mb:,.0f}" for name in (OURS, *_OTHERS)]


def _scores(cell: dict[str, Any]) -> list[str]:
    found = [_median(cell, name, "score") for name in (OURS, *_OTHERS)]
    return ["-" if score is None else f"{100 * score:.1f}" if score < 1 else f"{score:,.0f}" for score in found]


TABLE = Table(PAGE, every_cell, page)

if __name__ == "__main__":
    peers.serve(work) if SERVE in sys.argv else TABLE.main()
