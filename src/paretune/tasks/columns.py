"""Which columns play which role, and what kind of task they make: stated by the user or read off the values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from paretune.errors import DataError, all_of, did_you_mean, one_of
from paretune.tasks.kinds import Bad, Kind, kind_class
from paretune.tasks.kinds.base import missing
from paretune.tasks.reading import Table, short

MANY = 20  # more whole numbers than this, and more than a tenth of the rows, are amounts and not names of classes


def split_names(spec: str) -> list[str]:
    """ "a,b" as ["a", "b"]."""
    return [name.strip() for name in spec.split(",") if name.strip()]


def default_columns(table: Table, *, text: str | None, label: str | None) -> tuple[str, str | None]:
    """The columns that were not stated: the first of the usual names for the text, and "label" where the text was not stated either.

    Raises:
        DataError: where there is no such column.
    """
    if text is None:
        text = next((name for name in ("text", "image", "audio", "sentence", "tokens") if name in table.columns and name != label), None)
        if text is None:
            raise DataError(f"{table.name} has no column 'text'; say which one to read with text=..., out of {one_of(table.columns)}")
        if label is None and "label" in table.columns:
            label = "label"
    return text, label


def assign(table: Table, *, text: str, label: str | None, kind: str | None) -> tuple[Kind, dict[str, str], list[str]]:
    """The kind, the columns by role, and a sentence where something was inferred.

    Raises:
        DataError: for columns that are not there or a kind that is not known.
    """
    inputs = [text] if text in table.columns else split_names(text)
    for name in inputs:
        table.require(name, "text")
    outputs = [] if label is None else [label] if label in table.columns else split_names(label)
    for name in outputs:
        table.require(name, "label")
    if set(inputs) & set(outputs):
        raise DataError(f"the column {inputs[0]!r} cannot be both text and label")
    notes = []
    if kind is None:
        kind, why = infer(table, inputs=inputs, outputs=outputs)
        notes = [f"kind {kind}: {why}; another kind can be stated with kind=..."]
    made = kind_class(kind)()
    if made.needs_label and not outputs:
        raise DataError(f"a {kind} task needs a label column; {table.name} has {all_of(table.columns)}")
    if len(outputs) > 1 and kind != "multilabel":
        raise DataError(f"a {kind} task has one label column, not {len(outputs)}: {label}{did_you_mean(label or '', table.columns)}")
    return made, _roles(made, inputs, outputs, table), notes


def _roles(kind: Kind, inputs: list[str], outputs: list[str], table: Table) -> dict[str, str]:
    columns = {kind.role: inputs[0]}
    most = 2 if kind.pairs else 1
    if kind.name == "choice":
        if len(inputs) < 2:
            raise DataError(f"multiple choice needs text='question,choices' (a column of lists) or 'question,choice1,choice2', not {inputs[0]!r}")
        columns["choices"] = ",".join(inputs[1:])
    elif len(inputs) > most:
        raise DataError(f"a {kind.name} task reads {most} text column{'s' * (most > 1)}, not {len(inputs)}: {', '.join(inputs)}")
    elif len(inputs) == 2:
        columns["pair"] = inputs[1]
    if outputs and kind.needs_label:
        columns["label"] = ",".join(outputs)
    if kind.role == "audio" and "sampling_rate" in table.columns:
        columns["rate"] = "sampling_rate"
    return columns


def infer(table: Table, *, inputs: Sequence[str], outputs: Sequence[str]) -> tuple[str, str]:
    """(kind, why): read off the values of the columns."""
    first = next((row[inputs[0]] for row in table.rows if not missing(row.get(inputs[0]))), None)
    medium = _medium(first)
    if medium:
        return medium, f"{inputs[0]!r} holds {medium} data"
    if not outputs:
        return "language", "no label column was stated"
    if len(outputs) > 1:
        return "multilabel", f"{len(outputs)} label columns were stated"
    answers = [_parsed(row.get(outputs[0])) for row in table.rows if not missing(row.get(outputs[0]))]
    if isinstance(_parsed(first), list) and answers and isinstance(answers[0], list):
        return "tokens", f"{inputs[0]!r} and {outputs[0]!r} hold lists"
    if len(inputs) > 2 or (len(inputs) == 2 and any(isinstance(_parsed(row.get(inputs[1])), list) for row in table.rows[:1])):
        return "choice", f"{inputs[0]!r} is followed by choices"
    return _by_answers(answers, outputs[0])


def _by_answers(answers: list[Any], column: str) -> tuple[str, str]:
    if any(isinstance(a, list) for a in answers):
        words = [len(str(item).split()) for a in answers if isinstance(a, list) for item in a]
        if words and sum(words) / len(words) > 3:
            return "generation", f"{column!r} holds lists of sentences, taken as references"
        return "multilabel", f"{column!r} holds lists"
    different = {str(a) for a in answers}
    numbers = [_number(a) for a in answers]
    if numbers and None not in numbers:
        fractions = sum(not n.is_integer() for n in numbers if n is not None)
        if (fractions and len(different) > 5) or (len(different) > MANY and len(different) > len(answers) / 10):
            return "regression", f"{column!r} holds {len(different)} different numbers"
        return "classification", f"{column!r} holds {len(different)} different numbers"
    words = [len(str(a).split()) for a in answers]
    if words and sum(words) / len(words) > 3 and len(different) > len(answers) / 2:
        return "generation", f"{column!r} holds sentences, most of them different"
    return "classification", f"{column!r} holds {len(different)} different names"


def clean(table: Table, *, kind: Kind, columns: dict[str, str]) -> list[dict[str, Any]]:
    """The rows as the task keeps them.

    Raises:
        DataError: for the first cell that cannot be used: its row, column and value.
    """
    rows = []
    for index, raw in enumerate(table.rows):
        try:
            rows.append(kind.read(columns, {**raw, "": str(table.folder)}))
        except Bad as bad:
            raise bad_cell(bad, table.where(index)) from None
    return rows


def bad_cell(bad: Bad, where: str) -> DataError:
    """The one sentence for a cell that cannot be used."""
    return DataError(f"{where}, column {bad.column!r}, value {short(bad.value)}: {bad.reason}")


def _medium(value: Any) -> str | None:
    """ "image" or "audio" for a value that is one, else None."""
    if isinstance(value, dict):
        if "array" in value and "sampling_rate" in value:
            return "audio"
        if value.get("bytes") or value.get("path"):
            data, path = value.get("bytes") or b"", str(value.get("path") or "")
            return "audio" if data[:4] in (b"RIFF", b"fLaC", b"OggS", b"ID3\x03") or path.endswith((".wav", ".flac", ".mp3", ".ogg")) else "image"
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "image"
    if isinstance(value, list) and value and isinstance(value[0], float):
        return "audio"
    return None


def _parsed(value: Any) -> Any:
    """A cell of a text file that is a JSON list, as the list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


