"""Readouts that speak: a task's rows become prompts of a language model, and its labels words that the model may answer with.

    prompt(x) = start + template up to {label},   answer k = the k-th label's word (and the end token, where the tokenizer adds one to a target)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paretune import anatomy, processors, training
from paretune.anatomy import Site
from paretune.errors import Incompatible, RecipeError
from paretune.readouts import heads
from paretune.readouts.ranking import NONE, Ranked, padded_answers
from paretune.roles import Examples, Readout
from paretune.seams import Patch
from paretune.tasks import Task
from paretune.tasks.kinds.base import Encoding

LEAST_ROOM = 8  # tokens of a row that a prompt must leave room for


class Speaking(Readout):
    """What `choices` and `in_context` share: a method says how token log-probabilities become scores."""

    speaks = True
    template: str
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = self.template.split("{text}")
        if len(parts) != 2 or parts[1].count("{label}") != 1:
            raise RecipeError(f"{self!r}: a template has {{text}} once and behind it {{label}} once, as in 'Review: {{text}}\\nSentiment: {{label}}'")

    def read(self, log_probs: Tensor, lengths: Tensor, *, patch: Patch) -> Tensor:
        """Scores (B, C) from log p of each token (B, C, L) and the answers' lengths (B, C)."""
        raise AssertionError(f"{self!r} does not say how answers are scored")

    def prefix(self, task: Task) -> tuple[str, int]:
        """(the text in front of every row's own, how many training examples stand in it)."""
        return "", 0

    def begins(self) -> bool:
        """Does a prompt begin with the row's own text?"""
        return self.template.startswith("{text}")

    def patch(self, site: Site) -> Patch:
        return Ranked(site)

    def label_words(self, task: Task) -> tuple[str, ...]:
        """What the model may answer with: one word or more for each label."""
        return self.words or tuple(label.replace("_", " ") for label in task.labels)

    def check(self, model: nn.Module, examples: Examples) -> None:
        """Refuses what cannot be read so, before anything changes."""
        task = examples.task
        if anatomy.embeddings(model).output is None or anatomy.is_text_encoder(model):
            raise Incompatible(
                f"{self!r}: a decoder or encoder-decoder with its output over the vocabulary is needed to score words, and {type(model).__name__} is none; "
                "give a language model, opened as one: pt.load(backbone, task, readout=...)"
            )
        if "text" not in task.columns or not (task.kind.one_label or task.kind.name == "choice"):
            raise Incompatible(f"{self!r}: it ranks the labels or the choices of a text, and {task.name} is a {task.kind.name} task")
        if self.words and len(self.words) != len(task.labels):
            raise Incompatible(f"{self!r}: one word for each of the {len(task.labels)} labels of {task.name} is needed, and {len(self.words)} are given")

    def fit(self, model: nn.Module, examples: Examples) -> int:
        self.check(model, examples)
        task, tokenizer = examples.task, processors.get(model)
        text, shots = self.prefix(task)
        written = bool(getattr(model.config, "is_encoder_decoder", False))
        front, behind = template = self._halves(tokenizer, text, written=written)
        answers = [self._answer(tokenizer, word, written=written) for word in self.label_words(task)]
        room = (training.max_length(model) or 10**6) - len(front) - len(behind)
        left = room - (0 if written else max(map(len, answers), default=0))
        if left < LEAST_ROOM:
            raise Incompatible(
                f"{self!r}: its prompt takes {sum(map(len, template))} of the model's tokens and leaves {max(0, left)} for a row; take fewer shots or words"
            )
        begin, end = _specials(tokenizer)
        start = [n for n in (getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id")) if n is not None]
        tensors = {
            "before": _numbers(front), "after": _numbers(behind), "special": _numbers([*begin, *end]), "start": _numbers(start[:1]),
            "answers": padded_answers([answers])[0] if answers else torch.full((0, 0), NONE), "room": torch.tensor(room),
        }  # fmt: skip
        heads.install(model, self, sites=[Site(place="encoder-decoder" if written else "decoder", path="")])
        self.ranked(model).hold({n: t.to(model.device) for n, t in tensors.items()})
        return shots

    def ranked(self, model: nn.Module) -> Patch:
        """The readout's patch around a model."""
        return next(p for _, _, p in heads.patches(model, "") if isinstance(p, Ranked))

    def _halves(self, tokenizer: Any, text: str, *, written: bool) -> tuple[list[int], list[int]]:
        """The tokens in front of a row's own, and those between them and the answer."""
        begin, end = _specials(tokenizer)
        before, rest = self.template.split("{text}")
        after = rest.split("{label}")[0].rstrip(" ")
        return [*begin, *_plain(tokenizer, (text + before).rstrip(" "))], [*continuations(tokenizer, [after])[0], *(end if written else [])]

    def _answer(self, tokenizer: Any, word: str, *, written: bool) -> list[int]:
        if written:
            return tokenizer(text_target=word)["input_ids"]
        between = self.template.split("{text}")[1].split("{label}")[0]
        return continuations(tokenizer, [between[len(between.rstrip(" ")) :] + word])[0]

    def row_text(self, task: Task, row: Any) -> str:
        """A row as one text; a pair is two lines."""
        return "\n".join(row[task.columns[role]] for role in ("text", "pair") if role in task.columns)

    def encode(self, task: Task, rows: Sequence[Any], *, processor: Any, max_length: int | None, config: Any) -> list[Encoding]:
        """A row's own text in tokens; where each row has its choices, once for each of them, with the choice behind it under `answer_mask`."""
        before = self.template.split("{text}")[0]
        gap = before[len(before.rstrip(" ")) :]
        texts = [gap + self.row_text(task, row) for row in rows]
        tokens = [_plain(processor, text) for text in texts] if self.begins() else continuations(processor, texts)
        encodings: list[Encoding] = [{"input_ids": ids[:max_length], "attention_mask": [1] * len(ids[:max_length])} for ids in tokens]
        if task.kind.name == "choice":
            encodings = [
                _with_choices(e, [self._answer(processor, choice, written=bool(config.is_encoder_decoder)) for choice in row[task.columns["choices"]]])
                for e, row in zip(encodings, rows, strict=True)
            ]
        return task.kind.add_labels(task, rows, encodings=encodings)


def _with_choices(encoding: Encoding, answers: list[list[int]]) -> Encoding:
    row = encoding["input_ids"]
    return {
        "input_ids": [row + answer for answer in answers],
        "attention_mask": [[1] * (len(row) + len(answer)) for answer in answers],
        "answer_mask": [[0] * len(row) + [1] * len(answer) for answer in answers],
    }


def _plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def continuations(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts as they are read within a line: behind a full stop, whose own tokens are taken away again.

    A SentencePiece tokenizer puts a space in front of what it takes for the beginning of a text.
    """
    stop, found = _plain(tokenizer, "."), []
    for text in texts:
        whole = _plain(tokenizer, f".{text}")
        found.append(whole[len(stop) :] if whole[: len(stop)] == stop else _plain(tokenizer, text))
    return found


def _specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts in front of a text and behind it."""
    bare, whole = _plain(tokenizer, "a"), tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


def _numbers(tokens: Sequence[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.long)
