"""The tasks of the Long Range Arena and the encoder that learns them: small for two cores, and in the paper's full size.

Tay et al. 2020, arXiv:2011.04006. ListOps and Pathfinder are made here; passages of books as bytes, pairs of passages and gray
pictures come from the folder of data sets (`benchmarks/data.py`). The full sizes are the files `benchmarks/lra/<task>.json`: encoder,
recipe, steps, training rows, and what is not as in the paper; `lra/published.csv` is the table of its README of November 2020.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import gzip
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import paretune as pt
from benchmarks import data
from paretune.recipe import Recipe
from paretune.tasks import Task, listops, pathfinder, sequences

SMALL = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.05,  # BERT's own 0.02 is for width 768
}  # fmt: skip
FOLDER = Path(__file__).parent / "lra"
Rows = Iterable[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Arena:
    """A task, what its tokens are, and how much of it two cores learn in five minutes."""

    task: Callable[[], Task]
    vocabulary: tuple[str, ...]
    longest: int  # tokens of its longest input, with [CLS] and [SEP]: as many positions has the encoder
    chance: float  # the accuracy of the best answer that reads nothing
    words: bool = False  # are tokens set apart by spaces, or is each character one?
    epochs: float = 2.0
    train: int = 800
    published: str = ""  # the column of the paper's table


def of_rows(train: Rows, test: Rows | None = None, *, label: str = "label", second: bool = False) -> Task:
    """A task of such rows; without those of a test they are split by their content."""
    with tempfile.TemporaryDirectory() as folder:
        beside = None if test is None else sequences.write(test, Path(folder) / "test.jsonl")
        return pt.task(sequences.write(train, Path(folder) / "train.jsonl"), text="text,second" if second else "text", label=label, test=beside)


def passages(rows: int = 2000, length: int = 1000) -> Task:
    """Is it Conan Doyle? Passages of his books and of others'; no book stands on two sides of train and test."""
    parts = [({"Doyle": _books("books_doyle", split), "another": _books("books_en", split)}, n) for split, n in (("train", rows), ("test", 600))]
    return of_rows(*(sequences.passages(books, n, length=length) for books, n in parts))


def pairs(rows: int = 2000, length: int = 500) -> Task:
    """Are two passages of one book? No book stands on two sides of train and test."""
    return of_rows(*(sequences.pairs(_books("books_en", split), n, length=length) for split, n in (("train", rows), ("test", 600))), second=True)


def _books(name: str, split: str) -> list[str]:
    with gzip.open(data.FOLDER / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def pictures() -> Task:
    """CIFAR-10 in gray, pixel by pixel."""
    return of_rows(*map(_gray, ("train", "test")))


def _gray(split: str) -> list[dict[str, str]]:
    import numpy as np
    from PIL import Image

    with zipfile.ZipFile(data.FOLDER / "cifar10_subset" / f"{split}.zip") as packed:
        names = [name for name in packed.namelist() if name.endswith(".jpg")]
        images = [np.asarray(Image.open(io.BytesIO(packed.read(name))).convert("L")) for name in names]
    return [{"text": sequences.pixels(image), "label": name.split("/")[-2]} for name, image in zip(names, images, strict=True)]


ARENA = {
    "listops, 20 to 100": Arena(lambda: pt.task("listops-short"), listops.VOCABULARY, 101, 0.17, words=True, epochs=4, train=4000),
    "listops, 500 to 2000": Arena(lambda: pt.task("listops"), listops.VOCABULARY, 2001, 0.17, words=True, epochs=1, train=500, published="listops"),
    "passages": Arena(passages, sequences.BYTES, 1002, 0.5, published="text"),
    "pairs": Arena(pairs, sequences.BYTES, 1003, 0.5, published="retrieval"),
    "pictures": Arena(pictures, pathfinder.GRAY, 1026, 0.1, published="image"),
    "pathfinder": Arena(lambda: pt.task("pathfinder-32"), pathfinder.GRAY, 1026, 0.5, published="pathfinder"),
}
LARGE: dict[str, Callable[[int], Task]] = {  # training rows -> the task in its full size; 15 % each are split off where no book or picture is kept for the test
    "listops": lambda rows: of_rows(listops.rows(round(rows / 0.7), shortest=500, longest=2000), label="value"),
    "text": lambda rows: passages(rows, 4096),
    "retrieval": lambda rows: pairs(rows, 4000),
    "image": lambda rows: pictures(),  # noqa: ARG005 - all there are
    "pathfinder": lambda rows: of_rows(pathfinder.rows(round(rows / 0.7)), label="connected"),
}


@dataclasses.dataclass(frozen=True)
class Full:
    """A task in the size of the paper: one file of `benchmarks/lra`."""

    task: str  # of ARENA
    source: str
    encoder: dict[str, Any]
    recipe: str  # without an attention and without epochs
    steps: int
    rows: int
    differs: str

    def trained(self, transform: str, *, rows: int) -> Recipe:
        """The recipe with an attention ("" for the encoder's own), for as many epochs as the steps are on so many rows."""
        plain = pt.parse(self.recipe)
        ((*adapters, schedule),) = plain.phases
        timed = dataclasses.replace(schedule, epochs=self.steps * schedule.batch / rows)
        return pt.parse(f"{transform} | {' + '.join(map(repr, (*adapters, timed)))}".removeprefix(" | "))


def full(name: str) -> Full:
    """A file of `benchmarks/lra` by its stem, which is the column of the published table."""
    return Full(**json.loads((FOLDER / f"{name}.json").read_text()))


def published() -> list[dict[str, str]]:
    """The rows of the paper's table: the model, accuracies in percent, and their average."""
    with open(FOLDER / "published.csv", newline="") as file:
        return list(csv.DictReader(file))


def config(arena: Arena, **shape: Any) -> Any:
    """The encoder's config; where no other shape is given, the small one."""
    import transformers

    given = shape or SMALL | {"max_position_embeddings": arena.longest}
    return transformers.BertConfig(vocab_size=len(sequences.SPECIAL) + len(arena.vocabulary), **given)


def encoder(arena: Arena, **shape: Any) -> str:
    """A folder with the untrained encoder and its tokenizer, the same for all methods."""
    return _encoder(arena, tuple(shape.items())).name


@functools.cache
def _encoder(arena: Arena, shape: tuple[tuple[str, Any], ...]) -> tempfile.TemporaryDirectory[str]:
    import torch
    import transformers

    made = config(arena, **dict(shape))
    folder = tempfile.TemporaryDirectory()
    torch.manual_seed(0)
    transformers.BertModel(made).save_pretrained(folder.name)
    sequences.tokenizer(arena.vocabulary, longest=made.max_position_embeddings, words=arena.words).save_pretrained(folder.name)
    return folder
