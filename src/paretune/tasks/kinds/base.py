"""What every kind of task answers: how rows are read, encoded, batched, scored. A kind knows no model family."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

if TYPE_CHECKING:
    from paretune.tasks.definition import Row, Rows, Task

Encoding = dict[str, Any]
Batch = dict[str, torch.Tensor]
IGNORED = -100  # a label that stands for "no answer here", as everywhere in transformers


class Bad(Exception):
    """A cell that cannot be used; whoever knows the row turns it into a DataError."""

    def __init__(self, column: str, value: Any, reason: str) -> None:
        super().__init__(reason)
        self.column, self.value, self.reason = column, value, reason


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of task. Its fields are its options; sub-classes fill in what differs."""

    name: ClassVar[str]
    noun: ClassVar[str] = "texts"
    outputs: ClassVar[str] = "classes"
    in_blocks: ClassVar[bool] = False  # are examples blocks of all rows together, and not the rows?
    role: ClassVar[str] = "text"  # the column that holds the input
    auto_class: ClassVar[str]
    metric: ClassVar[str]
    pairs: ClassVar[bool] = False  # two texts may make one input
    one_label: ClassVar[bool] = False  # a row has one of `task.labels`
    needs_label: ClassVar[bool] = True
    labels_matter: ClassVar[bool] = False  # the task has a closed list of labels
    over_vocabulary: ClassVar[bool] = False  # is the loss the cross-entropy of labeled tokens over the model's vocabulary? (`cross_entropy`)

    # --- rows -------------------------------------------------------------------------------------------------------------------

    def read(self, columns: Mapping[str, str], raw: Mapping[str, Any], *, label: bool = True) -> Row:
        """The row as the task keeps it: the used columns, with checked plain values.

        Raises:
            Bad: for a cell that is missing or of the wrong form.
        """
        row = self.read_input(columns, raw)
        if label and self.needs_label:
            row[columns["label"]] = self.read_label(columns["label"], raw)
        return row

    def read_input(self, columns: Mapping[str, str], raw: Mapping[str, Any]) -> Row:
        """The input columns of a row."""
        return {columns[role]: text_of(columns[role], raw) for role in ("text", "pair") if role in columns}

    def input_columns(self, columns: Mapping[str, str]) -> list[str]:
        """The columns of the file that make the input."""
        return [columns[role] for role in ("text", "pair", "image", "audio", "rate") if role in columns]

    def label_columns(self, columns: Mapping[str, str]) -> list[str]:
        """The columns of the file that make the label."""
        return [columns["label"]] if self.needs_label else []

    def read_label(self, column: str, raw: Mapping[str, Any]) -> Any:
        """The label of a row."""
        return name_of(column, raw)

    def labels(self, columns: Mapping[str, str], rows: Sequence[Row]) -> tuple[str, ...]:
        """The names of the outputs: numbers in numeric order, names in alphabetical order."""
        return ()

    def texts(self, columns: Mapping[str, str], row: Row) -> list[str]:
        """Every text of a row that a model would read."""
        return [row[columns[role]] for role in ("text", "pair") if role in columns]

    def key(self, columns: Mapping[str, str], row: Row) -> str:
        """What makes two inputs the same: the text, spaces apart. Splits hash this."""
        return "\x1f".join(" ".join(row[columns[role]].split()) for role in ("text", "pair") if role in columns)

    def fitted(self, columns: Mapping[str, str], rows: Sequence[Row]) -> Kind:
        """The kind with the options that the rows decide."""
        return self

    def default_metric(self, labels: Sequence[str]) -> str:
        """The metric where none was stated."""
        return self.metric

    def expand(self, columns: Mapping[str, str], rows: Sequence[Row]) -> list[Row]:
        """The training rows, one for each thing to learn from."""
        return list(rows)

    def scored_by(self, metric: str) -> Kind:
        """The kind with the options that the metric decides."""
        return self

    def define(self) -> dict[str, Any]:
        """The kind and its options, for run.json."""
        return {"kind": self.name, **dataclasses.asdict(self)}

    # --- model ------------------------------------------------------------------------------------------------------------------

    def config(self, task: Task) -> dict[str, Any]:
        """What `from_pretrained` needs to make the right head: num_labels, id2label, label2id, problem_type."""
        return {}

    def auto_class_for(self, config: Any) -> str:
        """The name of the transformers class to load for a backbone with this config."""
        return self.auto_class

    def encode(self, task: Task, rows: Sequence[Row], *, processor: Any, max_length: int | None = None, config: Any = None) -> list[Encoding]:
        """One unpadded encoding per row: what the model's forward takes, and "labels" where the row has one.

        Args:
            processor: the tokenizer, image processor or feature extractor.
            max_length: in tokens; longer inputs are truncated. None: the processor's own limit.
            config: the model's config; needed where encoder-decoder and decoder-only models differ.
        """
        texts = [[row[task.columns[role]] for row in rows] for role in ("text", "pair") if role in task.columns]
        return self.add_labels(task, rows, encodings=tokenize(processor, texts, max_length=max_length))

    def add_labels(self, task: Task, rows: Sequence[Row], *, encodings: list[Encoding]) -> list[Encoding]:
        """Gives each encoding its row's label, as `label_value` has it, where the row has one."""
        column = task.columns.get("label")
        for row, encoding in zip(rows, encodings, strict=True):
            if column in row:
                encoding["labels"] = self.label_value(task, row[column])
        return encodings

    def scale(self, task: Task) -> dict[str, float]:
        """What a model's config has to say of the scale of the labels that its new head learns; nothing of classes."""
        return {}

    def label_value(self, task: Task, label: Any) -> Any:
        """The label as a number, or list of numbers, for the loss."""
        return task.labels.index(label)

    def collate(self, encodings: Sequence[Encoding], processor: Any, *, width: int = 0) -> Batch:
        """A batch, padded to its longest encoding, or to so many tokens where that is more."""
        batch = pad([{k: v for k, v in e.items() if k != "labels"} for e in encodings], processor, width=width)
        return batch | self.label_tensor(encodings)

    def label_tensor(self, encodings: Sequence[Encoding]) -> Batch:
        """ "labels" (B,) or (B, labels), where the encodings have them."""
        return {"labels": torch.tensor([e["labels"] for e in encodings])} if "labels" in encodings[0] else {}

    def length(self, encoding: Encoding) -> int:
        """How long an encoding is, for batches of like length."""
        return len(encoding["input_ids"])

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        """The part of a batch that a model's forward takes when it shall not compute its own loss."""
        return {k: v for k, v in batch.items() if k != "labels"}

    def loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """The summed fp32 loss, and the count it is to be divided by; both add up over micro-batches.

        A language model that ranks answers (`ranking.Scores`) learns to write the right one: L_LM = −β of it.
        """
        ranked = getattr(outputs, "normalized", None)  # β (B, answers)
        if ranked is not None:
            return torch.nn.functional.nll_loss(ranked, batch["labels"], reduction="sum"), len(batch["labels"])
        return torch.nn.functional.cross_entropy(outputs.logits.float(), batch["labels"], reduction="sum"), len(batch["labels"])

    def answered(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """For each example the logits (targets, C) that the loss compares with its labels."""
        return list(outputs.logits[:, None])

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor], *, outputs: Any, processor: Any = None) -> list[Any]:
        """One prediction per example; class probabilities by default. `outputs` are those of `model(**inputs(batch))`."""
        return outputs.logits.float().softmax(-1).tolist()

    # --- answers ----------------------------------------------------------------------------------------------------------------

    def compare(self, task: Task, predictions: Sequence[Any], *, rows: Rows) -> tuple[list[Any], list[Any]]:
        """(truth, predicted) in the form the metrics take: numbers of classes here."""
        truth = [task.labels.index(row[task.columns["label"]]) for row in rows]
        return truth, [max(range(len(p)), key=p.__getitem__) for p in predictions]

    def scores(self, predictions: Sequence[Any]) -> np.ndarray | None:
        """The predictions as an array for metrics that use them raw, here probabilities that sum to one; None where there is none."""
        scores = np.asarray(predictions, dtype=float)
        return scores / scores.sum(-1, keepdims=True)

    def answer(self, task: Task, prediction: Any) -> dict[str, Any]:
        """A prediction for people and CSV files: the label, and each label's probability."""
        best = max(range(len(prediction)), key=prediction.__getitem__)
        return {"label": task.labels[best], **{f"p_{name}": round(p, 6) for name, p in zip(task.labels, prediction, strict=True)}}


