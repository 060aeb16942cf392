"""Vocabulary trimming: the pieces that the training texts never use leave the tokenizer and the embeddings.

    E ← E[K],   id ← position of id in K,   K = specials ∪ single characters and bytes ∪ pieces used ∪ pieces that build them

Every text of the training split keeps its pieces, so its logits stay the same, bit for bit. Other texts may be spelled
with smaller pieces. Abdaoui et al. 2020, arXiv:2010.05609.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from paretune import anatomy, hub, processors, seams, surgery
from paretune.card import Card
from paretune.errors import Incompatible
from paretune.roles import Examples, Trail, Transform

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclasses.dataclass(frozen=True, repr=False)
class Vocabulary(Transform):
    """Trims the tokenizer and the embeddings to the training split."""

    card = Card(
        title="Vocabulary trimming",
        paper="Abdaoui, Pradel & Sigel 2020, Load What You Need: Smaller Versions of Multilingual BERT",
        arxiv="2010.05609",
        equation="E = E[K]",
        lowers="E",
        why="In small models the embeddings are half of all bytes; the work of an inference stays the same, but for an output over the vocabulary.",
        note="Exact on the training texts. A text with other words is read in smaller pieces: longer, and less well; "
        "the share of its pieces that change says how much.",
    )
    needs_examples = True
    needs_processor = True
    keeps_ranges = True  # an output's rows go with their steps

    def follow(self, trail: Trail) -> Trail:
        if trail.embeddings != "float":
            raise Incompatible(f"vocabulary: {trail.by} has packed the embeddings; put vocabulary before {trail.by}")
        return trail

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        tokenizer = processors.get(model)
        if examples is None or not hasattr(tokenizer, "backend_tokenizer"):
            raise Incompatible("vocabulary: it needs a task's training texts and a fast tokenizer on the model")
        where = anatomy.embeddings(model)
        if where.tokens is None:
            raise Incompatible(f"vocabulary: {type(model).__name__} has no embedding of tokens")
        texts = examples.texts()
        named = {i for config in _configs(model) for i in _flat(_named_ids(config).values())}
        used = named.union(_read(examples, tokenizer, model), _flat(tokenizer(texts, verbose=False)["input_ids"]))
        if anatomy.family(model).positions.offset is None:  # RoBERTa counts its positions from the padding's id, which must not move
            used |= set(range(model.config.pad_token_id + 1))
        new, kept = trim(tokenizer, used)
        _check_same(tokenizer, new, kept, texts)
        rows = model.get_submodule(where.tokens).weight.shape[0]
        if kept[-1] >= rows:
            raise Incompatible(f"vocabulary: the tokenizer has an id {kept[-1]}, and the model's embedding only {rows} rows")
        surgery.settle(model)
        _cut(model, kept, rows)
        processors.put(model, new)
        hub.refresh(model)
        return model

    def facts(self, processor: Any, model: nn.Module, *, task: Any) -> dict[str, float]:
        return {"changed_test_token_share": changed_share(processor, processors.get(model), texts=task.texts("test"))}


def trim(tokenizer: Any, used: Iterable[int]) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A fast tokenizer of the pieces that must stay, and their old ids in the order of the new ones (0, 1, ...).

    Args:
        tokenizer: a fast tokenizer over WordPiece, WordLevel, BPE or Unigram.
        used: ids of pieces that must stay; what they are built from, specials and single characters stay anyway.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = data["model"], {token["id"] for token in data["added_tokens"]}
    unigram = isinstance(model["vocab"], list)
    pieces = {i: piece for i, (piece, _) in enumerate(model["vocab"])} if unigram else {i: piece for piece, i in model["vocab"].items()}
    wanted = {pieces[i] for i in used if i in pieces} | {piece for piece in pieces.values() if _is_letter(piece, model)} | {model.get("unk_token")}
    if unigram:
        lowest = min(score for _, score in model["vocab"])  # the price of an unknown character hangs on the lowest score
        wanted |= {next(piece for piece, score in model["vocab"] if score == lowest), pieces.get(model["unk_id"])}
    if "merges" in model:
        model["merges"] = _needed_merges(model, wanted)
    kept = sorted({i for i, piece in pieces.items() if piece in wanted} | added)
    ids = {old: new for new, old in enumerate(kept)}
    if unigram:
        model["vocab"] = [model["vocab"][i] for i in kept if i in pieces]
        model["unk_id"] = ids.get(model["unk_id"])
    else:
        model["vocab"] = {pieces[i]: ids[i] for i in kept if i in pieces}
    for token in data["added_tokens"]:
        token["id"] = ids[token["id"]]
    if data.get("padding"):
        data["padding"]["pad_id"] = ids[data["padding"]["pad_id"]]
    _renumber(data.get("post_processor"), ids)
    new = Tokenizer.from_str(json.dumps(data))
    assert new.get_vocab() == {piece: ids[i] for piece, i in tokenizer.get_vocab().items() if i in ids}
    return _fast(tokenizer, new), kept


def changed_share(old: Any, new: Any, *, texts: Sequence[str]) -> float:
    """The share of the old tokenizer's pieces in these texts that the new one reads otherwise, 0 to 1."""
    total = changed = 0
    for text in texts:
        before, after = (t(text, add_special_tokens=False, verbose=False).encodings[0] for t in (old, new))
        same = set(zip(after.offsets, after.tokens, strict=True))
        total += len(before.tokens)
        changed += sum(pair not in same for pair in zip(before.offsets, before.tokens, strict=True))
    return changed / total if total else 0.0


