"""How a graph answers fastest in onnxruntime: attention and layer norm in one operator or several, and what threads do while they wait.

    python -m benchmarks.graphs [--rounds 7]

MiniLM on SST-2, float and int8, one text of 26 tokens and 16 of them. Every way has a session of its own in each round, which ends with it, for
threads that spin would disturb the others; ways take turns, every second round backwards, and the first stands twice as the A/A control. The last
way is what onnxruntime gives alone: torch's graph, its own `quantize_dynamic`, and its own defaults. Needs `paretune[onnx]` and the folder of data sets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import cells, data, opened
from benchmarks.cells import Timing
from benchmarks.opened import BEFORE
from paretune import onnx_files

TOKENS, BATCHES = 26, {1: 300, 16: 40}  # texts at a time, and how many times in a round
REST_S = 0.2  # after the calls


@dataclasses.dataclass(frozen=True)
class Way:
    """A graph and a session for it."""

    opset: int = onnx_files.OPSET
    fused: bool = False  # sum and layer norm, by onnxruntime
    spins: str = "within a call"  # or "always", "never"
    own: bool = False  # onnxruntime's own integers
    joined: bool = True  # heads, side by side for attention
    threads: int | None = None  # None: as many as torch has

    @property
    def file(self) -> tuple[Any, ...]:
        """What of it is in the file."""
        return self.opset, self.own, self.joined


WAYS = {
    "paretune": Way(), "paretune, again": Way(), "attention in single operators": Way(opset=BEFORE), "heads moved apart": Way(joined=False),
    "sum and layer norm as one operator": Way(fused=True),
    "threads that never spin": Way(spins="never"), "threads that spin between calls, too": Way(spins="always"), "one thread": Way(threads=1),
    "onnxruntime alone": Way(opset=BEFORE, fused=True, spins="always", own=True),
}  # fmt: skip
FORMS = {"float": "full", "int8": "full | int8"}
FIRST = next(iter(WAYS))


def measured(rounds: int) -> dict[str, Any]:
    """Milliseconds by the clock and of CPU time, by form, way and round; and the CPU time of waiting after the calls."""
    import torch

    found: dict[str, dict[str, list[dict[str, Any]]]] = {form: {name: [] for name in WAYS} for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        given = data.task("sst2", train=600, validation=50, test=1000)  # as many as an export is compared on
        for form, recipe in FORMS.items():
            kinds = {way.file: way for way in WAYS.values()}
            graphs = {kind: graph(way, form, given, Path(folder) / f"{form}-{i}", recipe) for i, (kind, way) in enumerate(kinds.items())}
            for i in range(rounds):
                for name, way in list(WAYS.items())[:: -1 if i % 2 else 1]:
                    found[form][name].append(timed(way, graphs[way.file], way.threads or torch.get_num_threads()))
    return {"threads": torch.get_num_threads(), "ways": found}


def graph(way: Way, form: str, given: Any, folder: Path, recipe: str) -> Path:
    """The file of a way's graph, checked against its model."""
    own = way.own and form == "int8"
    made = data.finished("full" if own else recipe, given, out=str(folder.parent / "runs"), epochs=1)
    as_moved = contextlib.nullcontext() if way.joined else mock.patch.object(onnx_files, "_join_heads")
    with mock.patch.object(onnx_files, "OPSET", way.opset), as_moved:
        return opened.prepare("onnxruntime int8" if own else "onnx", made, folder) / onnx_files.GRAPH


def timed(way: Way, file: Path, threads: int) -> dict[str, Any]:
    """The median call and the CPU time of one, by the number of texts; and the CPU time of resting after the calls."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if way.spins == "never" else "1")
    options.add_session_config_entry("session.force_spinning_stop", "1" if way.spins == "within a call" else "0")
    off = [] if way.fused else onnx_files.SLOWER
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"], disabled_optimizers=off)
    names, found = [given.name for given in session.get_inputs()], {}
    for texts, times in BATCHES.items():
        ids = np.arange(1000, 1000 + texts * TOKENS).reshape(texts, TOKENS)
        inputs = {name: {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}[name] for name in names}
        for _ in range(max(3, times // 10)):
            session.run(None, inputs)
        took, begun = [], time.process_time()
        for _ in range(times):
            before = time.perf_counter()
            session.run(None, inputs)
            took.append(time.perf_counter() - before)
        found[str(texts)] = {"ms": 1e3 * statistics.median(took), "cpu_ms": 1e3 * (time.process_time() - begun) / times}
    begun = time.process_time()
    time.sleep(REST_S)
    return found | {"after_ms": 1e3 * (time.process_time() - begun)}


def page(found: dict[str, Any]) -> str:
    """docs/graphs.md, from the file."""

    def cell(ways: dict[str, Any], name: str, texts: str, field: str) -> str:
        mine, first = ([r[texts][field] for r in ways[n]] for n in (name, FIRST))
        low, middle, high = statistics.quantiles([a / b for a, b in zip(mine, first, strict=True)], n=4)
        return f"{statistics.median(mine):.2f} ({middle:.2f}, {low:.2f} to {high:.2f})"

    head = ["way", *(f"{n} text{'s' * (n > 1)}, {what}" for n in BATCHES for what in ("ms", "CPU ms")), f"CPU ms of {REST_S:g} s after them"]
    tables = []
    for form, ways in found["ways"].items():
        rows = [[name, *(cell(ways, name, str(n), field) for n in BATCHES for field in ("ms", "cpu_ms")), f"{statistics.median(r['after_ms'] for r in ways[name]):.1f}"]
                for name in WAYS]  # fmt: skip
        tables.append(f"## {form}\n\n{cells.markdown(head, rows)}")
    count = len(found["ways"]["int8"][FIRST])
    return f"""# Graphs in onnxruntime

MiniLM on SST-2, texts of {TOKENS} tokens, {found["threads"]} threads of {found["environment"].get("cpu")}. Medians of {count} rounds, each way in a session of its own in
each round; in brackets times as long as "{FIRST}" of the same round (the middle, and half of the rounds between the two), whose second row is the A/A control.
"{FIRST}" is what `export --to onnx` writes and `predict` and `measure` run: attention as one operator (opset {onnx_files.OPSET}; torch's own choice is {BEFORE}) that
takes the heads side by side, sum and layer norm as two (onnxruntime makes one of them, `{onnx_files.SLOWER[0]}`), and threads that spin within a call and sleep
after it. Each further row changes one of these; "onnxruntime alone" is torch's graph with its `quantize_dynamic` (float: as it is) and its defaults.

{(chr(10) * 2).join(tables)}

Made by `python -m benchmarks.graphs` from `benchmarks/results/graphs.json`; `--table` makes it again from the file.
"""


TIMING = Timing("graphs", measured, page, rounds=7)

if __name__ == "__main__":
    TIMING.main()
