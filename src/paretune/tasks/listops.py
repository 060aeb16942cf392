"""`listops`: the value of a nested expression over digits, as in `[MAX 2 9 [MIN 4 7 ] 0 ]`, which is 9.

    E -> digit | [OP E E ... ]      OP one of MIN, MAX, MED (the median, cut to a whole number), SM (the sum modulo 10)

Nangia & Bowman 2018, arXiv:1804.06028, in the form of the Long Range Arena (Tay et al. 2020, arXiv:2011.04006): an expression is
an operator with probability 1/4 above the largest depth, of 2 to 10 arguments, and those of the wanted length are kept.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable, Iterable, Iterator

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "MIN": min, "MAX": max, "MED": lambda values: int(statistics.median(values)), "SM": lambda values: sum(values) % 10,
}  # fmt: skip
NESTED, ARGUMENTS, DEPTH = 0.25, (2, 10), 10  # probability of an operator; its least and most arguments; the largest depth
VOCABULARY = (*map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]")


@functools.cache
def rows(count: int, *, shortest: int, longest: int) -> tuple[dict[str, str], ...]:
    """So many different expressions of more than `shortest` and fewer than `longest` symbols: `{"text": ..., "value": ...}`; always the same ones."""
    random_numbers = random.Random(0)
    found: dict[str, str] = {}
    while len(found) < count:
        symbols: list[str] = []
        _extend(symbols, random_numbers, depth=1, longest=longest)
        if shortest < len(symbols) < longest:
            found[" ".join(symbols)] = str(value(symbols))
    return tuple({"text": text, "value": answer} for text, answer in found.items())


def _extend(symbols: list[str], random_numbers: random.Random, *, depth: int, longest: int) -> None:
    """Adds an expression, or the beginning of one that is too long anyway."""
    if depth == DEPTH or random_numbers.random() > NESTED:
        symbols.append(str(random_numbers.randrange(10)))
        return
    symbols.append(f"[{random_numbers.choice(tuple(OPERATORS))}")
    for _ in range(random_numbers.randint(*ARGUMENTS)):
        if len(symbols) >= longest:
            return
        _extend(symbols, random_numbers, depth=depth + 1, longest=longest)
    symbols.append("]")


def value(symbols: Iterable[str]) -> int:
    """What an expression is worth."""
    rest = iter(symbols)
    return _value(next(rest), rest)


def _value(symbol: str, rest: Iterator[str]) -> int:
    if symbol.isdigit():
        return int(symbol)
    arguments = []
    while (following := next(rest)) != "]":
        arguments.append(_value(following, rest))
    return OPERATORS[symbol[1:]](arguments)
