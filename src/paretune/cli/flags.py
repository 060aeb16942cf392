"""Every flag of the command line, once, and the groups that verbs share."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click import Argument, Choice, FloatRange, IntRange, Option

from paretune.cli.verbs import Verb
from paretune.errors import DataError, unknown
from paretune.options import Compute
from paretune.units import read

if TYPE_CHECKING:
    from paretune.tasks import Task

_DIRECTORY, _ABOVE_0, _FROM_1 = click.Path(file_okay=False), FloatRange(0, min_open=True), IntRange(1)


def _megabytes(size: str) -> float:
    """A size such as 2GB, in MB (10^6 bytes)."""
    return read(size, "bytes") / 1e6


FLAGS: dict[str, click.Parameter] = {
    param.name: param  # type: ignore[misc]
    for param in (
        Argument(["recipe"], help="Phases of methods, as in 'lora(r=8) | merge | int8'."),
        Argument(["data"], required=False, help="A csv, tsv, jsonl or parquet file, a folder, or a hub id."),
        Option(["--task"], metavar="NAME", help="A built-in task in place of DATA: stdlib-topics, listops, listops-short or pathfinder-32."),
        Option(["--text"], metavar="COLUMN", help="The input column; a,b for a pair of texts."),
        Option(["--label"], metavar="COLUMN", help="The answer's column; without one a language model is trained."),
        Option(["--kind"], metavar="KIND", help="The kind of task, where the values leave it open: classification, regression, tokens, ..."),
        Option(["--metric"], metavar="NAME", help="The score; else the kind's own, such as accuracy."),
        Option(["--validation"], metavar="FILE", help="Validation rows; else 15 % of the data, by content hash."),
        Option(["--test"], metavar="FILE", help="Test rows; else 15 % of the data, by content hash."),
        Option(["--split"], metavar="COLUMN", help="The column that says train, validation or test."),
        Option(["--backbone"], default="minilm", show_default=True, metavar="NAME", help="minilm, a folder of a saved model, or a hub id."),
        Option(["--out"], default="out", show_default=True, type=_DIRECTORY, metavar="FOLDER", help="The results folder."),
        Option(["--resume"], is_flag=True, help="Go on with work begun in the results folder; what is finished is not done again."),
        Option(["--epochs"], type=_ABOVE_0, metavar="N", help="Passes over the training rows, for phases without a schedule of their own."),
        Option(["--lr"], type=_ABOVE_0, metavar="RATE", help="Peak learning rate; else each method's own."),
        Option(["--batch"], type=_FROM_1, metavar="N", help="Examples per step."),
        Option(["--dtype"], type=Choice(["auto", "fp32", "bf16"]), help="Number format of training; auto takes what is faster here."),
        Option(["--max-train"], type=_FROM_1, metavar="N", help="Train on at most N rows, chosen by content hash."),
        Option(["--device"], default="cpu", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1, mps, ..."),
        Option(["--threads"], type=_FROM_1, metavar="N", help="Processor threads; else torch's own number."),
        Option(["--max-memory", "max_memory_mb"], type=_megabytes, metavar="SIZE", help="Cut training steps, and recompute activations, to stay below: 2GB."),
        Option(["--shard"], is_flag=True, help="Of several processes (torchrun), each keeps a part of the weights: FSDP."),
        Option(["--seed"], type=IntRange(0), default=0, show_default=True, metavar="N", help="Of the head, the adapters and the order of rows."),
        Option(["--price"], metavar="PRICE", help="Of a kilowatt-hour, as in 0.30EUR."),
        Option(["--protocol"], type=Choice(["quick", "full"]), default="quick", show_default=True, help="How long inference is measured: seconds or minutes."),
        Option(["--power"], metavar="WATTS", help="Power for an energy estimate where nothing measures: idle=2W,busy=6W."),
        Option(["--power-profile", "profile"], metavar="NAME|FILE", help="The same from a profile: laptop, phone, or a JSON file of your own."),
        Option(["--log", "meter_log"], metavar="FILE", help="CSV log of an external meter; it may be copied in after the last window."),
        Option(["--markers"], is_flag=True, help="Draw a pattern into the log to align its clock with this one."),
        Option(["--lengths"], metavar="LENGTHS", help="Say what answers of these lengths take, in tokens: 'prompt=10..200, output=1..50'."),
        Option(["--recipe", "recipes"], multiple=True, metavar="RECIPE", help="A recipe to run; may be repeated. Without any, a set from head to full."),
        Option(["--seeds"], type=_FROM_1, default=1, show_default=True, metavar="N", help="Run seeds 0 to N-1 of every recipe."),
        Option(["--space"], default="auto", show_default=True, metavar="SPACE", help="A recipe with ranges, 'lora(r=[2..64 log]) | {none, int8}', or auto, autopeft."),
        Option(["--budget"], metavar="BUDGET", help='What the whole search may spend: "train_s=3600, train_energy_j=20000".'),
        Option(["--trials"], type=_FROM_1, metavar="N", help="Try at most N recipes."),
        Option(["--confirm"], type=IntRange(0), default=2, show_default=True, metavar="N", help="Train the chosen recipes again with N fresh seeds."),
        Option(["--storage"], metavar="URL", help="sqlite:///file.db or postgresql://...; else a file in the results folder."),
        Option(["--on"], type=Choice(["ray"]), help="Where trials run: as tasks of a Ray cluster, of --threads CPUs each; else in this process."),
        Option(["--from", "earlier"], type=click.Path(file_okay=False, exists=True), metavar="OUT", help="Try first what the search in OUT found."),
        Argument(["storage_url"], metavar="URL", help="Where a search keeps its study: sqlite:///out/study.db, postgresql://..."),
        Option(["--study"], metavar="NAME", help="Which search, where URL holds several."),
        Option(["--data", "data_here"], metavar="FILE", help="The data on this machine, where it lies elsewhere than the search says."),
        Option(["--backbone", "backbone_here"], metavar="NAME", help="The backbone on this machine, likewise."),
        Option(["--time-budget"], metavar="TIME", help="Cut the training rows to what this machine does in so long: 10min, 2h."),
        Option(["--battery"], metavar="ENERGY", help="Count inferences on a charge: 15Wh, or 3000mAh@3.7V."),
        Option(["--rate"], metavar="RATE", help="Inferences a second on battery, 1/s; else one after the other. Needs the idle power."),
        Option(["--under"], multiple=True, metavar="BUDGET", help='"latency_p50_ms=20, stored_mb=30"; may be repeated.'),
        Option(["--against"], type=_DIRECTORY, metavar="OTHER", help="Another results folder of the task, to compare with."),
        Option(["--times"], type=FloatRange(1, min_open=True), default=2.0, show_default=True, metavar="X", help="So many times the largest compute."),
        Argument(["folder"], metavar="RUN", help="The folder of a finished run."),
        Argument(["results"], metavar="OUT", type=click.Path(file_okay=False, exists=True), help="The results folder."),
        Argument(["rows"], metavar="NEW", help="A csv, tsv, jsonl, ... file with the input columns."),
        Option(["--out", "answers"], type=click.Path(dir_okay=False), metavar="FILE", help="A .csv or .jsonl file; else CSV on stdout."),
        Option(["--exact"], is_flag=True, help="Answer all rows as the model was saved, whatever is faster."),
        Option(["--to"], type=Choice(["hf", "peft", "onnx", "bitsandbytes"]), default="hf", show_default=True, help="A folder of that kind, or a graph."),
        Option(["--keep-adapters"], is_flag=True, help="Leave adapters apart that an hf folder or a graph would have merged."),
        Option(["--out", "target"], type=_DIRECTORY, required=True, metavar="FOLDER", help="A new or empty folder."),
        Argument(["name"], required=False, help="A method."),
        Option(["--json", "as_json"], is_flag=True, help="Machine readable."),
        Argument(["command"], metavar="-- COMMAND", nargs=-1, required=True, help="A program and its arguments."),
        Option(["--out", "marked"], default="marked.json", show_default=True, type=click.Path(dir_okay=False), metavar="FILE", help="Where the times are kept."),
        Option(["--inferences"], type=_FROM_1, metavar="N", help="How many inferences the command does, to divide by."),
        Argument(["subject"], metavar="SUBJECT", type=Choice(["attention"]), help="What to look at: attention."),
        Option(["--examples"], type=_FROM_1, default=16, show_default=True, metavar="N", help="Read N training rows, evenly drawn."),
        Argument(["model"], metavar="BACKBONE", help="minilm, a folder with a config.json, or a hub id."),
        Argument(["spec"], metavar="TARGETS", help="Places (attention, ffn, 'query value', ...) or module paths."),
    )
}


def verb(example: str) -> Callable[[Callable[..., None]], Verb]:
    """Makes a function a verb; the example stands in its help."""
    return lambda function: Verb(function, FLAGS, example=example)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the examples come from."""

    data: str | None
    task: str | None
    text: str | None
    label: str | None
    kind: str | None
    metric: str | None
    validation: str | None
    test: str | None
    split: str | None

    def check(self) -> None:
        """Refuses what can be refused before anything heavy is imported."""
        if bool(self.data) == bool(self.task):
            raise click.UsageError("name the data: either a file (or folder, or hub id), or --task stdlib-topics" + (", not both" if self.data else ""))

    def open(self) -> Task:
        """The task, read and checked."""
        from paretune import tasks
        from paretune.tasks.built_in import TASKS

        if self.task and self.task not in TASKS:
            raise DataError(unknown("task", self.task, allowed=TASKS))
        stated = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("data", "task")}
        return tasks.task(self.data or self.task or "", **stated)


