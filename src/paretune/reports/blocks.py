"""Which block of a model a task pulls at most: the ranking that `surgical` chose by, as bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from paretune.errors import StoreError
from paretune.methods.adapters.surgical import FACT
from paretune.recipe import parse
from paretune.store import Run, written_file

_TUNED, _OTHER = "#0072B2", "#B8BEC4"


def ranked(run: Run) -> bool:
    """Were blocks ranked in this run, so that there is a picture to save?"""
    return bool(_ranked(run))


def save(run: Run, path: Path) -> Path:
    """Writes the ranking of a run's first surgical phase as PNG; returns the path.

    Raises:
        StoreError: for a run in which no blocks were ranked.
    """
    figure = draw(_phase(run))
    with written_file(path) as part:
        figure.savefig(part, format="png", dpi=160, facecolor="white", metadata={"Software": "paretune"})
    return path


def draw(phase: dict[str, Any]) -> Figure:
    """A bar for each block from the inputs to the outputs, as long as its relative gradient norm; what learned stands out."""
    ranked = {name.removeprefix(FACT): value for name, value in phase["facts"].items() if name.startswith(FACT)}
    tuned = [block for method in parse(phase["decided"]).phases[0] for block in method.knobs().get("blocks", "").split()]
    order = sorted(ranked, key=_place)
    figure = Figure(figsize=(7.0, 1.2 + 0.32 * len(order)))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh(order, [ranked[block] for block in order], color=[_TUNED if block in tuned else _OTHER for block in order])
    axes.invert_yaxis()
    axes.set_xlabel("relative gradient norm ‖∇L‖ / ‖θ‖ of the block before training")
    axes.set_title(f"{phase['spelling']}: {', '.join(tuned)} learned", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _place(block: str) -> tuple[int, str, int]:
    """From the inputs to the outputs: embeddings, the layers of each stack, the rest."""
    stack, _, index = block.rpartition(".")
    return ({"embeddings": 0, "rest": 2}.get(block, 1), {"encoder": "0", "decoder": "1"}.get(stack, ""), int(index) if index.isdigit() else 0)


def _ranked(run: Run) -> list[dict[str, Any]]:
    return [p for p in run.record["phases"] if any(name.startswith(FACT) for name in p.get("facts", {}))]


def _phase(run: Run) -> dict[str, Any]:
    found = _ranked(run)
    if not found:
        raise StoreError(f"{run.folder}: no blocks were ranked in this run; surgical(blocks=\"auto\") ranks them")
    return found[0]
