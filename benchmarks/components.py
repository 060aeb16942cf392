"""Where a transformer layer's time goes: projections, scaled dot product and feed-forward, counted and measured.

    python -m benchmarks.components [--rounds 5]

One layer, forward, fp32, batch 1, n tokens of width d with heads of 64 features and a feed-forward part of width 4d:

    projections 8 n d²      scaled dot product 4 n² d      feed-forward 16 n d²        floating-point operations

so the dot product is the largest term from n = 4 d on by count. The three parts are timed in turn, medians of CPU time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import cells
from benchmarks.cells import Timing

WIDTHS, LENGTHS = (128, 384, 768), (128, 256, 512, 1024, 2048, 4096, 8192)
HEAD = 64
COUNTED: dict[str, Callable[[int, int], int]] = {  # n, d -> floating-point operations
    "projections": lambda n, d: 8 * n * d**2, "scaled dot product": lambda n, d: 4 * n**2 * d, "feed-forward": lambda n, d: 16 * n * d**2,
}  # fmt: skip
DOCS = Path(__file__).parent.parent / "docs"


def measured(rounds: int) -> dict[str, Any]:
    """CPU seconds of the parts at each point."""
    return {"points": [{"n": n, "d": d, **timed(n, d, rounds=rounds)} for d in WIDTHS for n in LENGTHS]}


def parts(n: int, d: int) -> dict[str, Callable[[], Any]]:
    """The three parts of a layer on random numbers."""
    import torch
    from torch.nn import functional as F

    x, q = torch.randn(1, n, d), torch.randn(1, d // HEAD, n, HEAD)
    square, up, down = torch.randn(d, d), torch.randn(4 * d, d), torch.randn(d, 4 * d)
    return {
        "projections": lambda: [F.linear(x, square) for _ in range(4)],
        "scaled dot product": lambda: F.scaled_dot_product_attention(q, q, q),
        "feed-forward": lambda: F.linear(F.gelu(F.linear(x, up)), down),
    }


def timed(n: int, d: int, *, rounds: int) -> dict[str, Any]:
    """CPU seconds and counted operations of each part, in turn; the first round only warms up."""
    import torch

    from paretune.meters import flops

    taken: dict[str, list[float]] = {name: [] for name in COUNTED}
    with torch.inference_mode():
        works = parts(n, d)
        counted = {name: flops.forward(work, torch.nn.Module()).value for name, work in works.items()}
        assert counted == {name: count(n, d) for name, count in COUNTED.items()}, "the counter and the formulas agree"
        for _ in range(rounds + 1):
            for name, work in works.items():
                begun = time.process_time()
                work()
                taken[name].append(time.process_time() - begun)
    return {"cpu_s": {name: statistics.median(times[1:]) for name, times in taken.items()}, "counted_flops": counted}


def figure(found: dict[str, Any]) -> None:
    """docs/components.png: each part's share of the time (solid) and of the count (dashed) over the length, a panel per width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, panels = plt.subplots(1, len(WIDTHS), figsize=(12, 4), sharey=True, layout="constrained")
    for panel, d in zip(panels, WIDTHS, strict=True):
        points = [p for p in found["points"] if p["d"] == d]
        for name, color in zip(COUNTED, ("#0072B2", "#D55E00", "#009E73"), strict=True):
            lengths, counted = [p["n"] for p in points], [{k: count(p["n"], d) for k, count in COUNTED.items()} for p in points]
            panel.plot(lengths, [_share(p["cpu_s"], name) for p in points], "o-", color=color, label=f"{name}, measured")
            panel.plot(lengths, [_share(c, name) for c in counted], "--", color=color, label=f"{name}, counted")
        panel.set_xscale("log", base=2)
        panel.set_title(f"width {d}")
        panel.set_xlabel("tokens")
    panels[0].set_ylabel("share of a layer's forward, percent")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    drawn.savefig(DOCS / "components.png", dpi=110)


def _share(of: dict[str, float], name: str) -> float:
    return 100 * of[name] / sum(of.values())


def page(found: dict[str, Any]) -> str:
    """docs/components.md and its figure, from the file."""
    figure(found)
    rows = []
    for d in WIDTHS:
        points = [p for p in found["points"] if p["d"] == d]
        first = next((f"{p['n']:,}" for p in points if max(p["cpu_s"], key=p["cpu_s"].get) == "scaled dot product"), f"beyond {max(LENGTHS):,}")
        rows.append([f"{d}", f"{4 * d:,}", first])
    return f"""# Where a layer's time goes

A layer of width d does 8 n d² operations in its projections, 4 n² d in the scaled dot product and 16 n d² in the feed-forward part, for n tokens. The dot
product overtakes the feed-forward part at n = 4 d by count. Measured on {found["environment"].get("cpu")}
({found["environment"].get("threads")} threads, fp32, forward, CPU time):

![Shares of a layer's time by component](components.png)

{cells.markdown(["width", "largest by count from (tokens)", "largest by time from (tokens, of those tried)"], rows)}

Made by `python -m benchmarks.components` from `benchmarks/results/components.json`; `--table` makes page and figure again from the file.
"""


TIMING = Timing("components", measured, page, rounds=5)

if __name__ == "__main__":
    TIMING.main()
