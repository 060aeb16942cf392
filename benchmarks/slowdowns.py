"""What the formats that are bought for memory cost in time: a packed map beside a float one, for each count of tokens.

    python -m benchmarks.slowdowns [--rounds 9]      times them, on a quiet machine, and writes results/slowdowns.json
    python -m benchmarks.slowdowns --table           only says what the cards have to say, from the file

`kernels.slowdowns` times them, as `paretune doctor` and the plan do, on one thread; in each round the formats take turns. The sentence of
each format stands on its card word for word, and a test holds the card to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from paretune import registry
from paretune.errors import all_of
from paretune.meters import system
from paretune.weights import kernels

FORMATS = ("int8_weights", "int4", "llm_int8", "fp8", "nf4")
SHAPE = (3072, 768)  # (O, I) of the map: a base model's feed-forward
FILE = Path(__file__).parent / "results" / "slowdowns.json"


def main() -> None:
    """Runs the rounds and writes the file; prints the sentences for the cards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--table", action="store_true", help="only print the sentences from the file")
    asked = parser.parse_args()
    if not asked.table:
        FILE.write_text(json.dumps(measured(asked.rounds), indent=1) + "\n")
    found = json.loads(FILE.read_text())
    for name in found["rounds"]:
        print(f"{name}: {sentence(found, name)}")


def measured(rounds: int, *, shape: tuple[int, int] = SHAPE) -> dict[str, Any]:
    """The machine, and by format each round's slow-downs; rounds outermost."""
    torch.set_num_threads(1)
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in FORMATS}
    for _ in range(rounds):
        for name in FORMATS:
            found[name].append([dataclasses.asdict(s) for s in kernels.slowdowns(registry.get(name)(), shape=shape)])
    return {"environment": system.describe(), "shape": shape, "rounds": found}


def sentence(found: dict[str, Any], name: str) -> str:
    """What a format's card says of its time: medians over the rounds."""
    rounds = found["rounds"][name]
    tokens = [row["tokens"] for row in rounds[0]]
    beside = {dtype: [statistics.median(r[i][dtype] for r in rounds) for i in range(len(tokens))] for dtype in ("fp32", "bf16")}
    outputs, inputs = found["shape"]
    machine = f"{found['environment']['cpu']} ({', '.join(found['environment']['cpu_flags'])})"
    said = {dtype: all_of([f"{ratio:.2g}" for ratio in ratios]) for dtype, ratios in beside.items()}
    return (
        f"Measured on one thread of {machine}, by CPU time, a map from {inputs} to {outputs}: for {all_of(map(str, tokens))} tokens "
        f"it takes {said['fp32']} times as long as in fp32, and with inputs in bf16 {said['bf16']} times as long as a bf16 map."
    )


if __name__ == "__main__":
    main()
