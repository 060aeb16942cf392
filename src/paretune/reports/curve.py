"""learning_curve.png: the score of each run against its share of the training rows, the fitted curve, and where it leads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from paretune import learning_curves
from paretune.learning_curves import Doubling, Points
from paretune.store import written_file

_BLUE, _ORANGE, _INK = "#0072B2", "#D55E00", "#57606A"


def save(points: Points, doubled: Doubling, *, path: Path, title: str) -> Path:
    """Writes the picture as PNG; returns the path."""
    figure = draw(points, doubled, title=title)
    with written_file(path) as part:
        figure.savefig(part, format="png", dpi=160, facecolor="white", metadata={"Software": "paretune"})
    return path


def draw(points: Points, doubled: Doubling, *, title: str) -> Figure:
    """Runs as dots, the curve through them, and the doubled split with its interval."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curve = learning_curves.chosen(points.sizes, points.scores)
    sizes = np.geomspace(min(points.sizes), 2 * max(points.sizes), 200)
    known = sizes <= max(points.sizes)
    axes.plot(sizes[known], curve.at(sizes[known]), color=_BLUE, label=f"fitted ({curve.family})")
    axes.plot(sizes[~known], curve.at(sizes[~known]), color=_BLUE, linestyle="--")
    axes.plot(points.sizes, points.scores, "o", color=_BLUE, label="runs")
    then = doubled.then
    axes.errorbar([then.size], [then.score], [[max(0.0, then.score - then.low)], [max(0.0, then.high - then.score)]], fmt="D", color=_ORANGE, capsize=4,
                  label="expected of twice the rows, 95 % of runs")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([*sorted(set(points.sizes)), then.size])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="training rows", ylabel="score on the test split")
    axes.grid(color="#D9DEE3", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    return figure
