"""`stdlib-topics`: which module of Python's standard library does this docstring come from?

Made from the Python that runs: docstrings of 30 characters and up, each once, of modules, classes and functions; the 20 modules with
most of them. Sources are parsed, never imported. The module's own dotted name is cut out of its texts.
"""

from __future__ import annotations

import ast
import functools
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from paretune.errors import DataError

NAME = "stdlib-topics"
MODULES = 20
SHORTEST = 30  # characters
# other people's code, tests and their data: not the standard library's own words
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "_bundled", "__pycache__", "lib-dynload"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def version() -> str:
    """What the data depends on."""
    return f"Python {platform.python_version()}"


@functools.cache
def rows(root: Path | None = None) -> tuple[dict[str, str], ...]:
    """The texts with their labels: `{"text": ..., "module": ...}`, in the order of the source files.

    Raises:
        DataError: where the standard library's sources are not there to read.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    found: list[dict[str, str]] = []
    for path in _sources(root):
        parts = path.relative_to(root).with_suffix("").parts
        for text in _docstrings(path):
            text = _without_name(text, [part for part in parts if part != "__init__"])
            if len(text) >= SHORTEST and text not in seen:
                seen.add(text)
                found.append({"text": text, "module": parts[0]})
    largest = {name for name, _ in sorted(Counter(row["module"] for row in found).items(), key=lambda item: (-item[1], item[0]))[:MODULES]}
    if len(largest) < MODULES:
        raise DataError(f"{NAME} needs the sources of Python's standard library, and {root} holds too few; give a data file instead")
    return tuple(row for row in found if row["module"] in largest)


def _sources(root: Path) -> Iterator[Path]:
    """The source files below a folder, in a fixed order."""
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in _SKIPPED and not name.startswith("config-"))
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a source file; none where it cannot be parsed (some are written for Python 2)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in _blocks(tree):
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node)
            if text:
                yield text


def _blocks(node: ast.AST) -> Iterator[ast.AST]:
    """The node and the statements within it that hold statements; `ast.walk` would visit every expression too."""
    yield node
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()):
            if hasattr(child, "body"):
                yield from _blocks(child)


def _without_name(text: str, module: list[str]) -> str:
    """The text on one line, without the dotted name of its module and of what lies under its package."""
    top, whole = re.escape(module[0]), re.escape(".".join(module))
    text = re.sub(rf"\b(?:{whole}|{top})(?:\.\w+)*\b", "", text)
    return " ".join(text.split()).lstrip(" -:.,;")
