"""The catalogue: which methods there are, read from the file names; one file is imported when it is used.

Nothing here imports torch: title, paper, knobs and help are read from a method's source with `ast`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any

from paretune.card import Card, knob
from paretune.errors import RecipeError, did_you_mean
from paretune.roles import ROLES, After, Method

METHODS = Path(__file__).parent / "methods"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method as its source tells it."""

    name: str
    role: str  # "adapter", "transform", "modifier", "readout" or "recipe"
    summary: str  # the docstring's first line
    doc: str
    card: Card | None  # None for a named recipe
    knobs: tuple[dict[str, Any], ...] = ()  # name, type, default, help, low, high, choices, search
    recipe: str = ""  # the line of a named recipe


@functools.cache
def _files() -> dict[str, tuple[str, Path]]:
    """name -> (role folder, file). A name stands for one method over all roles."""
    found: dict[str, tuple[str, Path]] = {}
    for folder in (*ROLES, "recipes"):
        pattern = "*.recipe" if folder == "recipes" else "*.py"
        for path in sorted((METHODS / folder).rglob(pattern)):
            if path.stem.startswith("_"):
                continue
            assert path.stem not in found, f"{path.stem} is the name of two methods: {path} and {found[path.stem][1]}"
            found[path.stem] = (folder, path)
    return found


def names(role: str | None = None) -> list[str]:
    """The names of the catalogue, of one role ("adapter", ..., "recipe") or of all."""
    return [name for name, (folder, _) in _files().items() if role is None or folder == role + "s"]


def get(name: str) -> type[Method]:
    """The class of a method; imports its file.

    Raises:
        RecipeError: for a name that is not in the catalogue, with the nearest one.
    """
    folder, path = _find(name)
    if folder == "recipes":
        raise RecipeError(f"{name} is a named recipe, not a single method: it stands for {line_of(name)}")
    parts = path.relative_to(METHODS.parent).with_suffix("").parts
    module = importlib.import_module(".".join((__package__, *parts)))
    (cls,) = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__ and issubclass(c, ROLES[folder])]
    return cls


def class_names() -> list[str]:
    """The class names of the catalogue, `LoRA` among them: in lower case equal to the file name without underscores."""
    return [_dataclass(path).name for folder, path in _files().values() if folder != "recipes"]


def with_class(name: str) -> str | None:
    """The method whose class is called so: `LoRA` -> `lora`. Reads one file at most: Python asks at every `from paretune import ...`."""
    found = (stem for stem, (folder, _) in _files().items() if folder != "recipes" and stem.replace("_", "") == name.lower())
    return next((stem for stem in found if _dataclass(_files()[stem][1]).name == name), None)


def line_of(name: str) -> str:
    """The one line a named recipe stands for."""
    _, path = _find(name)
    (line,) = [text for text in path.read_text().splitlines() if text.strip() and not text.startswith("#")]
    return line.strip()


@functools.cache
def describe(name: str) -> Entry:
    """What a method's source says of itself, without importing it."""
    folder, path = _find(name)
    if folder == "recipes":
        doc = "\n".join(line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
        return Entry(name, "recipe", doc.split("\n")[0], doc, None, recipe=line_of(name))
    tree, cls = ast.parse(path.read_text()), _dataclass(path)
    doc = ast.get_docstring(tree) or ""
    fields = [node for node in cls.body if isinstance(node, ast.AnnAssign)]
    knobs = tuple(_knob(node) for node in fields if not ast.unparse(node.annotation).startswith("ClassVar"))
    (card,) = [
        n.value for n in cls.body if isinstance(n, ast.Assign | ast.AnnAssign) and isinstance(n.value, ast.Call) and _called(n.value) == "Card"
    ]
    return Entry(name, folder[:-1], doc.split("\n")[0], doc, Card(**_keywords(card)), knobs)


def is_recipe(name: str) -> bool:
    """Does the name stand for a named recipe?"""
    return _find(name)[0] == "recipes"


def _find(name: str) -> tuple[str, Path]:
    if name not in _files():
        raise RecipeError(f"method {name!r} is not known{did_you_mean(name, _files())}; `paretune methods` lists all")
    return _files()[name]


def _dataclass(path: Path) -> ast.ClassDef:
    wanted = path.stem.replace("_", "")
    tree = ast.parse(path.read_text())
    matches = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.lower() == wanted]
    assert len(matches) == 1, f"{path}: one class whose name in lower case is {wanted}"
    return matches[0]


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func)


def _keywords(call: ast.Call) -> dict[str, Any]:
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}


def _knob(node: ast.AnnAssign) -> dict[str, Any]:
    call = node.value
    assert isinstance(call, ast.Call) and _called(call) == "knob", f"{ast.unparse(node)}: a knob is declared with knob()"
    field = knob(*map(_literal, call.args), **_keywords(call))
    return {"name": ast.unparse(node.target), "type": ast.unparse(node.annotation), "default": field.default, **field.metadata}


def _literal(node: ast.expr) -> Any:
    """The value of a literal, `After(0)` among them."""
    return After(ast.literal_eval(node.args[0])) if isinstance(node, ast.Call) and _called(node) == "After" else ast.literal_eval(node)
