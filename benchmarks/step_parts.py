"""What each part of a cheaper training step saves on a CPU, and what a loss without whole logits saves of memory.

    python -m benchmarks.step_parts [--rounds 5]

Steps of one model in one process: in each round every variant does the same six batches of SST-2 in turn, every second round backwards, and one variant
stands twice as the A/A control. The losses' peaks are those of fresh processes. It writes its file, and docs/step.md again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import cells

PARTS = ("stream", "dropout", "attention", "product")
VARIANTS = {  # the parts at work; all with the backbone's dropout but the last
    "plain autocast, eager attention": (),
    "the same, again": (),
    "+ residual stream in bf16": PARTS[:1],
    "+ dropout from sixteen bits": PARTS[:2],
    "+ attention for short lengths": PARTS[:3],
    "+ LoRA summed up within its product: as it is": PARTS,
    "as it is, without dropout": (*PARTS, "none"),
}
VOCABULARIES = (50_000, 128_000)
KEYS, ROWS, OFTEN = (16, 20, 24, 28, 32, 36, 48, 96), 384, 20  # lengths of a softmax, its matrices (32 texts, 12 heads), repetitions that are timed together
FILE = Path(__file__).parent / "results" / "step_parts.json"


def main() -> None:
    """Runs all and writes the file and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loss", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.loss:
        print(json.dumps(loss(int(asked.loss[0]), around=asked.loss[1] == "around")))
        return
    found = {"rounds": steps(asked.rounds), "losses": {f"{size} {way}": _apart(size, way) for size in VOCABULARIES for way in ("whole", "around")},
             "softmax": {str(keys): softmax(keys, asked.rounds) for keys in KEYS}}  # fmt: skip
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    from benchmarks import step

    step.TIMING.doc.write_text(step.TIMING.made())


def steps(rounds: int) -> list[dict[str, float]]:
    """CPU seconds of six steps (forward, loss, backward; no optimizer) by variant, for each round."""
    import torch

    import paretune as pt
    from benchmarks import data
    from paretune import batches, training
    from paretune.methods.modifiers.schedule import Schedule

    task = data.task("sst2", train=192, validation=20, test=20)
    torch.manual_seed(0)
    model = pt.adapt(pt.load("minilm", task), pt.LoRA(r=8))
    encodings = training.encode(task, task.train, model=model)
    lengths = [task.kind.length(e) for e in encodings]
    chosen = batches.epoch_batches(lengths, None, schedule=Schedule(batch=32), random=batches.generator(0, 0))
    widths = [batches.width([lengths[i] for i in b], most=max(lengths)) for b in chosen]
    made = [task.kind.collate([encodings[i] for i in b], pt.processor(model), width=w) for b, w in zip(chosen, widths, strict=True)]
    order = list(VARIANTS)
    return [{name: _seconds(model, task.kind, made, parts=VARIANTS[name]) for name in (order[::-1] if i % 2 else order)} for i in range(rounds)]


def _seconds(model: Any, kind: Any, made: list[dict[str, Any]], *, parts: tuple[str, ...]) -> float:
    from paretune.step import probe, short_attention

    pace = probe.Pace("bf16", short_attention.NAME if "attention" in parts else "eager")
    with without(parts), probe.paced(model, pace, dropout="none" not in parts):
        model.train()
        for batch in (made[0], *made):  # the first one warms up
            if batch is made[0]:
                started = time.process_time()
            with probe.autocast(pace):
                outputs = model(**kind.inputs(batch))
            total, count = kind.loss(outputs, batch)
            (total / count).backward()
            model.zero_grad(set_to_none=True)
        return time.process_time() - started


@contextlib.contextmanager
def without(parts: tuple[str, ...]) -> Iterator[None]:
    """The library with these parts alone of what makes a step cheaper."""
    from torch.nn import functional as F

    from paretune.methods.adapters.lora import LowRank
    from paretune.patches import fitting
    from paretune.step import narrow, probe

    def apart(patch: Any, x: Any, y: Any) -> Any:
        return y + patch.scale * F.linear(F.linear(fitting(x, patch.A), patch.A), patch.B).to(y.dtype)

    def nothing(model: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    places: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "stream": (narrow, "stream", nothing), "dropout": (probe, "cheap_dropout", nothing), "product": (LowRank, "forward", apart)}  # fmt: skip
    with contextlib.ExitStack() as undo:
        for part, place in places.items():
            if part not in parts:
                undo.enter_context(mock.patch.object(*place))
        yield


