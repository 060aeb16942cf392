"""The tokenizer or image processor that travels with a model: get, set, fingerprint, compare, save."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from paretune import hub, surgery
from paretune.errors import StoreError

# what calling a tokenizer changes, or a length limit, and not which piece has which id
_PASSING = ("truncation", "padding")
_NO_LIMIT = 10**6  # transformers says 10^30 where a tokenizer has none


def get(model: nn.Module) -> Any:
    """The model's tokenizer or image processor; None where it has none."""
    return surgery.state(model).processor


def put(model: nn.Module, processor: Any) -> None:
    """Makes this the model's processor: it is used, saved, exported and measured with the model from here on."""
    here = surgery.state(model)
    here.processor, here.tokenizer = processor, None
    hub.refresh(model)


def told(model: nn.Module) -> dict[str, str] | None:
    """What the file of an adapter keeps of the model's tokenizer, its "name" and "sha256"; None for a model without one.

    A model that was opened without its tokenizer still has what its file tells.
    """
    here = surgery.state(model)
    if here.tokenizer is None and hasattr(here.processor, "get_vocab"):
        here.tokenizer = {"name": f"{type(here.processor).__name__} of {len(here.processor):,} pieces", "sha256": fingerprint(here.processor)}
    return here.tokenizer


def refuse_another(model: nn.Module, kept: dict[str, str] | None, *, source: Any, instead: str) -> None:
    """Compares the model's tokenizer with the one that the adapters of a file were trained with; where one of them is not known, all is well.

    Raises:
        StoreError: for another tokenizer; `instead` is what to do then.
    """
    here = told(model)
    if kept and here and kept["sha256"] != here["sha256"]:
        was, now = (f"{facts['name']} (fingerprint {facts['sha256'][:12]})" for facts in (kept, here))
        raise StoreError(f"{source}: the adapter was trained with a {was}, and the model has a {now}; {instead}")


def fingerprint(processor: Any) -> str:
    """SHA-256 (hexadecimal) of what turns an input into numbers; the empty text for None.

    Of a tokenizer that is its canonical JSON: pieces, ids, merges, normalizer, special tokens. Limits of length do not
    count, so that a shortened tokenizer still fits the adapters trained with it.
    """
    if processor is None:
        return ""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is not None:
        facts = {k: v for k, v in json.loads(backend.to_str()).items() if k not in _PASSING}
    elif hasattr(processor, "get_vocab"):
        facts = {"class": type(processor).__name__, "vocab": processor.get_vocab()}
    else:
        facts = {k: v for k, v in processor.to_dict().items() if k not in ("size", "crop_size")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def truncate(tokenizer: Any) -> None:
    """Writes the tokenizer's own limit into its truncation, for software that reads tokenizer.json alone.

    Every call of a tokenizer sets its truncation anew, so this is due right before saving, too.
    """
    limit = tokenizer.model_max_length
    if hasattr(tokenizer, "backend_tokenizer") and limit < _NO_LIMIT:
        tokenizer.backend_tokenizer.enable_truncation(max_length=limit, direction=tokenizer.truncation_side)


def save(model: nn.Module, folder: Path) -> None:
    """Writes the model's processor beside its weights, without the padding of its last call; nothing where it has none."""
    processor = get(model)
    if processor is None:
        return
    if hasattr(processor, "backend_tokenizer"):
        processor.backend_tokenizer.no_padding()
        truncate(processor)
    processor.save_pretrained(folder)