def _is_letter(piece: str, model: dict[str, Any]) -> bool:
    """Is it a single character (at the start or within a word), or a byte?"""
    bare = piece.removeprefix(model.get("continuing_subword_prefix") or "").removesuffix(model.get("end_of_word_suffix") or "")
    return len(bare) <= 1 or _BYTE.fullmatch(piece) is not None


def _needed_merges(model: dict[str, Any], wanted: set[str]) -> list[Any]:
    """The merges that build the wanted pieces; adds what they are built from to `wanted`.

    Within a piece of a text, BPE takes the very merges that it takes on that piece alone: it always takes the first merge
    there is, and none of those across the piece's borders was taken. A subset of all merges that holds them does the same.
    """
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    needed: set[tuple[str, str]] = set()
    prefix = model.get("continuing_subword_prefix") or ""
    for piece in [p for p in wanted if p]:
        symbols = _letters(piece, prefix, model.get("end_of_word_suffix") or "")
        while True:
            found = [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:], strict=False)) if pair in ranks]
            if not found:
                break
            _, at = min(found)
            pair = symbols[at], symbols[at + 1]
            symbols[at : at + 2] = [pair[0] + pair[1].removeprefix(prefix)]
            needed.add(pair)
            wanted |= {*pair, symbols[at]}
    return [merge for merge, pair in zip(model["merges"], pairs, strict=True) if pair in needed]


def _letters(piece: str, prefix: str, suffix: str) -> list[str]:
    """The single characters that BPE starts from."""
    inner, end = (piece.removeprefix(prefix), prefix) if prefix and piece.startswith(prefix) else (piece, "")
    letters = list(inner.removesuffix(suffix))
    letters[-1:] = [letters[-1] + suffix] if suffix and piece.endswith(suffix) and letters else letters[-1:]
    return [(end if i == 0 else prefix) + letter for i, letter in enumerate(letters)]


def _renumber(part: Any, ids: dict[int, int]) -> None:
    """Puts the new ids into a post-processor: templates, BERT's and RoBERTa's, and sequences of them."""
    for inner in (part or {}).get("processors", []):
        _renumber(inner, ids)
    special = (part or {}).get("special_tokens")
    for token in special.values() if isinstance(special, dict) else []:
        token["ids"] = [ids[i] for i in token["ids"]]
    for name in ("sep", "cls"):
        if isinstance((part or {}).get(name), list):
            part[name][1] = ids[part[name][1]]


