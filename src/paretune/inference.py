"""Using a finished run: open its model, answer new rows, and measure what an answer costs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from paretune import backbones, onnx_files, serving, store, tasks, training
from paretune.errors import DataError, MeterError
from paretune.meters import energy, flops, memory, protocol, throughput
from paretune.meters.reading import Reading, missing
from paretune.options import Metering
from paretune.tasks import Task

SAMPLE = 200  # test examples that a measurement cycles through
COMPARED = 1000  # test examples, at most, that an export is compared on: of 200, two decide over a hundredth of the score
LONGEST = 24  # of them, those in which memory is at its peak
CHUNK = 256  # rows read, answered and written at a time


def open_model(folder: str | Path, task: Task) -> nn.Module:
    """The model saved in a folder, with its processor, in evaluation mode.

    Raises:
        StoreError: for a folder that holds no model, or one with missing or foreign tensors.
    """
    folder = Path(folder)
    if (folder / onnx_files.GRAPH).is_file():
        return onnx_files.opened(folder)
    if not (folder / "config.json").is_file():
        raise store.StoreError(f"{folder} holds no model; give a run folder that `paretune run` wrote")
    with backbones.quiet():
        config = AutoConfig.from_pretrained(folder)
        auto = getattr(transformers, backbones.auto_class(config.to_dict(), config, task=task))
        model, info = auto.from_pretrained(folder, output_loading_info=True)
    wrong = {name: sorted(map(str, keys))[:3] for name, keys in info.items() if keys}
    if wrong:
        raise store.StoreError(f"{folder}: the file and the model do not match ({wrong}); it was damaged or changed")
    backbones.travel(model, backbones.read_processor(str(folder), {}))
    return model.eval()


def task_of(run: store.Run) -> Task:
    """The task of a run without its rows: enough to read new ones and to name the answers."""
    return tasks.blank(run.record["task_definition"])


def tested(run: store.Run) -> Task:
    """The run's task with the test examples that it keeps; where they are no plain text, the whole task from its source.

    Raises:
        DataError: for a source that has changed since, or a task that was made without one.
    """
    sample = store.read_json(run.folder / "sample.json")
    return dataclasses.replace(task_of(run), test=tasks.Rows(sample)) if sample else _rebuilt(run)


def compared(run: store.Run) -> Task:
    """The run's task with the test examples that an export is compared on: from all over the split while its source is what it was, else those the run keeps."""
    try:
        task = _rebuilt(run)
    except DataError:
        task = tested(run)
    return dataclasses.replace(task, test=task.test[:: math.ceil(len(task.test) / COMPARED) or 1])


def _rebuilt(run: store.Run) -> Task:
    """The run's whole task, from its source."""
    definition = run.record["task_definition"]
    if "source" not in definition["build"]:
        raise DataError(f"the task {definition['name']!r} was not read from files, and run {run.id} keeps examples of plain text alone; make it with pt.task")
    task = tasks.rebuild(definition)
    if task.fingerprint != run.record["task_fingerprint"]:
        raise DataError(f"{task.source} is not the data that run {run.id} was trained on; put the old file back, or run the recipe again")
    return task


def answers(run: store.Run, rows: Iterable[Any]) -> list[dict[str, Any]]:
    """One answer per row; see `Run.predict`."""
    return list(stream(run, rows))


def stream(run: store.Run, rows: Iterable[Any], *, told: Callable[[str], None] | None = None) -> Iterator[dict[str, Any]]:
    """Answers for rows as they come, a few hundred in memory at a time.

    Args:
        told: is told when a faster way of answering takes over (`serving`); without it, every answer is the saved model's own.

    Raises:
        DataError: for a row that is neither a text nor a dict with the task's columns.
    """
    task = task_of(run)
    model = open_model(run.model, task)
    rows = iter(rows)
    with serving.Server(serving.plain(model, task), ways=serving.ways(run, model, task=task), told=told) as answer:
        while chunk := [_row(task, row) for row in itertools.islice(rows, CHUNK)]:
            yield from answer(chunk)


def _row(task: Task, row: Any) -> dict[str, Any]:
    inputs = [column for role, column in task.columns.items() if role != "label"]
    if isinstance(row, dict):
        absent = [column for column in inputs if column not in row]
        if absent:
            raise DataError(f"a row lacks the column {absent[0]!r}; the model reads {', '.join(inputs)}, the row has {', '.join(row)}")
        return row
    values = [row] if isinstance(row, str) or len(inputs) == 1 else list(row)
    if len(values) != len(inputs):
        raise DataError(f"a row has {len(values)} texts and the model reads {len(inputs)}: {', '.join(inputs)}")
    return dict(zip(inputs, values, strict=True))


