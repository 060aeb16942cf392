"""The same work in paretune, peft, adapters, transformers' Trainer and a plain loop, side by side.

    make bench          measures every cell anew but the long one, about 25 minutes on 2 cores; or
    python -m benchmarks.contest [--afresh] [--hours 1] [--only mrpc]
    python -m benchmarks.contest --long --only all      the long one: LoRA on all sentences of SST-2, about twenty minutes

A cell is a subject and a method. Its contestants work in turn (A B C ..., then ... C B A, and so on; every round has its own seed), each
in a process of its own that keeps its library loaded; only one works at a time. All get the same encodings, batch, epochs and rate, and
the same parameters learn. Time is from the loaded model until it is trained, memory from before the model is loaded. Needs the folder of
data sets (`benchmarks/data.py`) and, for the `adapters` library, `make .venv-oracles/ready`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import paretune as pt
from benchmarks import adaptation, cells, data, peers
from benchmarks.cells import Cell, Table
from paretune import backbones, recipe, surgery, tasks, training
from paretune.meters import system
from paretune.methods.modifiers.schedule import Schedule
from paretune.pareto import intervals
from paretune.step import probe, short_attention
from paretune.tasks import Task

PROTOCOL = 2  # of the files: 1 timed the loading of models, too, on other sizes; the page leaves such files out
ROUNDS, LONGEST, TEST_CHARACTERS = 3, 256, 10_000
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
    "lora of a decoder": Method('lora(r=8, targets="query value")', 1e-3, ("LoraConfig", LORA | {"target_modules": ["q_proj", "v_proj"]}),
                                ("LoRAConfig", {"r": 8, "alpha": 16})),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and its data."""

    task: str  # of `benchmarks.data`; empty are blocks of the books, for a decoder
    rows: int | None  # to train on, of a decoder about so many; None is all
    batch: int
    methods: tuple[str, ...]
    length: int = 0  # tokens of a decoder's blocks; 0 is MiniLM
    test: int | None = 200  # texts; None is all
    long: bool = False  # run only where it is asked for


ON_MINILM = ("lora", "adapter", "ia3", "bitfit", "full", "head")
SUBJECTS = {
    "SST-2": Subject("sst2", 288, 32, (*ON_MINILM, "top layers")),
    "MRPC": Subject("mrpc", 128, 32, ON_MINILM),
    "decoder, 256 tokens": Subject("", 16, 8, ("lora of a decoder", "full"), 256),
    "decoder, 1,024 tokens": Subject("", 4, 2, ("lora of a decoder", "full"), 1024),
    "all of SST-2": Subject("sst2", None, 32, ("lora",), test=None, long=True),
}
PAGE, SERVE = "benchmarks", "--serve"  # docs/benchmarks.md; the option of the process that does paretune's jobs


def every_cell() -> Iterator[Cell]:
    """Every subject by each of its methods."""
    for name, subject in SUBJECTS.items():
        for method in subject.methods:
            yield Cell(_cell(name, method), functools.partial(one, name, method), subject.long)


def _cell(subject: str, method: str) -> str:
    return f"{method}, {subject}"


def one(subject: str, method: str) -> dict[str, Any]:
    """The rounds of a cell: figures by contestant; `score` is how many times the CPU time of paretune the documented way needs."""
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
    return {"score": statistics.median(r[DOCUMENTED]["cpu_s"] / r[OURS]["cpu_s"] for r in rounds), "protocol": PROTOCOL, "pace": pace, "rounds": rounds,
            "train": len(train), "test": len(test), "tokens": sum(len(e["input_ids"]) for e in train), "environment": system.describe()}  # fmt: skip


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
        assert about.rows
        return folder, data.books(tokens=about.rows * about.length, test=TEST_CHARACTERS)
    return str(backbones.find("minilm").source), data.task(about.task, train=about.rows, validation=0, test=about.test)


def _figures(task: Task, found: dict[str, Any], *, visited: int) -> dict[str, Any]:
    """What is kept of an answer; the others' are logits, or a decoder's mean losses."""
    kept = {"examples_per_s": visited / found["train_s"], "cpu_s": found["train_cpu_s"], "whole_s": found["whole_s"], "whole_cpu_s": found["whole_cpu_s"],
            "added_mb": found["added_mb"], "peak_mb": found["train_peak_mb"], "trainable_parameters": found["trainable_parameters"]}  # fmt: skip
    kept |= {k: found[k] for k in ("score", "right", "pace", "versions") if k in found}
    answers = found.get("predictions")
    if answers is None:
        return kept
    return kept | (_marks(task, torch.tensor(answers).softmax(-1).tolist()) if task.labels else {"score": math.exp(statistics.mean(answers))})