# --- cells ----------------------------------------------------------------------------------------------------------------------


def missing(value: Any) -> bool:
    """Is a cell empty: None, not a number, or nothing but spaces?"""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())


def cell(column: str, raw: Mapping[str, Any]) -> Any:
    """A cell that must be there."""
    value = raw.get(column)
    if missing(value):
        raise Bad(column, value, "the value is missing")
    return value


def check_text(column: str, value: Any) -> str:
    """A text a tokenizer can read; numbers are written out."""
    if isinstance(value, list | dict | bytes):
        raise Bad(column, value, f"a text was expected, not a {type(value).__name__}")
    text = str(value)
    if "\0" in text:
        raise Bad(column, value, "the text holds NUL characters; is this a binary file, or UTF-16?")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Bad(column, value, "the text holds half a surrogate pair, which is not a character") from None
    return text


def text_of(column: str, raw: Mapping[str, Any]) -> str:
    """The text of a cell."""
    return check_text(column, cell(column, raw))


def name_of(column: str, raw: Mapping[str, Any]) -> str:
    """A class name: texts stripped, whole floats as integers (1.0 is "1")."""
    return class_name(column, cell(column, raw))


def class_name(column: str, value: Any) -> str:
    """A value as a class name."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return check_text(column, value).strip()


def list_of(column: str, raw: Mapping[str, Any], *, separators: str | None = None) -> list[Any]:
    """A list from a cell: a list already, JSON, or a text cut at any of the separators (None: at spaces)."""
    value = raw.get(column)
    if isinstance(value, list | tuple):
        return list(value)
    if value is None or isinstance(value, float):
        raise Bad(column, value, "the value is missing")
    text = str(value).strip()
    if text.startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise Bad(column, value, f"a list was expected, but this is no JSON ({error.msg})") from None
    if separators is None:
        return text.split()
    for sign in separators[1:]:
        text = text.replace(sign, separators[0])
    return [part.strip() for part in text.split(separators[0]) if part.strip()]


def in_order(names: set[str]) -> tuple[str, ...]:
    """Class names in order: by number where all are numbers, else by alphabet."""
    try:
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(names))


def head_config(labels: Sequence[str]) -> dict[str, Any]:
    """The config of a head with these outputs."""
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


# --- tensors --------------------------------------------------------------------------------------------------------------------


def limit(processor: Any, max_length: int | None) -> int | None:
    """The length to truncate to: the one asked for, else the tokenizer's own; None where it states none."""
    return max_length or (processor.model_max_length if processor.model_max_length < 10**6 else None)


