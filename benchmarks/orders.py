"""LoRA's product in its two orders: xWᵀ + s (xAᵀ)Bᵀ and x(W + s BA)ᵀ, and whether the one with fewer operations is the faster.

    python -m benchmarks.orders [--rounds 7]

One linear map and its adapter in fp32, on one thread. The orders take turns within a round, every second round backwards.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import cells
from benchmarks.cells import Timing
from paretune import surgery
from paretune.anatomy import Site
from paretune.methods.adapters.lora import WORTH, LoRA, LowRank, operations

SHAPES = ((384, 384), (1536, 384), (384, 1536))  # (O, I)
RANKS = (8, 64, 256)
ROWS = (16, 64, 128, 256, 512, 1024)
SECONDS = 0.03  # of one way in a round


def measured(rounds: int) -> dict[str, Any]:
    """The timings of all shapes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timed = [timing(shape, r, rows=n, learns=learns, rounds=rounds) for learns in (False, True) for shape in SHAPES for r in RANKS for n in ROWS]
    return {"rounds": rounds, "timed": timed}


def timing(shape: tuple[int, int], r: int, *, rows: int, learns: bool, rounds: int) -> dict[str, Any]:
    """CPU seconds of a map's answer, or of its forward and backward pass, in both orders by round, and what is chosen."""
    module, patch = _map(shape, r)
    x = torch.randn(rows, shape[1], requires_grad=learns)
    orders = {"thin": lambda: patch(x, F.linear(x, module.weight, module.bias)), "whole": lambda: _whole(patch, module, x)}
    taken: dict[str, list[float]] = {name: [] for name in orders}
    with torch.set_grad_enabled(learns):
        for i in range(rounds):
            for name in list(orders)[:: 1 if i % 2 else -1]:
                taken[name].append(_seconds(lambda order=orders[name]: _done(order(), [x, patch.A, patch.B] if learns else [])))
    thin, whole = operations(rows, shape, r=r, learns=learns)
    chosen = "whole" if whole + WORTH <= thin else "thin"
    return {"shape": shape, "r": r, "rows": rows, "learns": learns, "thin": thin, "whole": whole, "chosen": chosen, "cpu_s": taken}


def _map(shape: tuple[int, int], r: int) -> tuple[nn.Module, LowRank]:
    model, method = nn.Sequential(nn.Linear(shape[1], shape[0])).requires_grad_(False), LoRA(r=r)
    patch = surgery.install(model, "default", method=method, site=Site("other", "0", in_features=shape[1], out_features=shape[0]))
    nn.init.normal_(patch.B, std=0.01)
    return model[0], patch


def _whole(patch: LowRank, module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, torch.addmm(module.weight, patch.B, patch.A, alpha=patch.scale), module.bias)


def _done(y: Tensor, gradients: list[Tensor]) -> None:
    if gradients:
        torch.autograd.grad(y, gradients, torch.ones_like(y))


def _seconds(call: Any) -> float:
    call()
    begun, times = time.process_time(), 0
    while time.process_time() - begun < SECONDS:
        call()
        times += 1
    return (time.process_time() - begun) / times


def page(found: dict[str, Any]) -> str:
    """docs/orders.md, from the file."""
    tables = {learns: cells.markdown(["map", "r", *(f"{n} rows" for n in ROWS)], _rows(found["timed"], learns)) for learns in (False, True)}
    whole = [t for t in found["timed"] if t["chosen"] == "whole"]
    ratios = [statistics.median(_ratios(t)) for t in whole]
    return f"""# The order of LoRA's product

A map W (O, I) with `lora(r)` is x Wᵀ + s (x Aᵀ) Bᵀ, or x (W + s BA)ᵀ. `lora` takes the second order where that saves at least {WORTH:,.0f} of the operations it
counts for the shapes at hand (`operations` in `lora.py` has the formulas), one LoRA stands alone at a float map of its own, and nothing is dropped out.

CPU time of the second order as a share of the first's, medians of {found["rounds"]} rounds on one thread of {found["environment"].get("cpu")}, fp32;
**bold** where it is chosen. Where it is chosen, it takes {min(ratios):.2f} to {max(ratios):.2f} of the time;
above 1 it would be slower, in {sum(r > 1 for r in ratios)} of {len(ratios)} places.

## An answer, without gradients

{tables[False]}

## A training step, forward and backward

The gradient for W + s BA is a product as large as x Wᵀ, so the second order pays for large ranks alone.

{tables[True]}

Made by `python -m benchmarks.orders` from `benchmarks/results/orders.json`; `--table` makes it again from the file.
"""


def _rows(timed: list[dict[str, Any]], learns: bool) -> list[list[str]]:
    by = {(tuple(t["shape"]), t["r"], t["rows"]): t for t in timed if t["learns"] == learns}
    return [[f"{shape[1]} to {shape[0]}", str(r), *(_shown(by[shape, r, n]) for n in ROWS)] for shape in SHAPES for r in RANKS]


def _shown(timing: dict[str, Any]) -> str:
    ratio = f"{statistics.median(_ratios(timing)):.2f}"
    return f"**{ratio}**" if timing["chosen"] == "whole" else ratio


def _ratios(timing: dict[str, Any]) -> list[float]:
    return [w / t for w, t in zip(timing["cpu_s"]["whole"], timing["cpu_s"]["thin"], strict=True)]


TIMING = Timing("orders", measured, page, rounds=7)

if __name__ == "__main__":
    TIMING.main()
