"""What a method says about itself: where it comes from, what it lowers, and what may be set on it.

Both are literals in the method's file, so that the registry can read them without importing the file (or torch).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

LOWERS = {"E": "the cost of one example", "D": "the number of examples", "H": "the number of configurations tried"}


@dataclasses.dataclass(frozen=True)
class Card:
    """The facts a method declares; `lowers` names the factors of Cost(R) ∝ E·D·H it reduces (Schwartz et al. 2019)."""

    title: str
    paper: str
    arxiv: str  # its number, or "" where the idea has no paper on arXiv
    equation: str
    lowers: str  # letters out of E, D, H
    why: str  # one sentence: how it lowers them, and what it costs
    lr: float | None = None  # default peak learning rate of a training phase with this adapter
    lr_falls_with_size: bool = False  # is `lr` for 12 layers of width 768, to be scaled by 12 · 768 / (layers · width)?
    exact_at_start: bool = False  # attached and untrained, the output is the backbone's, bit for bit
    note: str = ""  # where paper and code disagree, where it is not faster, ...

    def __post_init__(self) -> None:
        assert set(self.lowers) <= set(LOWERS), f"lowers={self.lowers!r}: letters out of E, D, H"


def knob(
    default: Any,
    help: str,  # noqa: A002 - the field's usual word
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[Any] | None = None,
    search: str = "",
) -> Any:
    """A dataclass field with one line of help and its allowed range (`low`..`high`, both included, or `choices`).

    `search` is the range a search draws from, written as in a search space: "2..64 log", "attention, ffn, linear".
    """
    metadata = {"help": help, "low": low, "high": high, "choices": tuple(choices) if choices else None, "search": search}
    return dataclasses.field(default=default, metadata=metadata)
