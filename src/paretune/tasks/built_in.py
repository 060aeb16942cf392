"""Tasks that need no file, by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from paretune.tasks import listops, stdlib_topics


@dataclasses.dataclass(frozen=True)
class BuiltIn:
    """Rows with a `text` and a label, and the version of what they are made of."""

    rows: Callable[[], tuple[dict[str, str], ...]]
    label: str
    version: Callable[[], str] = lambda: ""


def _pathfinder() -> tuple[dict[str, str], ...]:
    from paretune.tasks import pathfinder  # needs numpy, which `paretune --help` does not

    return pathfinder.rows(2000)


TASKS = {
    stdlib_topics.NAME: BuiltIn(stdlib_topics.rows, "module", stdlib_topics.version),
    "listops": BuiltIn(functools.partial(listops.rows, 4000, shortest=500, longest=2000), "value"),
    "listops-short": BuiltIn(functools.partial(listops.rows, 8000, shortest=20, longest=100), "value"),
    "pathfinder-32": BuiltIn(_pathfinder, "connected"),
}
