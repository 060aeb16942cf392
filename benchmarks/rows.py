"""What packed rows save against rows sorted by length and rows as they come; and what a step within the backward pass saves of memory.

    python -m benchmarks.rows [--rounds 5] [--only packing|memory]

Packing: one process; in each round every variant does the passes (forward, loss, backward) of four steps over the same examples in turn, every second round
backwards; one variant stands twice as the A/A control. Memory: full fine-tuning in a fresh process each. It writes its file, and docs/step.md again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import cells

BATCH, STEPS = 32, 4
PASSES = {"bf16": "paretune_short", "fp32": "eager"}  # number formats, each with its fastest kernel at these lengths on a CPU with AMX
VARIANTS = {  # (are texts sorted by length within what stands here, packed?)
    "sorted by length": (True, False),
    "sorted by length, again": (True, False),
    "as they come": (False, False),
    "as they come, packed": (False, True),
    "sorted by length, packed": (True, True),
}
MODELS = {"MiniLM, LoRA": "classification", "decoder of 6 layers of width 256, full": "causal"}
HEAVY = {"MiniLM, batch 32 of SST-2": "minilm", "decoder of 6 layers of width 768, batch 8 of 128 tokens": "decoder", "the same decoder, batch 1": "decoder, one"}
WAYS = ("all gradients at once", "all gradients at once, again", "each within the pass")
VOCABULARY = 2000  # of the small decoder
FILE = Path(__file__).parent / "results" / "rows.json"


def main() -> None:
    """Runs all and writes the file and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("packing", "memory"))
    parser.add_argument("--heavy", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.heavy:
        print(json.dumps(heavy(asked.heavy[0], within=asked.heavy[1] == WAYS[-1])))
        return
    if asked.only != "memory":
        _keep("packing", {name: {dtype: packing(kind, dtype=dtype, rounds=asked.rounds) for dtype in PASSES} for name, kind in MODELS.items()})
    if asked.only != "packing":
        _keep("memory", {name: [{way: _apart(of, way) for way in WAYS} for _ in range(2)] for name, of in HEAVY.items()})


def _keep(part: str, figures: dict[str, Any]) -> None:
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.write_text(json.dumps({**found, part: figures}, indent=1) + "\n")
    from benchmarks import step

    step.TIMING.doc.write_text(step.TIMING.made())


# --- packing --------------------------------------------------------------------------------------------------------------------


def packing(kind: str, *, dtype: str, rounds: int) -> dict[str, Any]:
    """CPU seconds of four steps' passes by variant for each round, real tokens in them, and the share of tokens that are real."""
    import torch

    from paretune import batches
    from paretune.step import probe
    from paretune.step.packing import name

    model, task, encodings = small(kind)
    lengths, order = [len(e["input_ids"]) for e in encodings], torch.randperm(len(encodings), generator=torch.Generator().manual_seed(0)).tolist()
    made = {}
    for variant, (is_sorted, packed) in VARIANTS.items():
        chosen = sorted(order, key=lengths.__getitem__) if is_sorted else order
        groups = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
        made[variant] = [[task.collate([encodings[i] for i in part]) for part in batches.parts(group, lengths, packed=packed)] for group in groups]

    def seconds(variant: str) -> float:
        pace = probe.Pace(dtype, name(PASSES[dtype]) if VARIANTS[variant][1] else PASSES[dtype])
        with probe.paced(model, pace):
            return passes(model.train(), task, steps=made[variant], pace=pace)

    for variant in VARIANTS:  # kernels are prepared
        seconds(variant)
    names = list(VARIANTS)
    measured = [{variant: seconds(variant) for variant in (names[::-1] if i % 2 else names)} for i in range(rounds)]
    real = {v: sum(lengths) / sum(places(b["attention_mask"], packed=VARIANTS[v][1]) for step in made[v] for b in step) for v in VARIANTS}
    return {"rounds": measured, "tokens": sum(lengths), "real": real}


def places(mask: Any, *, packed: bool) -> int:
    """Tokens that a batch with this mask passes through layers, filling included."""
    from paretune.step.packing import Layout

    return len(Layout.of(mask).pack.source) if packed else mask.numel()


def passes(model: Any, task: Any, *, steps: list[list[dict[str, Any]]], pace: Any) -> float:
    """CPU seconds of forward, loss and backward of all parts of all steps."""
    from paretune.step import cross_entropy, packing, probe

    few = {k: v[:2] for k, v in steps[0][0].items()}
    with probe.autocast(pace):
        output = cross_entropy.projection(model, task.kind, batch=few)
    started = time.process_time()
    for step in steps:
        for batch in step:
            with probe.autocast(pace), cross_entropy.skipped(output):
                outputs = model(**packing.laid_out(task.kind.inputs(batch), pace.attention))
            total, count = cross_entropy.of(task.kind, outputs, batch=batch, output=output, within=probe.autocast(pace))
            (total / count).backward()
        model.zero_grad(set_to_none=True)
    return time.process_time() - started


class _Given:
    """A kind of task and how its examples become a batch."""

    def __init__(self, kind: Any, processor: Any) -> None:
        self.kind, self.processor = kind, processor

    def collate(self, encodings: list[dict[str, Any]]) -> dict[str, Any]:
        return self.kind.collate(encodings, self.processor)


def small(kind: str) -> tuple[Any, _Given, list[dict[str, Any]]]:
    """A model that learns, its task, and the encodings of four batches of SST-2, out of a pool sorted by length; a decoder learns to go on with them."""
    import torch

    import paretune as pt
    from benchmarks import data
    from paretune import batches, training
    from paretune.tasks.kinds import KINDS

    task = data.task("sst2", train=BATCH * batches.POOL, validation=20, test=20)
    torch.manual_seed(0)
    model = pt.adapt(pt.load("minilm", task), pt.LoRA(r=8))
    pool = sorted(training.encode(task, task.train, model=model), key=task.kind.length)
    every = batches.POOL // STEPS
    encodings = [e for at in range(every // 2, batches.POOL, every) for e in pool[at * BATCH : (at + 1) * BATCH]]
    if kind == "classification":
        return model, _Given(task.kind, pt.processor(model)), encodings
    few = [[i % VOCABULARY for i in e["input_ids"]] for e in encodings]
    encodings = [{"input_ids": ids, "attention_mask": e["attention_mask"], "labels": ids} for ids, e in zip(few, encodings, strict=True)]
    return decoder(256, vocabulary=VOCABULARY), _Given(KINDS["generation"](), pt.processor(model)), encodings


def decoder(width: int, *, vocabulary: int) -> Any:
    """A Llama-shaped model of six layers, all of it learning."""
    import transformers

    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 6, "num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocabulary, pad_token_id=0, **shape))


# --- memory ---------------------------------------------------------------------------------------------------------------------


def _apart(of: str, way: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.rows", "--heavy", of, way]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def heavy(of: str, *, within: bool) -> dict[str, float]:
    """Four steps of full fine-tuning without clipping: what they add to the process's memory at the highest, MB, CPU seconds, the last loss."""
    import psutil
    import torch

    from paretune import surgery, training
    from paretune.meters.memory import Peak
    from paretune.methods.adapters.full import Full
    from paretune.methods.modifiers.schedule import Schedule
    from paretune.step import adamw

    torch.manual_seed(0)
    model, task, batch = _minilm() if of == "minilm" else _decoder(1 if of == "decoder, one" else 8)
    surgery.attach(model, [Full()])
    schedule = Schedule(lr=2e-5, epochs=1.0, batch=batch, clip=0.0, dtype="fp32")
    before, started = psutil.Process().memory_info().rss / 1e6, time.process_time()
    behind = contextlib.nullcontext() if within else mock.patch.object(adamw, "needs_all", lambda loop: True)
    with behind, Peak("cpu") as peak:
        fitted = training.fit(model, task, schedule=schedule)
    learning = sum(p.numel() for p in model.parameters())
    return {"added_mb": peak.reading.value - before, "cpu_s": time.process_time() - started, "loss": fitted.epochs[-1]["loss"], "learning": learning}


def _minilm() -> tuple[Any, Any, int]:
    import dataclasses

    import paretune as pt
    from benchmarks import data

    task = data.task("sst2", train=4 * 32, validation=20, test=20)
    return pt.load("minilm", task), dataclasses.replace(task, validation=type(task.validation)()), 32


def _decoder(batch: int) -> tuple[Any, Any, int]:
    import random

    import paretune as pt
    from benchmarks import data
    from paretune import processors
    from paretune.tasks import Rows, Task
    from paretune.tasks.kinds import KINDS

    processor = pt.processor(pt.load("minilm", data.task("sst2", train=32, validation=20, test=20)))
    processor.model_max_length = 128
    words, pick = sorted(processor.vocab)[5000:25000], random.Random(0)
    rows = Rows({"text": " ".join(w for w in pick.choices(words, k=400) if w.isalpha())} for _ in range(batch))
    task = Task("words", KINDS["language"](), {"text": "text"}, (), "perplexity", rows, Rows(), Rows())
    model = decoder(768, vocabulary=processor.vocab_size)
    processors.put(model, processor)
    return model, task, batch


# --- page -----------------------------------------------------------------------------------------------------------------------


def section() -> str:
    """The part of docs/step.md that tells of this, from the file; it says so where nothing was run."""
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    packed = _packing(found["packing"]) if "packing" in found else "Packed rows: not run (`python -m benchmarks.rows`).\n"
    return f"{packed}\n{_memory(found['memory']) if 'memory' in found else 'A step within the backward pass: not run (`python -m benchmarks.rows`).'}\n"


def _packing(found: dict[str, Any]) -> str:
    first = next(iter(VARIANTS))

    def ratio(measured: dict[str, Any], name: str) -> str:
        shares = [r[name] / r[first] for r in measured["rounds"]]
        return f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"

    def rate(measured: dict[str, Any], name: str) -> str:
        return f"{measured['tokens'] / statistics.median(r[name] for r in measured['rounds']):,.0f}"

    columns = ["variant", "real tokens", *(f"{dtype}: {what}" for dtype in PASSES for what in ("real tokens per CPU s", "CPU time, ratio"))]
    parts = []
    for model, by in found.items():
        rows = [[name, f"{100 * by['bf16']['real'][name]:.0f} %", *(cell for dtype in PASSES for cell in (rate(by[dtype], name), ratio(by[dtype], name)))]
                for name in VARIANTS]  # fmt: skip
        parts.append(f"{model}:\n\n{cells.markdown(columns, rows)}\n")
    rounds = len(found[next(iter(found))]["bf16"]["rounds"])
    saved = [statistics.median(r["as they come, packed"] / r["as they come"] for r in measured["rounds"]) for by in found.values() for measured in by.values()]
    return f"""## Packed rows, and rows sorted by length

`schedule(pack=True)` lets texts stand in one row with hardly any padding (`step/packing.py`); without it, a batch is of texts of like length. Passes of {STEPS} steps
over {BATCH * STEPS} sentences of SST-2, batch {BATCH}, forward, loss and backward, the same sentences in all variants; medians of {rounds} rounds with their range,
the ratios to `{first}` of the same round. Real tokens are the share of all that layers compute on; the rest is padding, and the filling of a row. Sorting
is what is done unless a recipe packs: batches sorted by length are no slower here. Packing is for batches that shall be random, which it makes cheaper:
{min(saved):.2f} to {max(saved):.2f} of the CPU time of the same batches padded.

{"".join(part + chr(10) for part in parts)}Made by `python -m benchmarks.rows` from `benchmarks/results/rows.json`.
"""


def _memory(found: dict[str, Any]) -> str:
    rows = []
    for model, rounds in found.items():
        for way in WAYS:
            added, ratios = [r[way]["added_mb"] for r in rounds], [r[way]["cpu_s"] / r[WAYS[0]]["cpu_s"] for r in rounds]
            rows.append([model, f"{rounds[0][way]['learning'] / 1e6:.1f} M", way, f"{statistics.median(added):,.0f} ({min(added):,.0f} to {max(added):,.0f})",
                         f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", f"{rounds[0][way]['loss']:.6f}"])  # fmt: skip
    return f"""## A step within the backward pass

With `schedule(clip=0)` a step of one pass moves each weight as soon as its gradient is whole, and lets the gradient go (`step/adamw.py`): the same weights, bit for
bit. About four steps of full fine-tuning, fp32, a fresh process each, {len(next(iter(found.values())))} of each; peak memory is what training adds to the process.
It saves where the gradients weigh more than what a pass holds, as with small batches: gradients come as activations go, so with large ones nothing is saved.

{cells.markdown(["model", "learns", "gradients", "added at the peak, MB", "CPU time, ratio", "loss"], rows)}

Made by `python -m benchmarks.rows` from `benchmarks/results/rows.json`.
"""


if __name__ == "__main__":
    main()
