"""Tables filled cell by cell: one committed file per cell, resumable, and the page made from the files alone.

    python -m benchmarks.<table> [--hours 2] [--only TEXT]    fills missing cells, then writes docs/<table>.md
    python -m benchmarks.<table> --table                      writes the page only

A cell that was not run reads 'not run'. Several processes may fill one table: each takes a cell that no other is at.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import fcntl
import json
import multiprocessing
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from paretune.pareto import intervals

ROOT = Path(__file__).parent.parent
NOT_RUN = "not run"


class NotYetError(Exception):
    """A cell that needs others first."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a table: a name, unique within it, how to get its figures (a JSON object), and whether it takes so long that it is run only with --long."""

    name: str
    run: Callable[[], dict[str, Any]]
    long: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells under benchmarks/results/<name>/, and a page made of what they hold."""

    name: str
    cells: Callable[[], Iterable[Cell]]
    page: Callable[[Table], str]

    def file(self, cell: str) -> Path:
        """Where a cell's figures are kept."""
        return ROOT / "benchmarks" / "results" / self.name / (re.sub(r"[^\w.=+-]+", "_", cell).strip("_") + ".json")

    def found(self, cell: str) -> dict[str, Any] | None:
        """A cell's figures, or None where it was not run."""
        return json.loads(self.file(cell).read_text()) if self.file(cell).is_file() else None

    @property
    def doc(self) -> Path:
        """The page."""
        return ROOT / "docs" / f"{self.name}.md"

    def made(self) -> str:
        """The text of the page, from the files alone."""
        return self.page(self)

    def main(self) -> None:
        """The command line of a table."""
        parser = argparse.ArgumentParser(description=f"Fills the table {self.name}.")
        parser.add_argument("--hours", type=float, default=1.0, help="begin no cell after so many hours")
        parser.add_argument("--only", default="", help="cells whose name holds this text")
        parser.add_argument("--afresh", action="store_true", help="run the cells that were run, too")
        parser.add_argument("--long", action="store_true", help="run the cells that take long, too")
        parser.add_argument("--table", action="store_true", help="write the page from the files alone")
        asked = parser.parse_args()
        until = 0.0 if asked.table else time.monotonic() + 3600 * asked.hours
        for cell in self.cells():
            if asked.only in cell.name and (asked.long or not cell.long) and time.monotonic() < until:
                with self._alone(cell.name) as free, contextlib.suppress(NotYetError):
                    if free and (asked.afresh or not self.file(cell.name).is_file()):
                        self.fill(cell)
        self.doc.write_text(self.made())

    @contextlib.contextmanager
    def _alone(self, cell: str) -> Iterator[bool]:
        """Is no other process at this cell? None will be inside the block; a killed process holds nothing."""
        with open(Path(tempfile.gettempdir()) / f"paretune-{self.name}-{self.file(cell).stem}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def fill(self, cell: Cell) -> None:
        """Runs a cell and keeps its figures, with the day and the commit."""
        begun = time.monotonic()
        figures = {"cell": cell.name, **cell.run(), "wall_s": time.monotonic() - begun, "date": datetime.date.today().isoformat(), "commit": _commit()}
        self.file(cell.name).parent.mkdir(parents=True, exist_ok=True)
        self.file(cell.name).write_text(json.dumps(figures, indent=1) + "\n")
        score = "no score" if figures["score"] is None else f"{figures['score']:.4f}"
        print(f"{cell.name}: {score} in {figures['wall_s']:.0f} s", flush=True)


@dataclasses.dataclass(frozen=True)
class Timing:
    """What is measured in one go, its ways taking turns in rounds: results/<name>.json with the machine in it, and docs/<name>.md made from that."""

    name: str
    measured: Callable[[int], dict[str, Any]]  # of so many rounds
    page: Callable[[dict[str, Any]], str]
    rounds: int

    @property
    def file(self) -> Path:
        """Where the figures are kept."""
        return ROOT / "benchmarks" / "results" / f"{self.name}.json"

    @property
    def doc(self) -> Path:
        """The page."""
        return ROOT / "docs" / f"{self.name.replace('_', '-')}.md"

    def made(self) -> str:
        """The text of the page, from the file alone."""
        return self.page(json.loads(self.file.read_text()))

    def main(self) -> None:
        """The command line of a timing."""
        parser = argparse.ArgumentParser(description=f"Measures {self.name}.")
        parser.add_argument("--rounds", type=int, default=self.rounds)
        parser.add_argument("--table", action="store_true", help="write the page from the file alone")
        asked = parser.parse_args()
        if not asked.table:
            from paretune.meters import system

            figures = {"environment": system.describe(), **self.measured(asked.rounds)}
            self.file.write_text(json.dumps(figures, indent=1) + "\n")
        self.doc.write_text(self.made())


def verdict(figure: float | None, *, least: float | None = None, most: float | None = None) -> str:
    """Is a target met? Of a figure that is to be at least, or at most, so much."""
    if figure is None:
        return NOT_RUN
    return "met" if (least is None or figure >= least) and (most is None or figure <= most) else "not met"


def fresh(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a module's function gives in a process of its own, whose memory nothing else has been in."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def mean_range(found: Sequence[dict[str, Any] | None], *, field: str = "score", times: float = 100.0, digits: int = 1) -> str:
    """The mean over seeds with the lowest and the highest; says so where some or all are missing."""
    values = [times * f[field] for f in found if f is not None]
    if not values:
        return NOT_RUN
    missing = f", {len(values)} of {len(found)} seeds" if len(values) < len(found) else ""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f}{missing})"