def _fast(old: Any, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer whose class builds nothing of its own: what tokenizer.json says is what it does, also when loaded again."""
    names = [name for name in old.SPECIAL_TOKENS_ATTRIBUTES if isinstance(getattr(old, name, None), str)]
    same = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces", "chat_template")
    settings = {name: getattr(old, name) for name in (*names, *same) if getattr(old, name, None) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def _check_same(old: Any, new: Any, kept: list[int], texts: Sequence[str]) -> None:
    before, after = (t(list(texts), verbose=False)["input_ids"] for t in (old, new))
    for text, a, b in zip(texts, before, after, strict=True):
        if a != [kept[i] for i in b]:
            raise Incompatible(f"vocabulary: trimmed, this tokenizer would read a training text otherwise ({text[:40]!r}); leave vocabulary out")


def _read(examples: Examples, tokenizer: Any, model: nn.Module) -> set[int]:
    """Ids in the encodings that training sees: joined pairs, prompts with their targets."""
    task = examples.task
    encodings = task.encode(task.rows("train"), tokenizer, max_length=examples.max_length, config=model.config)
    names = ("input_ids", "decoder_input_ids", *(("labels",) if task.kind.name in ("generation", "language") else ()))
    return {i for encoding in encodings for name in names for i in _flat(encoding.get(name, [])) if i >= 0}


def _flat(values: Any) -> Iterator[int]:
    for value in values:
        if isinstance(value, int):
            yield value
        elif value is not None:
            yield from _flat(value)


def _configs(model: nn.Module) -> list[Any]:
    """Every config of the model: T5 gives its stacks their own, and generation has one."""
    found = [m.config for m in model.modules() if hasattr(m, "config")] + [getattr(model, "generation_config", None)]
    return list({id(c): c for c in found if c is not None}.values())


def _named_ids(config: Any) -> dict[str, Any]:
    """The fields of a config that hold ids of tokens (one, or a list)."""
    fields = {name: getattr(config, name) for name in config.to_dict() if name.endswith(("_token_id", "suppress_tokens"))}
    return {name: v for name, v in fields.items() if isinstance(v, int | list) and not isinstance(v, bool)}


def _cut(model: nn.Module, kept: list[int], rows: int) -> None:
    """Keeps these rows of the token embedding, of an output over the vocabulary and its bias, whoever shares them."""
    ids = {old: new for new, old in enumerate(kept)}
    cut = {id(t): nn.Parameter(t.detach()[kept].clone(), requires_grad=t.requires_grad) for t in _tables(model) if t.shape[0] == rows}
    for module in model.modules():
        for name, tensor in list(module._parameters.items()):
            if id(tensor) in cut:
                module._parameters[name] = cut[id(tensor)]
                _resize(module, ids)
                if name == "weight" and (seam := seams.seam_of(module)) is not None and (ranges := seam.ranges()) is not None:
                    ranges.keep_rows(kept)
        logits_bias = module._buffers.get("final_logits_bias")  # BART's, (1, V)
        if logits_bias is not None:
            module._buffers["final_logits_bias"] = logits_bias[:, kept].clone()
        if getattr(module, "vocab_size", None) == rows:
            module.vocab_size = len(kept)
    for config in _configs(model):
        for name, value in _named_ids(config).items():
            setattr(config, name, ids.get(value) if isinstance(value, int) else [ids[i] for i in value if i in ids])
        if getattr(config, "vocab_size", None) == rows:
            config.vocab_size = len(kept)


def _tables(model: nn.Module) -> Iterator[nn.Parameter]:
    """What has a row per piece: the embeddings (untied BART has three) and the output's weight and bias."""
    output = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            yield module.get_input_embeddings().weight
        if output is not None and (module is output or output in module.children()):  # BERT keeps the output's bias above it, too
            yield from (t for t in module._parameters.values() if t is not None)


def _resize(module: nn.Module, ids: dict[int, int]) -> None:
    if isinstance(module, nn.Embedding):
        module.num_embeddings = len(ids)
        module.padding_idx = ids.get(module.padding_idx)
    elif isinstance(module, nn.Linear):
        module.out_features = len(ids)
