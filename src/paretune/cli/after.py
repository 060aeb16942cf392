"""The verbs for finished runs: measure, report, predict and export."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from paretune.cli import mark
from paretune.cli.flags import Budgets, check_device, verb
from paretune.cli.job import ANSWERS
from paretune.cli.verbs import say
from paretune.errors import DataError, StoreError
from paretune.options import Compute, Metering, Options
from paretune.units import show as value

if TYPE_CHECKING:
    from paretune.meters.idealized import Lengths
    from paretune.meters.reading import Reading
    from paretune.store import Run


@verb("paretune measure out/runs/0123456789abcdef --log meter.csv --markers --protocol full")
def measure(folder: str, metering: Metering, *, meter_log: str | None, markers: bool, lengths: str | None, compute: Compute) -> None:
    """Measures the inference of a finished RUN again; of a file that `paretune mark` wrote, says what its command drew.

    What is found replaces what its run.json said. With --lengths it says instead what answers of other lengths take, from a few that
    are measured once and kept in the run's folder.
    """
    if Path(folder).is_file():
        mark.tell(Path(folder), meter_log)
        return
    from paretune import inference, runs, runtime, store
    from paretune.cli import progress, show
    from paretune.meters.idealized import Lengths
    from paretune.meters.log import Log

    if markers and not meter_log:
        raise click.UsageError("--markers is for the log of an external meter; name it with --log FILE")
    mix = Lengths.parse(lengths) if lengths else None
    found = store.Run.read(folder)
    check_device(compute)
    log: Any = Log(meter_log, markers=markers) if meter_log else None
    options = Options(compute=compute, metering=dataclasses.replace(metering, log=log))
    runs.set_threads(options)
    with progress.Progress() as report:
        options = dataclasses.replace(options, report=report)
        if mix:
            _lengths(mix, runtime.predict(found, mix, options=options))
            return
        (measured,) = runs.measure([found], inference.tested(found), options=options, progress=lambda what, i, n: report({"measuring": what, "done": i, "of": n}))
    show.run(measured)


def _lengths(mix: Lengths, answer: dict[str, Reading]) -> None:
    """What a mean answer takes, by quantity, with the interval in which such a mean is measured."""
    span = " and ".join(f"{name} of {low:,}{f' to {high:,}' if high > low else ''} tokens" for name, (low, high) in dataclasses.asdict(mix).items())
    click.echo(f"a mean answer, {span}; foretold, with the 95 % interval in which it would be measured")
    for name, text in (("wall_s", "time, batch 1"), ("cpu_s", "CPU time"), ("energy_j", "energy"), ("net_energy_j", "energy above idle")):
        found = answer[name]
        interval = f" [{', '.join(value(end, found.unit) for end in found.interval)}]" if found.interval else f" ({found.reason})"
        click.echo(f"{text:<18} {value(found.value, found.unit)}{interval}")
    click.echo(f"{'how':<18} {answer['wall_s'].source}; joules {answer['energy_j'].source or 'not measured'}")


@verb("paretune report out/ --battery 15Wh --rate 1/s --under 'latency_p50_ms=20, stored_mb=30'\n"
      "paretune report out/ --against before/")
def report(results: str, budgets: Budgets, *, against: str | None) -> None:
    """Draws the frontier of a results folder OUT again. It reads the run files alone.

    Battery, rate and budgets are those that `paretune frontier` was asked, where none are stated. With another folder it compares
    the two frontiers, too, in against.html and against.png.
    """
    budgets.check()
    from paretune import store
    from paretune.cli import show

    out = Path(results)
    if (out / ANSWERS).is_file():  # what is not stated is as it was asked
        asked = store.read_json(out / ANSWERS)
        budgets = Budgets(budgets.battery or asked["battery"], budgets.rate or asked["rate"], budgets.under or tuple(asked["under"]))
    runs = _alike(out)
    show.front(runs, budgets, out=out)
    if against:
        show.against((runs, _alike(Path(against))), budgets, places=(out, Path(against)))


def _alike(out: Path) -> list[Run]:
    """The finished runs of a results folder that are of the latest one's data."""
    from paretune import store
    from paretune.searches import journal

    found, searched = store.finished(out), (out / journal.FILE).is_file()
    if not found:
        raise StoreError(f"{out} holds no finished runs; `paretune run` and `paretune frontier` write them")
    latest = max(found, key=_rows) if searched else found[-1]  # a search's runs on few rows are steps to those on all
    alike = [run for run in found if _task(run) == _task(latest)]
    if len(alike) < len(found):
        which = "fewer rows, steps of a search," if searched else "other data than the latest"
        say(f"{len(found) - len(alike)} of {len(found)} runs in {out} are of {which} and are left out")
    return alike


def _rows(run: Run) -> int:
    return run.record["task_definition"]["rows"]["train"]


def _task(run: Run) -> tuple[str, ...]:
    return tuple(run.record[key] for key in ("task", "task_fingerprint", "metric"))


@verb("paretune predict out/runs/0123456789abcdef new.csv --out predictions.csv")
def predict(folder: str, rows: str, *, answers: str | None, exact: bool) -> None:
    """Answers the rows of a new file with a finished RUN.

    The answers, labels and probabilities, are one line for each row, in order. Of many rows, the later ones are answered in another
    number format or by another runtime where that is faster and answers alike, which is then said.
    """
    if answers and Path(answers).suffix not in _WRITERS:
        raise click.UsageError(f"--out {answers}: predictions are written as {' or '.join(_WRITERS)}")
    from paretune import inference, store, tasks

    run = store.Run.read(folder)
    found = inference.stream(run, tasks.inputs(inference.task_of(run), rows), told=None if exact else say)
    if answers is None:
        _csv(found, sys.stdout)
        return
    with store.written_file(Path(answers)) as part, part.open("w", encoding="utf-8", newline="") as file:
        count = _WRITERS[Path(answers).suffix](found, file)
    say(f"{count:,} rows answered: {answers}")


def _csv(answers: Iterator[dict[str, Any]], file: IO[str]) -> int:
    first = next(answers, None)
    if first is None:
        raise DataError("there are no rows to answer")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(first)
    writer.writerow(first.values())
    count = 1
    for count, answer in enumerate(answers, start=2):
        if answer.keys() != first.keys():
            raise DataError(f"row {count} has the answers {', '.join(answer)}, and the first row {', '.join(first)}; write a .jsonl file")
        writer.writerow(answer.values())
    return count


def _jsonl(answers: Iterator[dict[str, Any]], file: IO[str]) -> int:
    count = 0
    for count, answer in enumerate(answers, start=1):  # noqa: B007
        file.write(json.dumps(answer, ensure_ascii=False) + "\n")
    return count


_WRITERS: dict[str, Callable[[Iterator[dict[str, Any]], IO[str]], int]] = {".csv": _csv, ".jsonl": _jsonl}


@verb("paretune export out/runs/0123456789abcdef --to peft --out folder/")
def export(folder: str, to: str, *, keep_adapters: bool, target: str) -> None:
    """Writes the model of a finished RUN for others.

    That is a Hugging Face folder (hf); an adapter folder in PEFT's format (peft), which of a method that PEFT has not only paretune reads; an
    ONNX graph, float or int8 as the run is (onnx); or, of a run in NF4, a folder that transformers opens with bitsandbytes. For hf and onnx,
    adapters that can be merged are. What is not the run's model byte for byte answers its test rows first: where it drifts, nothing is written.
    """
    from paretune import flow

    click.echo(flow.export(folder, target, to=to, keep_adapters=keep_adapters, told=say))
