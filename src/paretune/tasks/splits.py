"""Three splits by content hash: the same example always lands on the same side, and duplicates never cross.

`u(key)` is a uniform number in [0, 1) from the sha256 of the input; test is u < 0.15, validation the next 0.15, the rest is train.
A class too small for chance to be fair (under `SMALL` different inputs) is cut at the same shares along the order of u instead, so
that it stands on every side; that too depends on content alone, never on the order of the rows.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence

HELD_OUT = 0.15
SMALL = 100


def digest(key: str, salt: str = "") -> str:
    """sha256 of the salt and the key, hexadecimal."""
    return hashlib.sha256(f"{salt}\n{key}".encode("utf-8", "surrogatepass")).hexdigest()


def uniform(key: str, salt: str = "split") -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int(digest(key, salt)[:13], 16) / 16**13


def by_hash(keys: Sequence[str], want: Sequence[str] = ("test", "validation"), *, share: float = HELD_OUT) -> list[str]:
    """For each key the split it belongs to: each wanted split takes `share`, "train" the rest."""
    return [_side(uniform(key), want, share) for key in keys]


def within_classes(keys: Sequence[str], classes: Sequence[Hashable], *, want: Sequence[str] = ("test", "validation")) -> list[str]:
    """As `by_hash`, with every class of three or more different inputs on every side.

    An input that bears several classes counts for the first of them in sorted order.
    """
    home: dict[str, Hashable] = {}
    for key, label in zip(keys, classes, strict=True):
        home[key] = min(home.get(key, label), label, key=str)
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for key, label in home.items():
        groups[label].append(key)
    side: dict[str, str] = {}
    for members in groups.values():
        chosen = by_hash(members, want)
        if len(members) < SMALL or len(set(chosen)) <= len(want):
            members = sorted(members, key=uniform)
            chosen = _ranked(len(members), want)
        side.update(zip(members, chosen, strict=True))
    return [side[key] for key in keys]


def fold(key: str, *, k: int, of: int) -> str:
    """The split of an input in fold k of `of`."""
    if int(uniform(key, "fold") * of) == k:
        return "test"
    return _side(uniform(key, "fold validation"), ("validation",), HELD_OUT)


def _side(u: float, want: Sequence[str], share: float) -> str:
    place = int(u / share)
    return want[place] if place < len(want) else "train"


def _ranked(count: int, want: Sequence[str]) -> list[str]:
    """Sides for `count` inputs in order: the share of each wanted split, rounded, at least one while one is left for train."""
    sides: list[str] = []
    for split in want:
        sides += [split] * min(max(1, round(HELD_OUT * count)), max(0, count - 1 - len(sides)))
    return sides + ["train"] * (count - len(sides))
