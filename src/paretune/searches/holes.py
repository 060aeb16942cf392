"""What stands in a recipe with ranges where a value is open: numbers, switches, choices; and where values come from."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Protocol

NONE = "\0"  # in the place of a part that is left out
MARK = "\1"  # around what says where switches are read


class Suggest(Protocol):
    """Where values come from; a trial of Optuna is one."""

    def suggest_int(self, name: str, *, low: int, high: int, log: bool = False) -> int:
        """A whole number from low to high."""

    def suggest_float(self, name: str, *, low: float, high: float, log: bool = False) -> float:
        """A number from low to high."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of the choices."""


class Seeded:
    """Values by chance, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def suggest_int(self, name: str, *, low: int, high: int, log: bool = False) -> int:
        """A whole number from low to high."""
        return round(self.suggest_float(name, low=low, high=high, log=True)) if log else self.random.randint(low, high)

    def suggest_float(self, name: str, *, low: float, high: float, log: bool = False) -> float:
        """A number from low to high."""
        return math.exp(self.random.uniform(math.log(low), math.log(high))) if log else self.random.uniform(low, high)

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of the choices."""
        return self.random.choice(list(choices))


@dataclasses.dataclass(frozen=True)
class Range:
    """A number between two ends, both included."""

    name: str
    low: float
    high: float
    log: bool

    def draw(self, suggest: Suggest) -> str:
        """The number's text."""
        if self.whole:
            return str(suggest.suggest_int(self.name, low=int(self.low), high=int(self.high), log=self.log))
        return repr(float(f"{suggest.suggest_float(self.name, low=self.low, high=self.high, log=self.log):.4g}"))

    @property
    def whole(self) -> bool:
        """Are its values whole numbers?"""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def size(self) -> float:
        """How many values it has."""
        return self.high - self.low + 1 if self.whole else math.inf

    def texts(self) -> Iterator[str]:
        """Every value, of whole numbers."""
        return map(str, range(int(self.low), int(self.high) + 1))

    def corners(self) -> list[str]:
        """Its ends."""
        return [repr(self.low), repr(self.high)]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several parts, each of which may have holes."""

    name: str
    options: dict[str, Parts]  # by their source

    def draw(self, suggest: Suggest) -> str:
        """The text of the option that is picked."""
        return self.options[suggest.suggest_categorical(self.name, list(self.options))].draw(suggest)

    @property
    def size(self) -> float:
        """How many texts it stands for."""
        return sum(parts.size for parts in self.options.values())

    def texts(self) -> Iterator[str]:
        """Every text, of a finite choice."""
        return itertools.chain.from_iterable(parts.texts() for parts in self.options.values())

    def corners(self) -> list[str]:
        """The corners of every option."""
        return [text for parts in self.options.values() for text in parts.corners()]


@dataclasses.dataclass(frozen=True)
class Each:
    """A switch for each whole number between two ends; its place is marked first, as all places of one name have the same switches."""

    name: str
    low: int
    high: int

    def draw(self, suggest: Suggest) -> str:
        """Its mark."""
        return f"{MARK}{self.name} {self.low} {self.high}{MARK}"

    @property
    def size(self) -> float:
        """How many ways to switch there are."""
        return 2.0 ** (self.high - self.low + 1)

    def texts(self) -> Iterator[str]:
        """Its mark."""
        yield self.draw(Seeded(0))

    def corners(self) -> list[str]:
        """All, and the first alone."""
        return [listed(range(self.low, self.high + 1)), listed([self.low])]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Text with holes in it."""

    parts: tuple[str | Range | Each | Choice, ...]

    def draw(self, suggest: Suggest) -> str:
        """The text with its holes filled."""
        return "".join(part if isinstance(part, str) else part.draw(suggest) for part in self.parts)

    @property
    def holes(self) -> list[Range | Each | Choice]:
        """The holes, apart from those within options."""
        return [part for part in self.parts if not isinstance(part, str)]

    @property
    def size(self) -> float:
        """How many texts it stands for."""
        return math.prod(hole.size for hole in self.holes)

    def texts(self) -> Iterator[str]:
        """Every text, of finitely many."""
        for filled in itertools.product(*([part] if isinstance(part, str) else part.texts() for part in self.parts)):
            yield "".join(filled)

    def corners(self) -> list[str]:
        """Few texts in which every option and every end of a range stands at least once."""
        lists = [[part] if isinstance(part, str) else part.corners() for part in self.parts]
        return ["".join(texts[i % len(texts)] for texts in lists) for i in range(max(map(len, lists), default=0))]


def listed(numbers: Sequence[int]) -> str:
    """As a knob's value; what has none of them is left out."""
    return f'"{",".join(map(str, numbers))}"' if numbers else NONE