def _marks(task: Task, answers: list[Any]) -> dict[str, Any]:
    """The score on the test texts, and for each of them a 1 or a 0, where the score is their mean."""
    each = tasks.per_example(task, answers, rows=task.test) if task.labels else None
    return {"score": tasks.score(task, answers, rows=task.test), "right": "".join(f"{x:.0f}" for x in each or ())}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What paretune makes of a job, as `pt.fit` does it by default, and as a process would that trains for the first time."""
    backbone, task = _subject(job["subject"], job["source"])
    (phase,) = recipe.parse(job["config"]).phases
    torch.manual_seed(job["seed"])
    probe.forget()
    with peers.Window() as spent:
        model = pt.load(backbone, task)
        surgery.attach(model, list(phase), name="method", on_top=True)
        begun = spent.so_far()
        schedule = Schedule(lr=job["lr"], epochs=float(job["epochs"]), batch=job["batch"])
        fitted = training.fit(model, task, schedule=schedule, settings=training.Settings(seed=job["seed"]))
    pace = {"dtype": fitted.dtype, "attention": "eager" if fitted.attention == short_attention.NAME else fitted.attention}  # the others have not ours
    taken = {"train_s": spent.figures["whole_s"] - begun[0], "train_cpu_s": spent.figures["whole_cpu_s"] - begun[1]}
    return {**_marks(task, training.predict(model, task, rows=task.test)), **spent.figures, **taken, "pace": pace,
            "trainable_parameters": surgery.count(model)[0]}  # fmt: skip


def page(table: Table) -> str:
    """docs/benchmarks.md, from the files."""
    found = {(s, m): _today(table.found(_cell(s, m))) for s, subject in SUBJECTS.items() for m in subject.methods}

    def shown(field: str, digits: int = 0, times: float = 1.0) -> str:
        return _table(found, lambda f: [_spread([times * r[name][field] for r in f["rounds"] if name in r], digits) for name in (OURS, *_OTHERS)])

    return f"""# The same work in paretune and in others

{_about(list(filter(None, found.values())))}

"{AGAIN}" is the A/A control. "{DOCUMENTED}" is the library's Trainer as its documentation shows it (peft for LoRA and (IA)3, `adapters` for the bottleneck
adapter, transformers for the rest), "{GIVEN}" the same with the number format and attention kernel that paretune chose and with batches of like
length, "{ADAPTERS}" the `adapters` library with those, "{PLAIN}" a loop written by hand, with those, too. paretune times formats and kernels anew in every
round, as a fresh process does, and that is counted in; so is reading its texts into tokens, which the others are given. Figures are medians of {ROUNDS} rounds, with
the lowest and the highest. One cell is long and not of `make bench`: LoRA on all sentences of SST-2; a short cell has a few steps, which says less of the score.

## Targets

{_targets(found)}

The quotient of examples per second, or of the memory added, in the same round: the median, with the lowest and the highest, and whether the median meets the
target. Where peft has not the method there is no figure. "Five epochs" is against the way documented, which computes the whole model in each.

## Examples per second, by the wall clock

{shown("examples_per_s")}

## CPU seconds

{shown("cpu_s", 1)}

## Memory

The peak that training adds to what the process held with its libraries loaded and no model, MB:

{shown("added_mb")}

The process's peak itself, MB:

{shown("peak_mb")}

## Scores

Accuracy in percent, of the decoder, whose weights were random, perplexity.

{_table(found, _scores)}

The long cell, over {ROUNDS} seeds and the test texts, with 95 % intervals (bootstrap); the difference is paired text by text, and "within noise" if its interval
has 0 in it:

{_equal(found)}

Made by `make bench` (`python -m benchmarks.contest`, and with `--long --only all` for the long cell) from the files in `benchmarks/results/{PAGE}/`; `--table`
makes it again from them.
"""


Found = dict[tuple[str, str], dict[str, Any] | None]  # (subject, method) -> the file
_OTHERS = (AGAIN, DOCUMENTED, GIVEN, ADAPTERS, PLAIN)
TARGETS = (  # title, field, of whom, at least or at most, of which methods
    ("peft as documented: examples/s, at least 5.5", "examples_per_s", DOCUMENTED, {"least": 5.5}, lambda m: METHODS[m].peft),
    ("peft given our format: examples/s, at least 2.5", "examples_per_s", GIVEN, {"least": 2.5}, lambda m: METHODS[m].peft),
    ("plain loop: examples/s, at least 1", "examples_per_s", PLAIN, {"least": 1.0}, lambda m: True),
    ("peft as documented: memory, at most 0.7", "added_mb", DOCUMENTED, {"most": 0.7}, lambda m: METHODS[m].peft),
    ("peft given our format: memory, at most 0.7", "added_mb", GIVEN, {"most": 0.7}, lambda m: METHODS[m].peft),
    ("five epochs: examples/s, at least 10", "examples_per_s", DOCUMENTED, {"least": 10.0}, lambda m: METHODS[m].epochs == 5),
)


def _today(cell: dict[str, Any] | None) -> dict[str, Any] | None:
    """A cell's file, unless it is of an older protocol."""
    return cell if cell and cell.get("protocol") == PROTOCOL else None


