"""What one search found starts another: the draws behind an earlier frontier are tried first, on few rows of the new task, as any other draw is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paretune.errors import Incompatible, RecipeError, StoreError
from paretune.recipe import parse
from paretune.searches import journal
from paretune.searches.aims import Aims
from paretune.searches.journal import Entry, Journal
from paretune.searches.space import BACKBONE, ON, Space

MOST = 8  # draws that are taken over


class Known:
    """Values that are known; what is not among them, or not in its range, is a KeyError."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params

    def suggest_int(self, name: str, *, low: int, high: int, log: bool = False) -> int:
        """The known number."""
        return int(self._within(name, low, high))

    def suggest_float(self, name: str, *, low: float, high: float, log: bool = False) -> float:
        """The known number."""
        return float(self._within(name, low, high))

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """The known choice."""
        if self.params[name] not in choices:
            raise KeyError(name)
        return str(self.params[name])

    def _within(self, name: str, low: float, high: float) -> Any:
        if not low <= self.params[name] <= high:
            raise KeyError(name)
        return self.params[name]


def starts(earlier: Path, *, space: Space, aims: Aims) -> list[dict[str, Any]]:
    """The draws of this space behind the frontier of an earlier search, the best score first.

    Args:
        earlier: the results folder of a search, of any task; its space may have been another one.
        aims: of the new search; where the old one did not measure its costs, the best by score stand for the frontier.

    Raises:
        StoreError: where there was no search, or nothing it tried is in this space.
    """
    if not (earlier / journal.FILE).is_file():
        raise StoreError(f"{earlier} holds no search ({journal.FILE}) that another one could start from")
    done = [e for e in Journal(earlier / journal.FILE).entries() if e.kind == "trial" and e.state == "complete"]
    tops = [e for e in done if e.rows == max(other.rows for other in done)]
    measured = [e for e in tops if None not in aims.values(e)]
    ranked = [*aims.front(measured), *aims.order(measured)] if measured else sorted(tops, key=lambda e: -(e.score or 0.0))
    found = [e.params for e in {e.recipe: e for e in reversed(ranked)}.values() if _is_in(space, e)][::-1]
    if not found:
        raise StoreError(f"none of the {len(tops)} recipes that the search in {earlier} tried on all its rows is in the space {space.text!r}")
    return found[:MOST]


def _is_in(space: Space, entry: Entry) -> bool:
    """Does the space give this recipe for the values of its draw?"""
    try:
        _, recipe = space.parted(space.draw(Known(entry.params)))
        return parse(recipe) == parse(entry.recipe.removeprefix(str(entry.params.get(BACKBONE)) + ON))
    except (KeyError, Incompatible, RecipeError):
        return False