def mean_interval(found: Sequence[dict[str, Any] | None]) -> str:
    """The mean score in percent over seeds and the half width of its 95 % interval over them (Student's t); says so where some or all are missing."""
    values = [100 * f["score"] for f in found if f is not None]
    if not values:
        return NOT_RUN
    missing = f" ({len(values)} of {len(found)} seeds)" if len(values) < len(found) else ""
    interval, _ = intervals.over_seeds(values, [None] * len(values)) if len(values) > 1 else (None, "")
    half = (interval[1] - interval[0]) / 2 if interval else 0.0
    return f"{statistics.mean(values):.1f}{f' ± {half:.1f}' if len(values) > 1 else ''}{missing}"


def mean(found: Iterable[dict[str, Any] | None], field: str, *, digits: int = 0) -> str:
    """The mean of a figure over the cells that were run."""
    values = [f[field] for f in found if f is not None and f.get(field) is not None]
    return f"{statistics.mean(values):,.{digits}f}" if values else NOT_RUN


def order(claims: Iterable[tuple[str, str, str]], gaps: Callable[[str, str], Sequence[float]]) -> str:
    """A table of what the literature found beside what was found here.

    A claim is the weaker, the stronger, and who says so; `gaps` gives by how much the second is ahead in runs of the same task and
    seed. The mean gap has its 95 % interval over those pairs (Student's t).
    """
    rows = []
    for weaker, stronger, source in claims:
        found = gaps(weaker, stronger)
        if len(found) < 2:
            rows.append([weaker, stronger, source, NOT_RUN, NOT_RUN])
            continue
        mean = statistics.mean(found)
        low, high = intervals.over_seeds(found, [None] * len(found))[0] or (mean, mean)
        seen = "not told apart" if low <= 0 <= high else "the second is stronger" if low > 0 else "the first is stronger"
        rows.append([weaker, stronger, source, f"{mean:+.1f} ({low:+.1f} to {high:+.1f}, {len(found)} pairs)", seen])
    return markdown(["weaker", "stronger", "found by", "difference here", "here"], rows)


def when(files: Iterable[dict[str, Any]]) -> str:
    """The commits and days of these files' figures."""
    found = list(files)
    return "; ".join(", ".join(sorted({f[field] for f in found})) for field in ("commit", "date"))


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()