@dataclasses.dataclass(frozen=True)
class Place:
    """What to start from, and where results go."""

    backbone: str
    out: str
    resume: bool

    def record_command(self) -> None:
        """Appends this command line to `command.txt` in the results folder."""
        from paretune import launch, store

        if launch.number():
            return
        path = Path(self.out) / "command.txt"
        with store.writing(path), path.open("a", encoding="utf-8") as file:
            file.write(command_line() + "\n")


@dataclasses.dataclass(frozen=True)
class Search:
    """What a frontier runs."""

    recipes: tuple[str, ...]
    seeds: int
    time_budget: str | None

    @property
    def time_budget_s(self) -> float | None:
        """The time budget in seconds."""
        return read(self.time_budget, "time") if self.time_budget else None


@dataclasses.dataclass(frozen=True)
class Budgets:
    """What the frontier is asked."""

    battery: str | None = None
    rate: str | None = None
    under: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuses what cannot be read.

        Raises:
            BudgetError: for a battery, a rate or a budget.
        """
        from paretune.meters.battery import Battery
        from paretune.pareto import budgets

        if self.battery:
            Battery.parse(self.battery)
        if self.rate:
            read(self.rate, "rate")
        for text in self.under:
            budgets.parse(text)


def check_device(compute: Compute) -> None:
    """Refuses a device that torch does not know or this machine does not have."""
    import torch

    try:
        kind = torch.device(compute.device).type
    except RuntimeError:
        raise click.UsageError(f"--device {compute.device} is no device of torch; use cpu, or cuda, cuda:1, mps where there is one") from None
    there = getattr(torch, kind, None)
    if not (there and there.is_available()):
        raise click.UsageError(f"--device {compute.device}: this machine has none that torch can use; `paretune doctor` shows what it has")


def command_line() -> str:
    """What the user typed, quoted for a POSIX shell."""
    return shlex.join(["paretune", *click.get_current_context().obj])
