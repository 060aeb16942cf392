"""What shrinking buys, step by step on one model: merge, a smaller vocabulary, int8.

    python examples/shrink_and_measure.py [DATA BACKBONE OUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import paretune as pt
from paretune import store

data, backbone, out = sys.argv[1:] or ["stdlib-topics", "minilm", "out/shrunk"]

task = pt.task(data).subset(500)
model = pt.load(backbone, task)
pt.adapt(model, pt.LoRA(r=8))
pt.fit(model, task, pt.Schedule(epochs=1))


def report(step: str) -> None:
    """Saves the model as it is now, and prints its size and its latency."""
    folder = Path(out) / step
    model.save_pretrained(folder)
    pt.processor(model).save_pretrained(folder)
    cost = pt.measure(model, task)  # three windows of at most 2 s, and the throughput
    print(f"{step:10}  {store.stored_mb(folder):7.2f} MB  {cost.latency_p50_ms:6.2f} ms  {cost.throughput_per_s:8.0f} /s")


report("adapted")
pt.shrink(model, pt.Merge())
report("merged")
pt.shrink(model, pt.Vocabulary(), task)  # reads the training texts, so it wants the task
report("trimmed")
pt.shrink(model, pt.Int8())
report("int8")
