"""A task: what goes in, what comes out, the three splits and the metric. Frozen; every change gives a new task."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from paretune.errors import DataError
from paretune.tasks import metrics, splits

if TYPE_CHECKING:
    from paretune.tasks.kinds import Kind

SPLITS = ("train", "validation", "test")
Row = dict[str, Any]


class Rows(Sequence[Row]):
    """A read-only list of rows; a row is a dict from column to plain Python value. A slice is Rows again."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        return Rows(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self._rows == other._rows

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Rows({len(self)})"

    def column(self, name: str) -> list[Any]:
        """All values of one column."""
        return [row[name] for row in self._rows]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Data with a purpose; made by `pt.task(...)`.

    Attributes:
        columns: role -> column ("text", "pair", "choices", "image", "audio" and "label").
        labels: the names of the classes or tags, in the order of the model's outputs; empty where there are none.
        metric: the name of the score, of `tasks.metrics.names()`.
        source: where the data came from, as the user gave it.
        version: what else the data depends on (the Python version, for a built-in); part of the fingerprint.
        notes: what was inferred or dropped, one sentence each.
        build: the arguments of `pt.task` that make this task again.
    """

    name: str
    kind: Kind
    columns: dict[str, Any]
    labels: tuple[str, ...]
    metric: str
    train: Rows
    validation: Rows
    test: Rows
    source: str = ""
    version: str = ""
    notes: tuple[str, ...] = ()
    build: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the kind, columns, labels, metric, version and the rows of the three splits; not over paths or names."""
        digest = hashlib.sha256()
        _feed(digest, [self.kind.define(), self.columns, list(self.labels), self.metric, self.version])
        for split in SPLITS:
            digest.update(f"\n{split}\n".encode())
            for row in self.rows(split):
                _feed(digest, [self.kind.key(self.columns, row), row.get(self.columns.get("label", ""))])
        return digest.hexdigest()

    @property
    def better(self) -> str:
        """ "higher", or "lower" for a metric such as perplexity."""
        return metrics.better(self.metric)

    def rows(self, split: str) -> Rows:
        """The rows of "train", "validation" or "test"."""
        assert split in SPLITS, split
        return getattr(self, split)

    def texts(self, split: str) -> list[str]:
        """Every text of a split that a model would read, targets included; a pair gives two."""
        return [text for row in self.rows(split) for text in self.kind.texts(self.columns, row)]

    def encode(self, rows: Sequence[Row], processor: Any, *, max_length: int | None = None, config: Any = None) -> list[dict[str, Any]]:
        """One unpadded encoding per row (language modeling: per block). See `Kind.encode`."""
        return self.kind.encode(self, rows, processor=processor, max_length=max_length, config=config)

    def define(self) -> dict[str, Any]:
        """The definition that stands in run.json; `tasks.rebuild` makes the task from it, `tasks.blank` a task without rows."""
        return {
            "name": self.name, "kind": self.kind.name, "options": self.kind.define(), "columns": self.columns, "labels": list(self.labels),
            "metric": self.metric, "source": self.source, "version": self.version, "notes": list(self.notes), "build": self.build,
            "rows": {split: len(self.rows(split)) for split in SPLITS},
        }  # fmt: skip

    def describe(self) -> str:
        """One line for people.

        `reviews: 700 / 150 / 150 texts, 5 classes, majority 31 %, metric accuracy`
        """
        sizes = " / ".join(f"{len(self.rows(split)):,}" for split in SPLITS)
        parts = [f"{self.name}: {sizes} {self.kind.noun}"]
        if self.labels:
            parts.append(f"{len(self.labels)} {self.kind.outputs}")
        if self.kind.one_label and len(self.test):
            ((_, most),) = Counter(self.test.column(self.columns["label"])).most_common(1)
            parts.append(f"majority {100 * most / len(self.test):.0f} %")
        return ", ".join([*parts, f"metric {self.metric}"])

    def subset(self, max_train: int, *, seed: int = 0) -> Task:
        """The same task with a random part of the training rows: n of them, chosen by content hash and seed.

        A smaller subset lies within a larger one of the same seed; the order of the rows stays.
        """
        if max_train < 1:
            raise DataError(f"at least 1 training row is needed, not {max_train}")
        if max_train >= len(self.train):
            return self
        ranked = sorted(range(len(self.train)), key=lambda i: (splits.digest(self.kind.key(self.columns, self.train[i]), f"subset {seed}"), i))
        kept = Rows(self.train[i] for i in sorted(ranked[:max_train]))
        note = f"{max_train:,} of {len(self.train):,} training rows, seed {seed}"
        return dataclasses.replace(self, train=kept, notes=(*self.notes, note), build=self._then("subset", max_train, seed))

    def rotate(self, k: int, *, of: int = 5) -> Task:
        """Fold k of a cross-validation over all rows: every input is tested in exactly one of the `of` folds.

        The fold is a hash of the input, so duplicates never cross; 15 % of the rest, by hash, is the validation split.
        """
        assert 0 <= k < of, (k, of)
        parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
        for split in SPLITS:
            for row in self.rows(split):
                parts[splits.fold(self.kind.key(self.columns, row), k=k, of=of)].append(row)
        made = {split: Rows(rows) for split, rows in parts.items()}
        return dataclasses.replace(self, **made, notes=(*self.notes, f"fold {k} of {of}"), build=self._then("rotate", k, of))

    def _then(self, step: str, *values: int) -> dict[str, Any]:
        return {**self.build, "then": [*self.build.get("then", []), [step, *values]]}


def _feed(digest: Any, value: Any) -> None:
    digest.update(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n")
