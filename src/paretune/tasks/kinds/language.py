"""Language modeling: the next token of running text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from paretune.errors import BackboneError
from paretune.tasks.kinds.base import IGNORED, Batch, Encoding, Kind, labeled, limit, pad, pad_to, token_loss
from paretune.tasks.kinds.generation import aligned, negative_log_likelihoods

if TYPE_CHECKING:
    from paretune.tasks.definition import Row, Rows, Task

BLOCK = 512  # tokens, where neither the caller nor the tokenizer states a length


@dataclasses.dataclass(frozen=True)
class Language(Kind):
    """Cross-entropy of the next token, with decoder-only models. Perplexity is exp of its mean over all tokens.

    The texts of a split are joined, an end-of-text token between them, and cut into blocks. A block begins with the last token of the
    block before it, so that every token but the first is predicted exactly once.
    """

    name: ClassVar[str] = "language"
    in_blocks: ClassVar[bool] = True
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    metric: ClassVar[str] = "perplexity"
    needs_label: ClassVar[bool] = False
    over_vocabulary: ClassVar[bool] = True

    def auto_class_for(self, config: Any) -> str:
        from transformers.models.auto import modeling_auto as auto

        both_ways = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
        if both_ways or config.is_encoder_decoder or config.model_type not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise BackboneError(f"language modeling needs a decoder-only backbone such as GPT-2 or Llama, and {config.model_type} is none")
        return self.auto_class

    def encode(self, task: Task, rows: Sequence[Row], *, processor: Any, max_length: int | None = None, config: Any = None) -> list[Encoding]:
        """One encoding per block of `max_length` tokens, not per row."""
        length, end = limit(processor, max_length) or BLOCK, processor.eos_token_id
        texts = [row[task.columns["text"]] for row in rows]
        parts = processor(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        ids = list(chain.from_iterable(part + [end] * (end is not None) for part in parts))
        blocks = (ids[at : at + length] for at in range(0, max(1, len(ids) - 1), max(1, length - 1)))
        return [{"input_ids": block, "attention_mask": [1] * len(block), "labels": block} for block in blocks if len(block) > 1]

    def collate(self, encodings: Sequence[Encoding], processor: Any, *, width: int = 0) -> Batch:
        batch = pad([{k: v for k, v in e.items() if k != "labels"} for e in encodings], processor, width=width)
        batch["labels"] = pad_to(batch["input_ids"].shape[1], [e["labels"] for e in encodings], filler=IGNORED)
        return batch

    def loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        return token_loss(*aligned(outputs, batch))

    def answered(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return labeled(*aligned(outputs, batch))

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor], *, outputs: Any, processor: Any = None) -> list[tuple[float, int]]:
        """(negative log-likelihood in nats, predicted tokens) of each block."""
        return negative_log_likelihoods(*aligned(outputs, batch))

    def compare(self, task: Task, predictions: Sequence[Any], *, rows: Rows) -> tuple[list[Any], list[Any]]:
        return [], list(predictions)

    def scores(self, predictions: Sequence[Any]) -> np.ndarray | None:
        return None

    def answer(self, task: Task, prediction: tuple[float, int]) -> dict[str, Any]:
        nll, tokens = prediction
        return {"nll": nll, "tokens": tokens, "perplexity": math.exp(nll / max(1, tokens))}
