"""Long sequences from data of your own: bytes of texts, pairs of passages, pictures pixel by pixel; and the symbols that a model reads.

    label(passage) = the author's       same(a, b) = 1 if a and b come from one document       picture (S, S) -> S² symbols

The tasks of the Long Range Arena whose data cannot be made from nothing (Tay et al. 2020, arXiv:2011.04006, section 2.2): byte-level
text classification, retrieval and sequential images. Each function gives rows, which a jsonl file makes a task (`write`, then
`pt.task`); docs/guide/long-texts.md has one from end to end. A symbol is one character: a byte b is `chr(b)`, a gray level
`pathfinder.GRAY[level]`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

BYTES = tuple(map(chr, range(256)))
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}  # the first tokens of every vocabulary
Rows = list[dict[str, str]]


def as_bytes(text: str) -> str:
    """The bytes of a text in UTF-8, one character for each."""
    return text.encode().decode("latin-1")


def passages(documents: Mapping[str, Sequence[str]], count: int, *, length: int, seed: int = 0) -> Rows:
    """So many passages, of each label as many: `{"text": ..., "label": ...}`.

    Args:
        documents: label -> its texts.
        count: rows.
        length: bytes of a passage.
        seed: of what is drawn.
    """
    drawn, labels = random.Random(seed), list(documents)
    texts = {label: _long(documents[label], length) for label in labels}
    return [{"text": _cut(drawn, drawn.choice(texts[label]), length), "label": label} for label in (labels[i % len(labels)] for i in range(count))]


def pairs(documents: Sequence[str], count: int, *, length: int, seed: int = 0) -> Rows:
    """So many pairs of passages, half of them of one document: `{"text": ..., "second": ..., "label": "same" or "different"}`.

    The first is always of a document's first half and the second of one's second half, so that no two overlap.

    Args:
        documents: two texts or more.
        count: rows.
        length: bytes of each of the two.
        seed: of what is drawn.
    """
    texts, drawn = _long(documents, 2 * length), random.Random(seed)
    if len(texts) < 2:
        raise DataError("pairs: passages of two documents need two documents, and there is one; give more")
    rows = []
    for i in range(count):
        one, other = drawn.sample(texts, 2)
        second = other if i % 2 else one
        rows.append({
            "text": _cut(drawn, one[: len(one) // 2], length), "second": _cut(drawn, second[len(second) // 2 :], length),
            "label": "different" if i % 2 else "same",
        })  # fmt: skip
    return rows


def pixels(image: np.ndarray) -> str:
    """Gray levels (S, S), 0 to 255, row by row."""
    from paretune.tasks import pathfinder

    return pathfinder.as_text(image)


def write(rows: Iterable[Mapping[str, str]], path: str | Path) -> Path:
    """The rows as a jsonl file, which `pt.task` reads; returns its path."""
    path = Path(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenizer(vocabulary: Sequence[str], *, longest: int, words: bool = False) -> PreTrainedTokenizerFast:
    """One token for each symbol, behind [CLS] and before [SEP]; nothing is learned and nothing unknown is left out.

    Args:
        vocabulary: all symbols, as `BYTES`, `pathfinder.GRAY` or `listops.VOCABULARY`.
        longest: tokens of an input, the marks counted.
        words: are symbols set apart by spaces, or is each character one?
    """
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate((*SPECIAL.values(), *vocabulary))}, unk_token=SPECIAL["unk_token"]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if words else pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    marks: dict[str, Any] = SPECIAL
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=longest, **marks)


def _long(documents: Sequence[str], length: int) -> list[str]:
    """The documents as bytes, without those that are too short."""
    texts = [text for text in map(as_bytes, documents) if len(text) > length]
    if not texts:
        raise DataError(f"no document has more than the {length} bytes that are asked; give longer ones, or ask for fewer")
    return texts


def _cut(drawn: random.Random, text: str, length: int) -> str:
    start = drawn.randrange(len(text) - length + 1)
    return text[start : start + length]