def _about(known: list[dict[str, Any]]) -> str:
    if not known:
        return f"By today's protocol no cell was run yet: {cells.NOT_RUN}."
    machine = known[0]["environment"]
    versions = {k: v for f in known for r in f["rounds"] for who in r.values() for k, v in who.get("versions", {}).items() if k != "transformers"}
    several = sorted({who["versions"]["transformers"] for f in known for r in f["rounds"] for who in r.values() if "versions" in who})
    trained = {name: next((f["train"] for f in known if f["cell"].endswith(f", {name}")), None) for name in SUBJECTS}
    sizes = "; ".join(f"{name}: {n:,} examples in batches of {SUBJECTS[name].batch}" for name, n in trained.items() if n)
    longer = ", ".join(f"{m.epochs} of `{m.recipe}`" for m in METHODS.values() if m.epochs > 1)
    return f"""MiniLM on two tasks, and a Llama-shaped decoder of 6 layers of width 768 on blocks of the books. {sizes}. One epoch, but {longer}.
{machine.get("cpu")}, {machine["threads"]} threads; {", ".join(f"{k} {v}" for k, v in versions.items())}, transformers {" and ".join(several)}
(the older one for `adapters`); commit {cells.when(known)}."""


def _table(found: Found, shown: Callable[[dict[str, Any]], list[str]]) -> str:
    rows = [[_name(*key), *(shown(f) if f else [cells.NOT_RUN] * (1 + len(_OTHERS)))] for key, f in found.items()]
    return cells.markdown(["method", OURS, *_OTHERS], rows)


def _name(subject: str, method: str) -> str:
    return f"{method.removesuffix(' of a decoder')}, {subject}"


def _spread(values: list[float], digits: int) -> str:
    """The median with the lowest and the highest; figures below 10 with two digits at least."""
    digits = max(digits, 2) if values and statistics.median(values) < 10 else digits
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})" if values else "-"


def sentence(table: Table) -> str:
    """What README.md says of the long cell and of `head`: medians of the quotients."""

    def times(subject: str, method: str, *, field: str, other: str) -> float:
        cell = table.found(_cell(subject, method))
        assert cell
        return statistics.median(r[OURS][field] / r[other][field] for r in cell["rounds"])

    speed, memory = ([times("all of SST-2", "lora", field=field, other=other) for other in (DOCUMENTED, GIVEN)] for field in ("examples_per_s", "added_mb"))
    heads = [times(subject, "head", field="examples_per_s", other=DOCUMENTED) for subject in ("SST-2", "MRPC")]
    return (f"LoRA on all sentences of SST-2 trained {speed[0]:.1f} times as fast as with peft as its documentation shows it, and {speed[1]:.1f} times as fast as with "
            f"peft given our number format and batches; it added {memory[0]:.2f} and {memory[1]:.2f} of their memory. `head`, whose frozen layers are computed once, "
            f"trained five epochs {min(heads):.0f} to {max(heads):.0f} times as fast as with transformers' Trainer")  # fmt: skip


def _scores(cell: dict[str, Any]) -> list[str]:
    values = [[r[name]["score"] for r in cell["rounds"] if name in r] for name in (OURS, *_OTHERS)]
    return [_spread([100 * v for v in each], 1) if max(each, default=0.0) <= 1 else _spread(each, 0) for each in values]


def _targets(found: Found) -> str:
    """A row for each cell, a column for each target, and how many cells meet it."""
    met: list[list[str]] = [[] for _ in TARGETS]
    rows = []
    for (subject, method), cell in found.items():
        row = [_name(subject, method)]
        for verdicts, (_, field, other, bound, has) in zip(met, TARGETS, strict=True):
            if not has(method):
                row.append("-")
            elif cell is None:
                row.append(cells.NOT_RUN)
            else:
                ratios = [r[OURS][field] / r[other][field] for r in cell["rounds"]]
                verdicts.append(cells.verdict(statistics.median(ratios), **bound))
                row.append(f"{_spread(ratios, 2)}: {verdicts[-1]}")
        rows.append(row)
    rows.append(["met", *(f"{verdicts.count('met')} of {len(verdicts)}" for verdicts in met)])
    return cells.markdown(["paretune against", *(title for title, *_ in TARGETS)], rows)


def _equal(found: Found) -> str:
    """The scores of the long cells, and how far the others are from paretune."""
    rows = []
    for (subject, method), cell in ((key, f) for key, f in found.items() if SUBJECTS[key[0]].long):
        for name in [who for who in (OURS, *_OTHERS) if who in cell["rounds"][0]] if cell else ():
            results, ours = ([[float(c) for c in r[who]["right"]] for r in cell["rounds"]] for who in (name, OURS))
            low, high = intervals.bootstrap(results)
            gap, least, most = intervals.difference(ours, results)
            apart = "-" if name == OURS else f"{100 * gap:+.1f} ({100 * least:+.1f} to {100 * most:+.1f}), {'within noise' if least <= 0 <= most else 'told apart'}"
            rows.append([f"{_name(subject, method)}, {name}", f"{100 * statistics.mean(map(statistics.mean, results)):.1f} ({100 * low:.1f} to {100 * high:.1f})", apart])
        rows += [] if cell else [[_name(subject, method), cells.NOT_RUN, cells.NOT_RUN]]
    return cells.markdown(["who", "score", "paretune less this"], rows)


TABLE = Table(PAGE, every_cell, page)

if __name__ == "__main__":
    peers.serve(work) if SERVE in sys.argv else TABLE.main()
