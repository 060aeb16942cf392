"""Many rows, answered the fastest way that this machine has, once looking for it pays.

The model as it was saved answers first. Another way is tried, on the rows that were answered last, as soon as a trial costs less than a tenth of the
time that answering has taken so far: few rows are never answered another way, and for many a search that finds nothing costs a tenth at most. A way
takes over where it is faster and answers alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paretune import onnx_files, store, training
from paretune.errors import ParetuneError
from paretune.meters import memory
from paretune.step import probe
from paretune.tasks import Task
from paretune.weights.packed import Packed

SHARE = 0.1  # of the time that answering has taken may go into a trial
FASTER = 1.1  # times as fast another way has to be
ALIKE, APART = 0.99, 0.01  # the share of rows that must have the same answer, whose numbers may be so far apart (relative from 1 on, of labels to their spread)
FIRST = 16  # rows answered before a trial, in which a way makes its kernels
GRAPH_S = 30.0  # about what writing and checking a graph takes

Answer = Callable[[Sequence[Any]], list[dict[str, Any]]]  # rows -> an answer for each


@dataclasses.dataclass(frozen=True)
class Way:
    """How else rows may be answered."""

    name: str  # as in "from row 2,817 on in bf16"
    ready: Callable[[contextlib.ExitStack], Answer]  # what it enters stands until the last row is answered
    seconds: float = 0.0  # that making it ready takes, about


class Server(contextlib.AbstractContextManager):
    """Answers chunks of rows, and looks for a faster way meanwhile; at its end the model is as it was."""

    def __init__(self, answer: Answer, *, ways: Sequence[Way], told: Callable[[str], Any] | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._answer, self._ways, self._told, self._clock = answer, list(ways) if told else [], told, clock  # never a silent change
        self._rows, self._spent_s = 0, 0.0
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> Server:
        self._entered.enter_context(memory.kept_between_calls())
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()

    def __call__(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        answers, took_s = self._timed(self._answer, rows)
        self._rows += len(rows)
        self._spent_s += took_s
        if self._ways and took_s + self._ways[0].seconds < SHARE * self._spent_s:
            way = self._ways.pop(0)
            try:
                self._try(way, rows, answers, took_s)
            except (ParetuneError, RuntimeError, OSError) as error:  # of the trial, which no row waits for
                self._tell(f"{way.name}: not here ({error}); answers go on as before")
        return answers

    def _tell(self, text: str) -> None:
        if self._told:
            self._told(text)

    def _timed(self, answer: Answer, rows: Sequence[Any]) -> tuple[list[dict[str, Any]], float]:
        begun = self._clock()
        return answer(rows), self._clock() - begun

    def _try(self, way: Way, rows: Sequence[Any], answers: list[dict[str, Any]], took_s: float) -> None:
        with contextlib.ExitStack() as entered:
            answer = way.ready(entered)
            answer(rows[:FIRST])
            again, seconds = self._timed(answer, rows)
            same = sum(map(functools.partial(alike, spread=spread(answers)), answers, again))
            if took_s >= FASTER * seconds and same >= ALIKE * len(rows):
                self._answer = answer
                self._entered.enter_context(entered.pop_all())
                self._tell(f"from row {self._rows + 1:,} on {way.name}, {took_s / seconds:.1f} times as fast: {same} of {len(rows)} answers stay within {APART:g}")


def alike(answer: dict[str, Any], again: dict[str, Any], *, spread: float = 1.0) -> bool:
    """Are two answers the same, but for small differences of their numbers? A label that is a number may move by a share of the `spread` of all."""
    moved = ((key, a, again[key]) for key, a in answer.items())
    return all(abs(b - a) <= APART * (spread if key == "label" else max(1.0, abs(a))) if isinstance(a, float) else a == b for key, a, b in moved)


def spread(answers: Sequence[dict[str, Any]]) -> float:
    """The standard deviation of labels that are numbers; 1 for others."""
    labels = [answer["label"] for answer in answers if isinstance(answer.get("label"), float)]
    return statistics.pstdev(labels) if labels else 1.0


def plain(model: nn.Module, task: Task, *, pace: probe.Pace | None = None) -> Answer:
    """The model's own answers, at its own pace or another."""
    return lambda rows: [task.kind.answer(task, prediction) for prediction in training.predict(model, task, rows=rows, pace=pace)]


def ways(run: store.Run, model: nn.Module, *, task: Task) -> list[Way]:
    """The other ways of a run whose saved model has weights in fp32, the quickest to try first; of other formats none."""
    coded = any(isinstance(module, (Packed, onnx_files.Runner)) for module in model.modules())
    if coded or any(p.dtype != torch.float32 for p in model.parameters()):
        return []
    found = [Way("in bf16", functools.partial(_in_bf16, model, task))]
    if next(model.parameters()).device.type == "cpu" and all(map(importlib.util.find_spec, onnx_files.NEEDED)):
        found.append(Way("as a graph of onnxruntime", functools.partial(_as_graph, run, task), GRAPH_S))
    return found


def _in_bf16(model: nn.Module, task: Task, entered: contextlib.ExitStack) -> Answer:
    pace = probe.Pace("bf16")
    entered.enter_context(probe.paced(model.requires_grad_(False), pace))
    return plain(model, task, pace=pace)


def _as_graph(run: store.Run, task: Task, entered: contextlib.ExitStack) -> Answer:
    from paretune import exports

    folder = Path(entered.enter_context(tempfile.TemporaryDirectory())) / "graph"
    return plain(onnx_files.opened(exports.write(run, folder, to="onnx")), task)
