"""A search space is a recipe with holes; a draw fills them, and `recipe.parse` reads what then stands there. Nothing is evaluated.

    [2..64 log]                 a number from 2 to 64, even in its logarithm; whole where both ends are written so; [0.1..1]
    [0..5 each]                 each of 0 to 5 or not, as "0,2,5", switches that are one for all knobs of that name; [0.. each] to the last layer
    {attention, ffn, "a b"}     as a knob's value: one of these; bare words are texts
    {none, int8, merge | int8}  in the place of a method: one of these parts of a recipe, which may have holes; none leaves the place out
    lora(..), lora(r=..)        the ranges that the method's card suggests: of every knob not written, or of this one
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from paretune import registry
from paretune.errors import Incompatible, RecipeError
from paretune.recipe import parse
from paretune.searches.holes import MARK, NONE, Choice, Each, Parts, Range, Suggest, listed

_SIZES = "{1, 3, 6, 12, 24, 48, 96, 192, 384, 768}"
NAMED = {
    # from a trained head to full fine-tuning, on a part of the data or all, as it is or packed
    "auto": "{{head, bitfit, ia3, adapter(..), full} + {none, random_subset(..)}, lora(..) + {none, random_subset(..)} | {none, merge}} | {none, int8}",
    # Zhou et al. 2023, arXiv:2301.12132: which layers have them, and the sizes 768 / 2^k or none of each kind; at their rate
    "autopeft": f'{{none, adapter(form="pfeiffer", norms=False, bottleneck={_SIZES}, layers=[0.. each])}}'
    f' + {{none, adapter(form="parallel", norms=False, bottleneck={_SIZES}, layers=[0.. each])}}'
    f" + {{none, prefix(length={_SIZES}, layers=[0.. each])}} + schedule(lr=1e-4)",
}
LAYERS = 12  # of a backbone that is not known yet
BACKBONE, ON = "backbone", ": "  # the parameter that picks one, and what stands behind it


@dataclasses.dataclass(frozen=True)
class Space:
    """Recipes with ranges; where there are several backbones, on one of them each, written "backbone: recipe"."""

    text: str
    parts: Parts
    backbones: tuple[str, ...] = ()

    @property
    def size(self) -> float:
        """How many recipes, counting those twice that two draws spell; infinite where a range is not of whole numbers."""
        return self.parts.size * max(1, len(self.backbones))

    def draw(self, suggest: Suggest) -> str:
        """The text of a recipe.

        Raises:
            Incompatible: where every part of it is left out.
        """
        on = functools.cache(lambda name, k: bool(suggest.suggest_int(f"{name}.{k}", low=0, high=1)))
        return self._on(suggest) + _without_nones(_switched(self.parts.draw(suggest), on))

    def parted(self, draw: str) -> tuple[str, str]:
        """The backbone of a draw, empty where it names none, and its recipe."""
        name = next((name for name in self.backbones if draw.startswith(name + ON)), None)
        return (name, draw.removeprefix(name + ON)) if name else ("", draw)

    def _on(self, suggest: Suggest) -> str:
        return suggest.suggest_categorical(BACKBONE, self.backbones) + ON if len(self.backbones) > 1 else ""

    def every(self) -> list[str]:
        """Every recipe of a finite space that composes, each once."""
        texts = itertools.chain.from_iterable(map(_every_switch, self.parts.texts()))
        recipes = [text for text in dict.fromkeys(map(_kept, texts)) if text and _composes(text)]
        return [name + ON + text for name in self.backbones for text in recipes] if len(self.backbones) > 1 else recipes


_MARKED = re.compile(rf"{MARK}(\w+) (\d+) (\d+){MARK}")


def _switched(text: str, on: Callable[[str, int], bool]) -> str:
    """The text with its marks read: the numbers that are on."""
    return _MARKED.sub(lambda mark: listed([k for k in range(int(mark[2]), int(mark[3]) + 1) if on(mark[1], k)]), text)


def _every_switch(text: str) -> Iterator[str]:
    switches = list(dict.fromkeys((name, k) for name, low, high in _MARKED.findall(text) for k in range(int(low), int(high) + 1)))
    for states in itertools.product((True, False), repeat=len(switches)):
        known = dict(zip(switches, states, strict=True))
        yield _switched(text, lambda name, k, known=known: known[name, k])  # type: ignore[misc]


def read(text: str, *, layers: int = LAYERS, backbones: Sequence[str] = ()) -> Space:
    """The space that a text or a name (auto, autopeft) stands for, every method and end of a range checked.

    Args:
        layers: of the backbone, for ranges without an upper end.
        backbones: their names, where a draw picks one of several.

    Raises:
        RecipeError: for a sign, name, knob or range that cannot be read.
        Incompatible: where nothing in it composes.
    """
    space = Space(text, _Parser(NAMED.get(text.strip(), text), layers).whole(), tuple(backbones))
    texts = [kept for corner in space.parts.corners() if (kept := _kept(corner))]
    if not [text for text in texts if _composes(text)]:
        parse(texts[0] if texts else "")  # says why
    return space


def _composes(text: str) -> bool:
    try:
        parse(text).check()
    except Incompatible:
        return False
    return True


def _kept(text: str) -> str:
    """The text without what is left out; empty where nothing remains."""
    phases: list[list[str]] = [[""]]
    depth = 0
    for token in re.findall(rf"{_QUOTED}|[()+|]|[^()+|\"']+", text):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if token == "|" and not depth:
            phases.append([""])
        elif token == "+" and not depth:
            phases[-1].append("")
        else:
            phases[-1][-1] += token
    kept = [[term.strip() for term in phase if NONE not in term] for phase in phases]
    return " | ".join(" + ".join(phase) for phase in kept if phase)


def _without_nones(text: str) -> str:
    kept = _kept(text)
    if not kept:
        raise Incompatible("a draw that leaves every part out is no recipe")
    return kept


_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_NUMBER = r"[+-]?(?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_TOKEN = re.compile(
    rf"(?P<text>{_QUOTED})|(?P<range>\[\s*({_NUMBER})\s*\.\.\s*({_NUMBER})(\s+log)?\s*\])|(?P<each>\[\s*(\d+)\s*\.\.\s*(\d+)?\s+each\s*\])|(?P<hint>\.\.)"
    rf"|(?P<word>[A-Za-z_]\w*)|(?P<number>{_NUMBER})|(?P<sign>.)",
    re.S,
)


class _Parser:
    """Finds the holes; all other text is left for `recipe.parse`."""

    def __init__(self, text: str, layers: int) -> None:
        self.text, self.tokens, self.at, self.layers = text, list(_TOKEN.finditer(text)), 0, layers
        self.names: dict[str, int] = {}

    def whole(self) -> Parts:
        """The whole text.

        Raises:
            RecipeError: for a bracket without its other half.
        """
        parts = self._parts(value=False, ends="")
        if self.at < len(self.tokens):
            raise RecipeError(f"{self.text!r}: a }} stands here without its {{")
        return parts

    def _parts(self, *, value: bool, ends: str, method: str = "", knob: str = "") -> Parts:
        """Parts up to one of the signs `ends`, outside all brackets."""
        parts: list[str | Range | Each | Choice] = []
        given, word, depth = set(), "", 0
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            sign = token["sign"]
            if sign == "}" or sign and sign in ends and not depth:
                break
            self.at += 1
            if sign and sign in "([":
                depth += 1
                method, given = (word, set()) if sign == "(" else (method, given)
            elif sign and sign in ")]":
                depth -= 1
            elif sign == "=":
                knob = word
                given.add(knob)
            inside = value or depth > 0
            if token["range"]:
                parts.append(self._range(token, self._named(f"{method}.{knob}" if inside else "phase")))
            elif token["each"]:
                low, high = int(token[7]), int(token[8]) if token[8] else self.layers - 1
                if not value and depth == 0 or high < low:
                    raise RecipeError(f"{token[0]}: switches are a knob's value and go from a lower number to a higher one, as in layers=[0..5 each]")
                parts.append(Each(knob, low, high))
            elif token["hint"]:
                before = re.search(r"([=(,])\s*$", self.text[: token.start()])
                if before is None:
                    raise RecipeError(f"{self.text!r}: .. stands between the ends of a range, [2..64 log], or for a card's own ranges, as in lora(..)")
                parts += self._hinted(method, given, knob if before[1] == "=" else None)
            elif sign == "{":
                parts.append(self._choice(inside, method, knob))
            elif value and token["word"] and not depth:
                parts.append(token[0] if token[0] in ("True", "False", "None") else f'"{token[0]}"')
            elif not value and not depth and token[0] == "none":
                parts.append(NONE)
            else:
                parts.append(token[0])
            word = token["word"] or word
        return Parts(tuple(parts))

    def _choice(self, value: bool, method: str, knob: str) -> Choice:
        name = self._named(f"{method}.{knob}" if value else "phase")
        options: dict[str, Parts] = {}
        while True:
            began = self.at
            parts = self._parts(value=value, ends=",", method=method, knob=knob)
            if self.at >= len(self.tokens):
                raise RecipeError(f"{self.text!r}: a {{ has no }}; write the choices as {{int8, nf4}}")
            source = self.text[self.tokens[began].start() : self.tokens[self.at].start()].strip()
            if not source or source in options:
                raise RecipeError(f"{self.text!r}: the choice {source!r} stands empty or twice between {{ and }}; write each once, as in {{none, int8}}")
            options[source] = _quoted_words(parts) if value else parts
            self.at += 1
            if self.tokens[self.at - 1]["sign"] == "}":
                return Choice(name, options)

    def _range(self, token: re.Match[str], name: str) -> Range:
        low, high = (int(end) if re.fullmatch(r"[+-]?\d+", end) else float(end) for end in token.group(3, 4))
        if low >= high or token[5] and low <= 0:
            raise RecipeError(f"{token[0]}: a range goes from its lower to its higher end{', above 0 for log' if token[5] else ''}, as in [2..64 log]")
        return Range(name, low, high, bool(token[5]))

    def _hinted(self, method: str, given: set[str], knob: str | None) -> list[str | Range | Each | Choice]:
        """The holes that a card suggests: of the one knob, or of all that are not given."""
        hints = {k["name"]: k["search"] for k in registry.describe(method).knobs if k["search"]}
        if knob is not None and knob not in hints:
            raise RecipeError(f"{method}({knob}=..): its card suggests no range for {knob}; write one, as in {knob}=[1..8]")
        if not hints:
            raise RecipeError(f"{method}(..): its card suggests no ranges; write them, or {method} alone")
        parts: list[str | Range | Each | Choice] = []
        for name, hint in hints.items():
            if name == knob or knob is None and name not in given:
                source = f"{method}({name}={f'[{hint}]' if '..' in hint else _choices(hint)})"
                inner = _Parser(source, self.layers)
                inner.names = self.names
                found = inner.whole().holes
                parts += [*found] if knob else [", " if parts else "", f"{name}=", *found]
        return parts

    def _named(self, name: str) -> str:
        self.names[name] = self.names.get(name, 0) + 1
        return name if self.names[name] == 1 else f"{name}#{self.names[name]}"


def _choices(hint: str) -> str:
    """A card's choices in braces, texts of several words in quotes."""
    return "{" + ", ".join(f'"{word.strip()}"' if re.search(r"[A-Za-z]", word) else word.strip() for word in hint.split(",")) + "}"


def _quoted_words(parts: Parts) -> Parts:
    """A value of bare words, a single text: "query value" as written without its quotes."""
    if len(parts.holes) or len([p for p in parts.parts if p.strip()]) == 1:
        return Parts(tuple(p.strip() if isinstance(p, str) else p for p in parts.parts))
    words = [p.strip('"') for p in parts.parts if isinstance(p, str)]
    return Parts((f'"{"".join(words).strip()}"',)) if all(re.fullmatch(r"[A-Za-z_]\w*|\s*", w) for w in words) else parts
