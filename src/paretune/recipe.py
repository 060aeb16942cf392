"""The algebra: a recipe is phases of methods; `+` is with, `|` is then, and `|` binds looser.

    recipe := phase ("|" phase)*        phase := term ("+" term)*
    term   := name [ "(" [knob ("," knob)*] ")" ]   knob := [name "="] value, without a name in the card's order
    value  := number | text in quotes | True | False | None | "[" plain values "]" | "@" number

Parsing never evaluates code. `parse(str(recipe)) == recipe`, always.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from typing import Any

from paretune import registry
from paretune.errors import Incompatible, RecipeError, unknown
from paretune.roles import Adapter, After, Method, Modifier, Readout, Trail, Transform

Phase = tuple[Method, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """Phases of methods. A recipe of one method equals that method."""

    phases: tuple[Phase, ...]

    def __add__(self, other: Method | Recipe) -> Recipe:
        left, right = self.phases, as_recipe(other).phases
        if len(left) > 1 or len(right) > 1:
            raise RecipeError(f"{self} + {other}: + joins the methods of one phase, and a recipe that holds | has several; use | between phases")
        return Recipe(((*left[0], *right[0]),))

    def __or__(self, other: Method | Recipe) -> Recipe:
        return Recipe(self.phases + as_recipe(other).phases)

    def __radd__(self, other: Method) -> Recipe:
        return as_recipe(other) + self

    def __ror__(self, other: Method) -> Recipe:
        return as_recipe(other) | self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe | Method) and self.phases == as_recipe(other).phases

    def __hash__(self) -> int:
        (first, *more) = (method for phase in self.phases for method in phase)
        return hash(self.phases) if more else hash(first)

    def __str__(self) -> str:
        return spell(self.phases)

    __repr__ = __str__

    @property
    def resolved(self) -> str:
        """The text with every default written out."""
        return spell(self.phases, defaults=True)

    @property
    def id(self) -> str:
        """A name of 12 hexadecimal digits for what the recipe says, however it was written."""
        return hashlib.sha256(self.resolved.encode()).hexdigest()[:12]

    def prefix(self, k: int) -> Recipe:
        """The first k phases."""
        return Recipe(self.phases[:k])

    def behind(self, phases: int) -> Recipe:
        """This recipe as it is spelled behind so many other phases: each `@k` is `@(k + phases)`, and `@0` what it starts from."""
        return Recipe(tuple(tuple(_renumbered(method, phases) for method in phase) for phase in self.phases))

    def check(self) -> Recipe:
        """This recipe, if it composes.

        Raises:
            Incompatible: naming the phase, the reason and what to write instead.
        """
        trail = Trail()
        readouts = [m for phase in self.phases for m in phase if isinstance(m, Readout)]
        if len(readouts) > 1:
            raise Incompatible(f"{self}: a recipe has at most one readout, not {len(readouts)}")
        for k, phase in enumerate(self.phases):
            _check_phase(phase)
            ranges = trail.ranges
            for method in phase:
                _check_models(method, k)
                try:
                    _check_words(method, trail.readout)
                    _check_ranges(method, ranges)
                    trail = method.follow(trail)
                except Incompatible as error:
                    raise Incompatible(f"{self}: {error}" if str(self) not in str(error) else str(error)) from None
        return self


def as_recipe(source: str | Method | Recipe) -> Recipe:
    """The recipe that a text, a method or a recipe stands for."""
    if isinstance(source, str):
        return parse(source)
    return source if isinstance(source, Recipe) else Recipe(((source,),))


def as_written(source: str | Method | Recipe) -> str:
    """The canonical text of a recipe, in which a named recipe keeps the name that the text has for it."""
    if not isinstance(source, str):
        return str(as_recipe(source))
    parser = _Parser(source)
    parser.recipe()
    return "".join(parser.written)


def spell(phases: tuple[Phase, ...], *, defaults: bool = False) -> str:
    """The canonical text of phases."""
    return " | ".join(" + ".join(m.spell(defaults=defaults) for m in phase) for phase in phases)


def after(phase: int) -> After:
    """`@k`: the frozen model after phase k (0 is the loaded backbone), for modifiers that take a model."""
    return After(phase)


def is_training(phase: Phase) -> bool:
    """Does the phase train (has it adapters)?"""
    return any(isinstance(method, Adapter) for method in phase)


def _renumbered(method: Method, phases: int) -> Method:
    models = {name: After(value.phase + phases) for name, value in method.knobs(defaults=True).items() if isinstance(value, After)}
    return dataclasses.replace(method, **models) if models else method  # type: ignore[type-var]


def _check_ranges(method: Method, ranges: Modifier | None) -> None:
    if ranges is not None and not method.keeps_ranges:
        raise Incompatible(f"{method!r}: {ranges!r} has learned step sizes for the weights as they are; pack them first ({ranges.becomes}), or put it before")


def _check_phase(phase: Phase) -> None:
    text = spell((phase,))
    alone = [m for m in phase if isinstance(m, Transform | Readout)]
    if alone and len(phase) > 1:
        raise Incompatible(f"{text}: {alone[0]!r} is a {alone[0].role} and stands alone in its phase; use | around it")
    if not alone and not is_training(phase):
        raise Incompatible(f"{text}: nothing learns in this phase; put an adapter beside {phase[0]!r}, such as full + {phase[0]!r}")
    kinds = [type(m) for m in phase if isinstance(m, Modifier)]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice:
        raise Incompatible(f"{text}: {twice.spelling()} stands twice in one phase; keep one")


def _check_words(method: Method, readout: Readout | None) -> None:
    if isinstance(method, Transform) and method.needs_processor and readout is not None and readout.speaks:
        raise Incompatible(f"{readout!r} keeps its prompt and its words in the tokenizer's numbers, which {method!r} would outdate; put {method!r} before it")


def _check_models(method: Method, k: int) -> None:
    for value in method.knobs(defaults=True).values():
        if isinstance(value, After) and value.phase > k:
            raise Incompatible(f"{method!r} stands in phase {k + 1} and can name @0 to @{k}, not {value!r}")


_TOKEN = re.compile(
    r"\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<text>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')|(?P<sign>[()\[\],=|+@]))"
)
_WORDS = {"True": True, "False": False, "None": None}


def parse(text: str) -> Recipe:
    """The recipe a text spells, checked; a text of modifiers alone is read as a part of a phase.

    Raises:
        RecipeError: for a sign, name, knob or value that cannot be read; says where and what was expected.
        Incompatible: for methods that do not compose.
    """
    result = _Parser(text).recipe()
    fragment = len(result.phases) == 1 and all(isinstance(m, Modifier) for m in result.phases[0])
    return result if fragment else result.check()


class _Parser:
    """Recursive descent over the grammar above."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(_tokens(text))
        self.at = 0
        self.before = 0  # phases in front of the one that is read
        self.written: list[str] = []  # the canonical text, in which named recipes keep their names

    def recipe(self) -> Recipe:
        result = self._phase()
        while self._skip("|"):
            self.written.append(" | ")
            self.before = len(result.phases)
            result = result | self._phase()
        if self._kind() != "end":
            self._fail("| or + or the end")
        return result

    def _phase(self) -> Recipe:
        total = self._term()
        while self._skip("+"):
            self.written.append(" + ")
            total = total + self._term()
        return total

    def _term(self) -> Recipe:
        name = self._take("name", "the name of a method")
        if name in registry.names("recipe"):
            if self._peek("("):
                raise RecipeError(f"{self.text}: {name} is a named recipe and takes no knobs; it stands for {registry.line_of(name)}")
            self.written.append(name)
            return _Parser(registry.line_of(name)).recipe().behind(self.before)
        entry = registry.describe(name)
        knobs = self._knobs(name, [k["name"] for k in entry.knobs]) if self._skip("(") else {}
        method = registry.get(name)(**knobs)
        self.written.append(method.spell())
        return as_recipe(method)

    def _knobs(self, method: str, allowed: list[str]) -> dict[str, Any]:
        knobs: dict[str, Any] = {}
        while not self._skip(")"):
            if knobs and not self._skip(","):
                self._fail(", or )")
            if knobs and self._skip(")"):
                break
            name = self._knob_name(method, allowed, knobs)
            if name in knobs:
                raise RecipeError(f"{method}: {name} is given twice")
            knobs[name] = self._value()
        return knobs

    def _knob_name(self, method: str, allowed: list[str], knobs: dict[str, Any]) -> str:
        kind, name, _ = self.tokens[self.at]
        if kind != "name" or name in _WORDS:  # a value without a name is for the next knob in order
            if len(knobs) >= len(allowed):
                raise RecipeError(f"{method} has {len(allowed)} knobs, and more values were given" if allowed else f"{method} has no knobs")
            return allowed[len(knobs)]
        if name not in allowed:
            raise RecipeError(unknown(f"{method}: knob", name, allowed=allowed) if allowed else f"{method} has no knobs; {name!r} was given")
        self.at += 1
        if not self._skip("="):
            self._fail("=")
        return name

    def _value(self) -> Any:
        kind, token, _ = self.tokens[self.at]
        self.at += 1
        if kind == "number":
            return int(token) if re.fullmatch(r"[+-]?\d+", token) else float(token)
        if kind == "text":
            return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], token[1:-1])
        if token == "@":
            return After(int(self._take("number", "the number of a phase")))
        if token in ("[", "("):
            close = {"[": "]", "(": ")"}[token]
            items = []
            while not self._skip(close):
                if self._peek("[") or self._peek("("):
                    self._fail("a plain value, as lists hold no lists")
                items.append(self._value())
                if not self._skip(",") and not self._peek(close):
                    self._fail(f", or {close}")
            return tuple(items)
        if kind == "name" and token in _WORDS:
            return _WORDS[token]
        self.at -= 1
        return self._fail('a value: a number, a "text" in quotes, True, False, None, [a list] or @0')

    def _kind(self) -> str:
        return self.tokens[self.at][0]

    def _peek(self, sign: str) -> bool:
        kind, token, _ = self.tokens[self.at]
        return kind == "sign" and token == sign

    def _skip(self, sign: str) -> bool:
        found = self._peek(sign)
        self.at += found
        return found

    def _take(self, kind: str, what: str) -> str:
        if self._kind() != kind:
            self._fail(what)
        self.at += 1
        return self.tokens[self.at - 1][1]

    def _fail(self, expected: str) -> Any:
        _, token, column = self.tokens[self.at]
        found = f"found {token}" if token else "the recipe ends"
        raise RecipeError(f"{self.text!r}: expected {expected} at column {column}, but {found}")


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    at = 0
    end = len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if not match or not match.lastgroup:
            column = at + 1 + len(text[at:]) - len(text[at:].lstrip())
            raise RecipeError(f"{text!r}: {text[column - 1]!r} at column {column} has no meaning in a recipe (a text needs both its quotes)")
        yield match.lastgroup, match[match.lastgroup], match.start(match.lastgroup) + 1
        at = match.end()
    yield "end", "", end + 1
