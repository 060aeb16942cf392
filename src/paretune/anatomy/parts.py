"""What lies around the layers, and what runs through them all: embeddings, the task's head, biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paretune.anatomy.sites import Site, norms, resolve
from paretune.anatomy.structure import OURS, base_prefix, family, layers, modules_of
from paretune.errors import Incompatible


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Where tokens and positions become vectors, and hidden states become tokens again."""

    tokens: str | None  # the token embedding; None for images and sound
    copies: tuple[str, ...]  # further modules with the same weight that look tokens up (T5, BART)
    positions: tuple[str, ...]  # position tables (modules; parameters for images and sound); empty: rotary or relative
    length: str | None  # the config field that holds their length; None: no limit
    offset: int  # rows of a table before the first position
    counted: bool  # does the config field count the offset's rows? (RoBERTa: yes; OPT, BART: no)
    output: str | None  # the map onto the vocabulary
    tied: bool  # is its weight the token embedding's?


def embeddings(model: nn.Module) -> Embeddings:
    """Where the model's embeddings are."""
    modules = modules_of(model)
    table = family(model).positions
    tokens, output = model.get_input_embeddings(), model.get_output_embeddings()
    tokens = tokens if isinstance(tokens, nn.Embedding) else None
    same = [p for p, m in modules.items() if tokens is not None and isinstance(m, nn.Embedding) and m.weight is tokens.weight]
    prefix = base_prefix(model)
    parameters = {name for name, _ in model.named_parameters()}
    positions = (prefix + path.removesuffix("?") for path in table.paths)
    return Embeddings(
        tokens=same[0] if same else None,
        copies=tuple(same[1:]),
        positions=tuple(p for p in positions if p in modules or p in parameters),
        length=table.field,
        offset=model.config.pad_token_id + 1 if table.offset is None else table.offset,
        counted=table.counted,
        output=next((p for p, m in modules.items() if m is output), None),
        tied=tokens is not None and output is not None and output.weight is tokens.weight,
    )


def positions(model: nn.Module) -> tuple[int, int | None]:
    """(the first position's number in `position_ids`, how many positions there are; None: no limit), from the config alone."""
    table = family(model).positions
    first = (model.config.pad_token_id + 1 if table.offset is None else table.offset) if table.counted else 0
    count = getattr(model.config, table.field, None) if table.field else None
    return first, None if count is None else count - first


def head(model: nn.Module) -> list[str]:
    """The modules that belong to the task and not to the backbone; empty for base and language models."""
    prefix = base_prefix(model)
    if not prefix or model.get_output_embeddings() is not None:
        return []
    outside = [n for n, m in model.named_children() if n not in (prefix[:-1], OURS) and any(True for _ in m.parameters())]
    # The pooler stands inside the base model and yet serves the head only: no layer reads it, and many checkpoints lack it.
    pooler = getattr(model.base_model, "pooler", None)
    return [f"{prefix}pooler"] * (outside != [] and isinstance(pooler, nn.Module)) + outside


def all_norms(model: nn.Module) -> list[str]:
    """Paths of the layer norms of the layers and of their kind before, between and behind them, without the head's."""
    kinds = {type(model.get_submodule(path)).__name__ for path in norms(model)}
    outside = tuple(f"{path}." for path in head(model))
    return [path for path, module in modules_of(model).items() if type(module).__name__ in kinds and not path.startswith(outside)]


def position_modules(model: nn.Module) -> list[str]:
    """Paths of the modules that turn position ids into vectors or angles; none for relative positions, images and sound."""
    modules = modules_of(model)
    tables = [path for path in embeddings(model).positions if path in modules]
    return tables or [path for path in modules if path.rpartition(".")[2] == "rotary_emb"]


def small_input(model: nn.Module, *, length: int = 8) -> dict[str, Tensor]:
    """One short text (of the ids 0, 1, ...), blank image or silent sound: what the base model computes a forward pass on."""
    config, name = model.config, getattr(model, "main_input_name", "input_ids")
    made = {"dtype": model.dtype, "device": model.device}
    if name == "pixel_values":
        return {name: torch.zeros(1, config.num_channels, config.image_size, config.image_size, **made)}
    if name == "input_values":
        return {name: torch.zeros(1, config.max_length, config.num_mel_bins, **made)}
    ids = (torch.arange(length, device=model.device) % model.get_input_embeddings().num_embeddings)[None]
    both = {layer.stack for layer in layers(model)} == {"encoder", "decoder"}
    return {name: ids, **({"decoder_input_ids": ids} if both else {})}


def is_text_encoder(model: nn.Module) -> bool:
    """Does it read text with encoder layers alone, as BERT does?"""
    return isinstance(model.get_input_embeddings(), nn.Embedding) and all(ref.stack == "encoder" for ref in layers(model))


def bias_names(model: nn.Module, spec: str | Sequence[str] = "all") -> list[str]:
    """Names of the bias parameters: all outside the task's head, or those at the places of a spec.

    Raises:
        Incompatible: if there is none, or if one tensor holds the biases of other places, too.
        TargetError: for a word of the spec that hits nothing.
    """
    outside = tuple(f"{path}." for path in head(model))
    named = [n for n, _ in model.named_parameters() if n.endswith("bias") and OURS not in n.split(".") and not n.startswith(outside)]
    if spec != "all":
        sites = [s for s in resolve(model, spec) if s.kind != "block"]
        for site in sites:
            _check_whole(model, site, [s for s in sites if s.path == site.path])
        wanted = {f"{s.path}.bias" for s in sites}
        named = [n for n in named if n in wanted]
    if not named:
        raise Incompatible(f"{type(model).__name__} has no bias terms{'' if spec == 'all' else f' at {spec!r}'}")
    return named


def _check_whole(model: nn.Module, site: Site, asked: list[Site]) -> None:
    module = model.get_submodule(site.path)
    if site.rows is None or getattr(module, "bias", None) is None:
        return
    if sum(s.out_features for s in asked) < module.bias.numel():
        raise Incompatible(f"{site.path}.bias holds the biases of {site.place} and of other places in one tensor; ask for all of them (qkv)")