def tokenize(processor: Any, columns: Sequence[Sequence[Any]], *, max_length: int | None, **words: bool) -> list[Encoding]:
    """One encoding per row of one or two columns of texts, truncated, not padded. `words`: is_split_into_words."""
    if not columns[0]:
        return []
    length = limit(processor, max_length)
    out = processor(*columns, truncation=length is not None, max_length=length, padding=False, **words)
    return [{name: values[i] for name, values in out.items()} for i in range(len(columns[0]))]


def pad(encodings: Sequence[Encoding], processor: Any, *, width: int = 0) -> Batch:
    """Lists of token numbers as tensors (B, longest), or (B, width) where that is more; the mask is 0 on padding.

    Padding stands on the right whatever the tokenizer's side: there no model's positions or causal attention see it.
    """
    longest = max(width, *(len(e["input_ids"]) for e in encodings))
    return {name: pad_to(longest, [e[name] for e in encodings], filler=_filler(name, processor)) for name in encodings[0]}


def pad_to(longest: int, values: Sequence[Sequence[int]], *, filler: int, side: str = "right") -> torch.Tensor:
    """(B, longest), int64; the filler stands on that side."""
    fillers = [[filler] * (longest - len(row)) for row in values]
    rows = [[*f, *row] if side == "left" else [*row, *f] for row, f in zip(values, fillers, strict=True)]
    return torch.tensor(rows, dtype=torch.long)


def pad_id(processor: Any) -> int:
    """The number that fills up: the padding token's, else the end-of-text token's (the mask hides it), else 0."""
    for number in (processor.pad_token_id, processor.eos_token_id):
        if number is not None:
            return int(number)
    return 0


def _filler(name: str, processor: Any) -> int:
    if name == "input_ids":
        return pad_id(processor)
    return processor.pad_token_type_id if name == "token_type_ids" else 0


def labeled(logits: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """For each row of logits (B, T, C) and labels (B, T) the logits at the positions that have a label."""
    return [row[marks != IGNORED] for row, marks in zip(logits, labels, strict=True)]


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Cross-entropy summed over the positions that have a label. logits (B, T, C), labels (B, T)."""
    wanted = labels != IGNORED
    if not bool(wanted.any()):
        return logits.float().sum() * 0.0, 0
    return torch.nn.functional.cross_entropy(logits[wanted].float(), labels[wanted], reduction="sum"), int(wanted.sum())

