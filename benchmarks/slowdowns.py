"""What the formats that are bought for memory cost in time: a packed map beside a float one, for each count of tokens.

    python -m benchmarks.slowdowns [--rounds 9]

`kernels.slowdowns` times them, as `paretune doctor` and the plan do, on one thread; in each round the formats take turns. The sentence of
a format (`sentence`) stands on its card word for word, and a test holds the card to it.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import torch

from benchmarks import cells
from benchmarks.cells import Timing
from paretune import registry
from paretune.errors import all_of
from paretune.weights import kernels

FORMATS = ("int8_weights", "int4", "llm_int8", "fp8", "nf4")
SHAPE = (3072, 768)  # (O, I) of the map: a base model's feed-forward


def measured(rounds: int, *, shape: tuple[int, int] = SHAPE) -> dict[str, Any]:
    """By format each round's slow-downs; rounds outermost."""
    torch.set_num_threads(1)
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in FORMATS}
    for _ in range(rounds):
        for name in FORMATS:
            found[name].append([dataclasses.asdict(s) for s in kernels.slowdowns(registry.get(name)(), shape=shape)])
    return {"shape": shape, "rounds": found}


def medians(found: dict[str, Any], name: str, beside: str) -> list[float]:
    """A format's slow-downs beside a number format, for each count of tokens: medians over the rounds."""
    return [statistics.median(row[beside] for row in same) for same in zip(*found["rounds"][name], strict=True)]


def sentence(found: dict[str, Any], name: str) -> str:
    """What a format's card says of its time: medians over the rounds."""
    tokens = [row["tokens"] for row in found["rounds"][name][0]]
    outputs, inputs = found["shape"]
    machine = f"{found['environment']['cpu']} ({', '.join(found['environment']['cpu_flags'])})"
    said = {dtype: all_of([f"{ratio:.2g}" for ratio in medians(found, name, dtype)]) for dtype in ("fp32", "bf16")}
    return (
        f"Measured on one thread of {machine}, eagerly, by CPU time, a map from {inputs} to {outputs}: for {all_of(map(str, tokens))} tokens "
        f"it takes {said['fp32']} times as long as in fp32, and with inputs in bf16 {said['bf16']} times as long as a bf16 map."
    )


def page(found: dict[str, Any]) -> str:
    """docs/slowdowns.md, from the file."""
    tokens = [row["tokens"] for row in next(iter(found["rounds"].values()))[0]]
    rows = [[f"`{name}`", beside, *(f"{x:.2g}" for x in medians(found, name, beside))] for name in found["rounds"] for beside in ("fp32", "bf16")]
    outputs, inputs = found["shape"]
    return f"""# What formats bought for memory cost in time

CPU time of a map from {inputs} to {outputs} with packed weights, times that of a float map, both eager: one thread of {found["environment"]["cpu"]}
({", ".join(found["environment"]["cpu_flags"])}), medians of {len(next(iter(found["rounds"].values())))} rounds. Beside bf16 the inputs are in bf16, too.
`paretune doctor` prints the same for your processor, and a plan counts with it.

{cells.markdown(["format", "beside", *(f"tokens: {n:,}" for n in tokens)], rows)}

Made by `python -m benchmarks.slowdowns` from `benchmarks/results/slowdowns.json`; `--table` makes it again from the file.
"""


TIMING = Timing("slowdowns", measured, page, rounds=9)

if __name__ == "__main__":
    TIMING.main()
