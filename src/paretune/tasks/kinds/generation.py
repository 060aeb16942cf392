"""A text from a text: prompt and target, with decoder-only and encoder-decoder models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from paretune.tasks.kinds.base import IGNORED, Bad, Batch, Encoding, Kind, check_text, labeled, limit, missing, pad, pad_id, pad_to, token_loss, tokenize

if TYPE_CHECKING:
    from paretune.tasks.definition import Row, Rows, Task


@dataclasses.dataclass(frozen=True)
class Generation(Kind):
    """Cross-entropy of the target's tokens; the prompt's tokens have no loss. A label may be a list of references.

    Attributes:
        new_tokens: how many tokens are generated at most; from the longest target.
        scored: "text" (a generated text), or "nll" where the metric is perplexity.
    """

    new_tokens: int = 64
    scored: str = "text"

    name: ClassVar[str] = "generation"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    metric: ClassVar[str] = "exact_match"
    over_vocabulary: ClassVar[bool] = True

    def read_label(self, column: str, raw: Mapping[str, Any]) -> list[str]:
        value = raw.get(column)
        references = value if isinstance(value, list) else [value]
        if not references or any(missing(text) for text in references):
            raise Bad(column, value, "the value is missing")
        return [check_text(column, text) for text in references]

    def fitted(self, columns: Mapping[str, str], rows: Sequence[Row]) -> Generation:
        longest = max(len(text.split()) for row in rows for text in row[columns["label"]])
        return dataclasses.replace(self, new_tokens=min(256, 8 + 2 * longest))

    def scored_by(self, metric: str) -> Generation:
        return dataclasses.replace(self, scored="nll" if metric == "perplexity" else "text")

    def expand(self, columns: Mapping[str, str], rows: Sequence[Row]) -> list[Row]:
        return [row | {columns["label"]: [text]} for row in rows for text in row[columns["label"]]]

    def texts(self, columns: Mapping[str, str], row: Row) -> list[str]:
        return [row[columns["text"]], *row[columns["label"]]]

    def auto_class_for(self, config: Any) -> str:
        return "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else self.auto_class

    def encode(self, task: Task, rows: Sequence[Row], *, processor: Any, max_length: int | None = None, config: Any = None) -> list[Encoding]:
        """Decoder-only: prompt and target in one line, "labels" -100 on the prompt. Encoder-decoder (as `config` tells): the prompt
        is the input, the target "labels", and "decoder_input_ids" the target shifted by one. The first reference is the target."""
        prompts = [row[task.columns["text"]] for row in rows]
        column = task.columns["label"]
        targets = [row[column][0] if column in row else None for row in rows]
        if config is not None and config.is_encoder_decoder:
            return _seq2seq(prompts, targets, processor, max_length, config)
        return _causal(prompts, targets, processor, max_length)

    def collate(self, encodings: Sequence[Encoding], processor: Any, *, width: int = 0) -> Batch:
        decoder = ("labels", "decoder_input_ids")
        batch = pad([{k: v for k, v in e.items() if k not in decoder} for e in encodings], processor)
        for name, filler in zip(decoder, (IGNORED, pad_id(processor)), strict=True):
            if name in encodings[0]:
                longest = max(len(e[name]) for e in encodings)
                batch[name] = pad_to(longest, [e[name] for e in encodings], filler=filler)
        return batch

    def length(self, encoding: Encoding) -> int:
        return len(encoding["input_ids"]) + len(encoding.get("decoder_input_ids", ()))

    def loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        return token_loss(*aligned(outputs, batch))

    def answered(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return labeled(*aligned(outputs, batch))

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor], *, outputs: Any, processor: Any = None) -> list[Any]:
        """The generated texts (greedy; `processor` decodes them), or (nll, tokens) where perplexity is the metric."""
        if self.scored == "nll":
            return negative_log_likelihoods(*aligned(outputs, batch))
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if "decoder_input_ids" not in batch:
            ids, mask = _prompts(batch, pad_id(processor))
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=self.new_tokens, do_sample=False, pad_token_id=pad_id(processor))
        new = made if "decoder_input_ids" in batch else made[:, ids.shape[1] :]
        return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]

    def compare(self, task: Task, predictions: Sequence[Any], *, rows: Rows) -> tuple[list[Any], list[Any]]:
        return [row[task.columns["label"]] for row in rows], list(predictions)

    def scores(self, predictions: Sequence[Any]) -> np.ndarray | None:
        return None

    def answer(self, task: Task, prediction: Any) -> dict[str, Any]:
        return {"label": prediction} if self.scored == "text" else {"nll": prediction[0], "tokens": prediction[1]}


def negative_log_likelihoods(logits: torch.Tensor, labels: torch.Tensor) -> list[tuple[float, int]]:
    """For each row of (B, T, C) and (B, T): the summed negative log-likelihood (nats) and the count of its labeled tokens."""
    pairs = (token_loss(one, marks) for one, marks in zip(logits, labels, strict=True))
    return [(float(nll), count) for nll, count in pairs]


def aligned(outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the labels they predict: position t predicts token t + 1, unless the decoder's input is shifted already."""
    if "decoder_input_ids" in batch:
        return outputs.logits, batch["labels"]
    return outputs.logits[:, :-1], batch["labels"][:, 1:]


def _causal(prompts: Sequence[str], targets: Sequence[str | None], processor: Any, max_length: int | None) -> list[Encoding]:
    length = limit(processor, max_length)
    encodings = []
    for prompt, target in zip(prompts, targets, strict=True):
        before = processor(prompt)["input_ids"]
        after: list[int] = []
        if target is not None:
            gap = "" if prompt[-1:].isspace() else " "
            after = processor(gap + target, add_special_tokens=False)["input_ids"]
            after = after + [processor.eos_token_id] * (processor.eos_token_id is not None)
        if length is not None and len(before) + len(after) > length:
            after = after[: max(1, length // 2)] if len(after) >= length else after
            before = before[len(before) + len(after) - length :]  # the end of a prompt is what the answer follows
        encoding: Encoding = {"input_ids": before + after, "attention_mask": [1] * (len(before) + len(after))}
        if target is not None:
            encoding["labels"] = [IGNORED] * len(before) + after
        encodings.append(encoding)
    return encodings


def _seq2seq(prompts: Sequence[str], targets: Sequence[str | None], processor: Any, max_length: int | None, config: Any) -> list[Encoding]:
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.pad_token_id
    encodings = tokenize(processor, [prompts], max_length=max_length)
    for encoding, target in zip(encodings, targets, strict=True):
        encoding["decoder_input_ids"] = [start]
        if target is not None:
            length = limit(processor, max_length)
            labels = processor(text_target=target, truncation=length is not None, max_length=length)["input_ids"]
            encoding["labels"], encoding["decoder_input_ids"] = labels, [start, *labels[:-1]]
    return encodings


def _prompts(batch: Mapping[str, torch.Tensor], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts alone, padded on the left so that generation goes on at their end."""
    real = batch["attention_mask"].bool()
    if "labels" in batch:
        real = real & (batch["labels"] == IGNORED)
    rows = [ids[keep].tolist() for ids, keep in zip(batch["input_ids"], real, strict=True)]
    longest, device = max(map(len, rows)), batch["input_ids"].device
    mask = pad_to(longest, [[1] * len(row) for row in rows], filler=0, side="left")
    return pad_to(longest, rows, filler=filler, side="left").to(device), mask.to(device)
