"""Built-in tasks of the Long Range Arena: expressions are worth what they say, pictures show what their label says."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage, stats

import paretune as pt
from paretune.errors import DataError
from paretune.tasks import Task, listops, pathfinder, sequences


@pytest.fixture(scope="module")
def short() -> Task:
    return pt.task("listops-short")


def reduced(text: str) -> int:
    """The value by rewriting the innermost brackets until none is left: nothing of the parser is used."""
    does = {"MIN": np.min, "MAX": np.max, "MED": lambda v: np.floor(np.median(v)), "SM": lambda v: np.mod(np.sum(v), 10)}
    while "[" in text:
        text = re.sub(r"\[([A-Z]+)((?: \d)+) \]", lambda found: str(int(does[found[1]]([int(n) for n in found[2].split()]))), text)
    return int(text)


def test_the_value_of_the_paper_s_example() -> None:
    assert listops.value("[MAX 2 9 [MIN 4 7 ] 0 ]".split()) == 9
    assert listops.value("[MED 1 2 3 4 ]".split()) == 2, "the median 2.5 is cut to a whole number, as the authors' generator does"
    assert listops.value("[SM 9 9 [MED 5 1 9 ] ]".split()) == 3


def test_expressions_are_worth_what_they_say(short: Task) -> None:
    for row in short.test[:300]:
        assert reduced(row["text"]) == int(row["value"])


def test_expressions_have_the_asked_length_and_vocabulary(short: Task) -> None:
    lengths = [len(row["text"].split()) for row in short.train]
    assert min(lengths) > 20 and 90 < max(lengths) < 100
    symbols = Counter(symbol for row in short.train for symbol in row["text"].split())
    assert set(symbols) == set(listops.VOCABULARY)
    assert stats.chisquare([symbols[str(digit)] for digit in range(10)]).pvalue > 1e-3, "digits are drawn alike"
    assert max(symbols[f"[{o}"] for o in listops.OPERATORS) < 1.1 * min(symbols[f"[{o}"] for o in listops.OPERATORS)


def test_an_expression_stands_in_one_split_only(short: Task) -> None:
    splits = [{row["text"] for row in rows} for rows in (short.train, short.validation, short.test)]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 8000
    assert len(short.labels) == 10


def test_dots_are_joined_by_a_path_where_the_label_says_so() -> None:
    """Dashes are joined by closing gaps of the size that a path leaves; where that leaks to another path the answer is unsure, so most must agree, not all."""
    right = 0
    pictures = pathfinder.rows(60)
    for row in pictures:
        image = np.array([pathfinder.GRAY.index(pixel) for pixel in row["text"]]).reshape(pathfinder.SIDE, pathfinder.SIDE)
        bright = ndimage.uniform_filter(image.astype(float), 3)
        first = np.unravel_index(bright.argmax(), bright.shape)
        away = np.hypot(*(np.indices(bright.shape) - np.array(first)[:, None, None])) > 4
        second = np.unravel_index((bright * away).argmax(), bright.shape)
        parts, _ = ndimage.label(ndimage.gaussian_filter(image.astype(float), 0.7) > 42, structure=np.ones((3, 3)))
        right += (parts[first] == parts[second]) == (row["connected"] == "yes")
    assert right / len(pictures) > 0.8


def test_no_sum_over_pixels_tells_the_classes_apart() -> None:
    light = {label: [sum(map(ord, row["text"])) for row in pathfinder.rows(60) if row["connected"] == label] for label in ("yes", "no")}
    assert stats.ttest_ind(light["yes"], light["no"]).pvalue > 1e-3


def test_built_in_tasks_take_no_columns() -> None:
    with pytest.raises(DataError, match="listops-short is built in: it takes no label"):
        pt.task("listops-short", label="value")


# --- sequences from data of one's own -------------------------------------------------------------------------------------------

TEXTS = {name: [f"{name} {i}: " + " ".join(f"{word}é{j}" for j in range(60)) for i in range(4)] for name, word in (("a", "sea"), ("b", "hill"))}


def test_passages_are_cut_from_the_label_s_documents_byte_by_byte() -> None:
    rows = sequences.passages(TEXTS, 10, length=40)
    assert Counter(row["label"] for row in rows) == {"a": 5, "b": 5}
    for row in rows:
        assert len(row["text"]) == 40 and set(row["text"]) <= set(sequences.BYTES)
        assert any(row["text"].encode("latin-1") in text.encode() for text in TEXTS[row["label"]]), "the bytes stand in the text as they are"
    assert rows == sequences.passages(TEXTS, 10, length=40) != sequences.passages(TEXTS, 10, length=40, seed=1)


def test_pairs_are_of_one_document_where_the_label_says_so_and_never_overlap() -> None:
    documents = [f"{i}" * 100 for i in range(5)]
    rows = sequences.pairs(documents, 20, length=30)
    assert Counter(row["label"] for row in rows) == {"same": 10, "different": 10}
    assert all((row["text"][0] == row["second"][0]) == (row["label"] == "same") for row in rows)
    (only,) = ["".join(chr(0x30 + i) for i in range(62))]
    for row in sequences.pairs([only, only[::-1]], 20, length=30):
        assert row["label"] == "different" or not set(row["text"]) & set(row["second"])


def test_documents_that_are_too_short_are_refused() -> None:
    with pytest.raises(DataError, match="more than the 40 bytes"):
        sequences.passages({"a": ["short"], "b": ["short"]}, 2, length=40)
    with pytest.raises(DataError, match="need two documents"):
        sequences.pairs(["long " * 20], 2, length=10)


def test_rows_become_a_task_like_any_other(tmp_path: Path) -> None:
    rows = sequences.passages(TEXTS, 60, length=30)
    task = pt.task(sequences.write(rows, tmp_path / "bytes.jsonl"), text="text", label="label")
    assert task.kind.name == "classification" and set(task.labels) == {"a", "b"}
    assert {row["text"] for row in task.train} <= {row["text"] for row in rows}, "no byte is lost on the way"
    pictures = [{"text": sequences.pixels(np.full((4, 4), level, np.uint8)), "label": str(level > 30)} for level in range(60)]
    assert pt.task(sequences.write(pictures, tmp_path / "pixels.jsonl"), text="text", label="label").labels == ("False", "True")


@pytest.mark.parametrize(("vocabulary", "words", "text"), [(sequences.BYTES, False, sequences.as_bytes("é \n\0[")), (listops.VOCABULARY, True, "[MAX 2 [MIN 4 7 ] ]")])
def test_a_symbol_is_a_token(vocabulary: tuple[str, ...], words: bool, text: str, tmp_path: Path) -> None:
    made = sequences.tokenizer(vocabulary, longest=12, words=words)
    made.save_pretrained(tmp_path)
    for tokenizer in (made, type(made).from_pretrained(tmp_path)):
        symbols = text.split() if words else list(text)
        tokens = tokenizer(text)["input_ids"]
        assert tokens == [2, *(4 + vocabulary.index(symbol) for symbol in symbols), 3]
        assert tokenizer(text, text)["input_ids"] == [*tokens, *tokens[1:]]
        assert len(tokenizer(text * 9, truncation=True)["input_ids"]) == 12