class Bench:
    """One model and fixed test examples, ready to be timed. Reading text into tokens is not part of what is timed."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model, self.task = model, task
        encodings = training.encode(task, task.test[:SAMPLE], model=model)
        if not encodings:
            raise MeterError("there are no test examples to measure on")
        processor = training._processor(model)
        device = next(model.parameters()).device
        self._batch = lambda es: {k: v.to(device) for k, v in task.kind.inputs(task.kind.collate(es, processor)).items()}
        self.encodings = encodings
        self.singles = itertools.cycle([self._batch([e]) for e in encodings])

    def one(self) -> None:
        """One inference of batch 1, the next example in turn."""
        self._run(next(self.singles))

    def many(self, n: int) -> Callable[[], None]:
        """Runs a batch of n examples of like length, the middle one's: long and short ones are batched apart in use."""
        by_length = sorted(self.encodings, key=self.task.kind.length)
        start = max(0, (len(by_length) - n) // 2)
        batch = self._batch([by_length[(start + i) % len(by_length)] for i in range(n)])
        return lambda: self._run(batch)

    def best_batch(self, *, limit_s: float) -> tuple[Reading, int]:
        """Examples per second at the best batch found within about so many seconds, and that batch."""
        batches: dict[int, Callable[[], None]] = {}

        def run(n: int) -> None:
            if n not in batches:
                batches.clear()
                batches[n] = self.many(n)
            batches[n]()

        return throughput.best_throughput(run, largest=128, seconds=0.2, limit_s=limit_s)

    def flops(self) -> Reading:
        """FLOPs of an inference: the mean over five lengths, the middles of the fifths."""
        if isinstance(self.model, onnx_files.Runner):
            return missing("FLOP", "FLOPs are not counted in a graph; the run that it was exported from has them")
        by_length = sorted(self.encodings, key=self.task.kind.length)
        picked = [by_length[round(q * (len(by_length) - 1))] for q in np.linspace(0.1, 0.9, 5)]
        readings = [flops.forward(lambda b=self._batch([e]): self.model(**b), self.model) for e in picked]
        return sum(readings[1:], readings[0]).times(1 / len(readings), "FLOP")

    def _run(self, batch: dict[str, torch.Tensor]) -> None:
        with torch.inference_mode():
            self.model(**batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def measured(benches: dict[str, Bench], metering: Metering, *, progress: Callable[[str, int, int], None] | None = None) -> dict[str, dict[str, Any]]:
    """What an inference of each model costs, measured in turn: {"readings": {...}, "meter": {...}, "protocol": ...} by name."""
    device = str(next(next(iter(benches.values())).model.parameters()).device)
    plan = protocol.PROTOCOLS[metering.protocol]
    meter = energy.find(metering.power, metering.profile, log=metering.log, device=device, window_s=plan.window_s)
    tell = progress or (lambda what, done, of: None)
    timings = protocol.measure({name: bench.one for name, bench in benches.items()}, meter, protocol=plan, progress=functools.partial(tell, "inference"))
    found = {}
    for i, (name, bench) in enumerate(benches.items()):
        rest = {"throughput_per_s": bench.best_batch(limit_s=plan.search_s)[0], "flops_per_inference": bench.flops()}
        tell("throughput", i + 1, len(benches))
        about = {**timings[name].meter, "aa_wall": timings[name].aa_wall, "aa_cpu": timings[name].aa_cpu, "windows_note": timings[name].note}
        about |= {"assumed": True} if metering.assumed else {}
        found[name] = {"readings": {**timings[name].readings(), **rest}, "meter": about, "protocol": plan.name}
    return found


def peak_memory(folders: Sequence[Path]) -> list[Reading]:
    """Peak memory of a process that opens a saved model and answers, for each run folder: its highest resident size over that before the model."""
    try:
        found = memory.child_peaks("paretune.inference:_one_pass", [[str(f)] for f in folders], timeout_s=60 + 60 * len(folders))
        peaks = [peak.over_mb for peak in found]
    except MeterError as error:
        peaks = [missing("MB", str(error)) for _ in folders]
    return [peak if peak.value is not None else missing("MB", _unmeasured(peak.reason)) for peak in peaks]


def _unmeasured(reason: str) -> str:
    """Why a pass has no peak: its test examples are gone, which is not the model's fault, or the model does not work."""
    _, lost, what = reason.partition(f"{DataError.__name__}: ")
    return f"the test examples cannot be read again: {what}" if lost else f"{memory.UNFINISHED}: {reason}"


def _one_pass(folder: str) -> Callable[[], object]:
    """Reads the test examples, which may mean the whole task; what it gives back opens the model and answers the longest, and is what counts."""
    run = store.Run.read(folder)
    rows = list(tested(run).test[:SAMPLE])
    task = task_of(run)

    def answered() -> None:
        model = open_model(run.model, task)
        lengths = [task.kind.length(encoding) for encoding in training.encode(task, rows, model=model)]
        longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:LONGEST] if len(lengths) == len(rows) else range(len(rows))
        training.predict(model, task, rows=[rows[i] for i in longest], batch=1)

    return answered