def softmax(keys: int, rounds: int) -> dict[str, float]:
    """Median CPU microseconds of a softmax over so many keys of bf16 scores, and of its derivative, in bf16 and in fp32 with the casts to and fro."""
    import torch

    scores, gradient = torch.randn(2, ROWS, keys, keys, dtype=torch.bfloat16)
    weights, back, wide = scores.softmax(-1), torch._softmax_backward_data, torch.float32
    ways: dict[str, Callable[[], Any]] = {
        "bf16": lambda: scores.softmax(-1), "fp32": lambda: scores.to(wide).softmax(-1).to(scores.dtype),
        "bf16, derivative": lambda: back(gradient, weights, -1, torch.bfloat16),
        "fp32, derivative": lambda: back(gradient.to(wide), weights.to(wide), -1, wide).to(weights.dtype),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            work()
            started = time.process_time()
            for _ in range(OFTEN):
                work()
            times[name].append((time.process_time() - started) / OFTEN * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def _apart(size: int, way: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.step_parts", "--loss", str(size), way]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def loss(size: int, *, around: bool) -> dict[str, float]:
    """One step on 1,024 tokens of a Llama-shaped model of two layers of width 64: what it adds to the process's peak, and CPU seconds."""
    import torch
    import transformers

    from paretune.step import cross_entropy
    from paretune.tasks.kinds import KINDS

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    model, kind = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=size, **shape)).train(), KINDS["language"]()
    ids = torch.randint(size, (4, 256))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    few = {name: values[:, :8] for name, values in batch.items()}
    output = cross_entropy.projection(model, kind, batch=few) if around else None
    model(**kind.inputs(few)).logits.sum().backward()  # buffers that either way has
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with cross_entropy.skipped(output):
        outputs = model(**kind.inputs(batch))
    total, count = cross_entropy.of(kind, outputs, batch=batch, output=output, within=contextlib.nullcontext())
    (total / count).backward()
    return {"added_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000, "cpu_s": time.process_time() - started}


def section() -> str:
    """The part of docs/step.md that tells of this, from the file; it says so where nothing was run."""
    if not FILE.exists():
        return "What each part of a step saves: not run (`python -m benchmarks.step_parts`).\n"
    found = json.loads(FILE.read_text())
    rounds, first = found["rounds"], next(iter(VARIANTS))

    def ratio(name: str) -> str:
        shares = [r[name] / r[first] for r in rounds]
        return f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"

    rows = [[name, f"{1000 * statistics.median(r[name] for r in rounds) / 6:.0f}", ratio(name)] for name in VARIANTS]
    losses = [[f"{size:,}", *(f"{found['losses'][f'{size} {way}'][key]:.{digits}f}" for way in ("whole", "around") for key, digits in (("added_mb", 0), ("cpu_s", 1)))]
              for size in VOCABULARIES]  # fmt: skip
    return f"""## What each part of a step saves

Six steps of LoRA (r=8, all linear maps) of MiniLM on SST-2, batch 32, bf16, forward and backward, without the optimizer. One process, the variants in turn, on a
machine that other work kept busy: the ratios count, medians of {len(rounds)} rounds with their range.

{cells.markdown(["variant", "CPU ms per step", "CPU time, ratio"], rows)}

The softmax of that attention is taken in fp32 below 32 keys, where bf16's kernels are slow: CPU microseconds for {ROWS} matrices of bf16 scores, medians of
{len(rounds)} rounds.

{cells.markdown(["keys", *next(iter(found["softmax"].values()))], ([keys, *(f"{us:,.0f}" for us in f.values())] for keys, f in found["softmax"].items()))}

A loss over a vocabulary (`step/cross_entropy.py`), fp32, 1,024 tokens of a decoder of width 64, a fresh process each: what a step adds to the peak, with the model's
logits whole and a few tokens' at a time (0 where libraries had taken as much before).

{cells.markdown(["vocabulary", "whole: MB", "CPU s", "in chunks: MB", "CPU s"], losses)}

Made by `python -m benchmarks.step_parts` from `benchmarks/results/step_parts.json`.
"""


if __name__ == "__main__":
    main()
