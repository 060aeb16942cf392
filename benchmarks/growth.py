"""How time and memory of a training step grow: with batch, length, layers, adapters and rank.

    python -m benchmarks.growth [--hours 1] [--only length]

A BERT-shaped model of width 256 with random weights; one of the five grows, the others stay where they are. Each point is a fresh
process that does a few steps (forward, backward, optimizer), fp32, one attention kernel, so that nothing changes along a line but what
grows. The exponent b of cost = a n^b is fitted to the upper half of a line, where what is constant weighs least.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import cells
from benchmarks.cells import Cell, Table

HERE = {"batch": 8, "length": 64, "layers": 4, "adapters": 1, "rank": 8}
LINES = {"batch": (4, 8, 16, 32, 64, 128), "length": (32, 64, 128, 256, 512, 1024), "layers": (2, 4, 8, 16, 32),
         "adapters": (1, 2, 4, 8, 16), "rank": (2, 8, 32, 128)}  # fmt: skip
METHODS = ("full", "lora", "adapter", "ia3")
OF_ADAPTERS = ("adapters", "rank")  # what `full` and, of the ranks, `ia3` have not
STEPS = 5


def every_cell() -> Iterator[Cell]:
    """Every point of every line."""
    for what, sizes in LINES.items():
        for method in METHODS:
            if has(method, what):
                for n in sizes:
                    yield Cell(f"{method} {what} {n}", functools.partial(_apart, method, what, n))


def has(method: str, what: str) -> bool:
    """Does the method have what grows?"""
    return what not in OF_ADAPTERS or (method != "full" and not (what == "rank" and method == "ia3"))


def _apart(method: str, what: str, n: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps({"method": method, **HERE, what: n})]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def point(asked: dict[str, Any]) -> dict[str, float]:
    """Median CPU seconds of a step, and what the steps add to the memory that the process had with the adapted model."""
    import torch
    import transformers

    from paretune import registry, surgery
    from paretune.meters import memory

    shape = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 2000, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=asked["layers"], **shape)).train()
    sizes = {"lora": {"r": asked["rank"]}, "adapter": {"bottleneck": asked["rank"]}, "full": {}, "ia3": {}}[asked["method"]]
    for i in range(asked["adapters"]):
        surgery.attach(model, [registry.get(asked["method"])(**sizes)], name=f"a{i}", on_top=True, head=False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    ids = torch.randint(2000, (asked["batch"], asked["length"]))
    taken = []
    with memory.Peak() as peak:
        for _ in range(STEPS + 1):
            started = time.process_time()
            model(input_ids=ids, labels=torch.zeros(len(ids), dtype=torch.long)).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            taken.append(time.process_time() - started)
    assert peak.reading and peak.reading.value
    return {"score": statistics.median(taken[1:]), "added_mb": peak.reading.value - peak.before_mb, "learning": sum(p.numel() for p in learning)}


def exponent(line: list[tuple[int, float]], *, whole: bool = False) -> float | None:
    """b of y = a n^b by least squares of the logarithms, over the upper half of the points, or over all of them."""
    fitted = line if whole else line[len(line) // 2 :]
    if len(fitted) < 2 or min(y for _, y in fitted) <= 0:
        return None
    return statistics.linear_regression(*zip(*((math.log(n), math.log(y)) for n, y in fitted), strict=True)).slope


def page(table: Table) -> str:
    """docs/growth.md, from the files."""
    parts = []
    for what, sizes in LINES.items():
        rows = []
        for method in (m for m in METHODS if has(m, what)):
            found = [(n, table.found(f"{method} {what} {n}")) for n in sizes]
            for title, field, times, digits in (("CPU ms", "score", 1000, 0), ("added MB", "added_mb", 1, 0)):
                line = [(n, f[field]) for n, f in found if f]
                b = exponent(line) if len(line) == len(sizes) else None
                rows.append([f"`{method}`, {title}", *(f"{times * f[field]:,.{digits}f}" if f else cells.NOT_RUN for _, f in found),
                             f"{b:.2f}" if b is not None else "-"])  # fmt: skip
        parts.append(f"## {what.capitalize()}\n\n{cells.markdown(['n', *map(str, sizes), 'exponent'], rows)}")
    fixed = ", ".join(f"{what} {n}" for what, n in HERE.items())
    joined = "\n\n".join(parts)
    return f"""# How cost grows

A training step of a BERT-shaped model of width 256, fp32, dropout as in the model's config: CPU milliseconds, and the memory that steps add to that of the process
with its adapted model. One thing grows at a time; else {fixed}. "Adapters" are attached one above the other and all learn. The exponent is that of
n, over the upper half of each line; a method whose exponent is above `full`'s would have a term that grows faster than the model's own.

{joined}

Made by `python -m benchmarks.growth` from the files in `benchmarks/results/growth/`; `--table` makes it again from them.
"""


TABLE = Table("growth", every_cell, page)

if __name__ == "__main__":
    if "--point" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--point", type=json.loads)
        print(json.dumps(point(parser.parse_args().point)))
    else:
        TABLE.main()
