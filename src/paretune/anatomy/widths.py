"""How wide the parts of a layer are: the neurons of feed-forward blocks, the heads of attention, and where configs say so."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from paretune.anatomy.sites import Site, resolve
from paretune.anatomy.structure import family, model_type
from paretune.errors import Incompatible

_HEAD_SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim")  # attributes of attention modules, by family
_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
_WIDTHS = ("all_head_size", "split_size", "inner_dim")
_BIAS = "relative_attention_bias"  # T5's table of position biases, with a column per head, which all layers of a stack read


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """One feed-forward block: neuron j is row j of each map into it and column j of `down`."""

    into: tuple[Site, ...]  # up, and gate where there is one
    down: Site
    field: str  # the config field with its width, the same for all blocks of a stack

    @property
    def width(self) -> int:
        """How many neurons it has."""
        return self.down.in_features


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention: groups of heads that share their keys and values; where each query head has its own, a group is one head."""

    path: str  # the module that computes it
    query: Site
    key: Site
    value: Site
    output: Site
    size: int  # features of a head
    table: str | None  # the path of the table of position biases that it shares with its stack's other attentions

    @property
    def weights(self) -> list[str]:
        """The modules whose shapes its heads decide."""
        return [*dict.fromkeys(s.path for s in (self.query, self.key, self.value, self.output)), *([self.table] if self.table else [])]

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return self.key.out_features // self.size

    @property
    def heads(self) -> int:
        """How many query heads there are."""
        return self.query.out_features // self.size


def feed_forwards(model: nn.Module) -> list[FeedForward]:
    """The feed-forward blocks, layer by layer."""
    fields = {stack.name: stack.inner for stack in family(model).stacks}
    blocks: dict[tuple[Any, Any], list[Site]] = {}
    for site in resolve(model, "ffn", kind="linear"):
        blocks.setdefault((site.stack, site.layer), []).append(site)
    return [
        FeedForward(tuple(s for s in sites if s.place != "down"), next(s for s in sites if s.place == "down"), fields[stack])
        for (stack, _), sites in blocks.items()
    ]


def attentions(model: nn.Module) -> list[Attention]:
    """The attentions, layer by layer; none of a family whose attention modules do not say the size of a head."""
    found: dict[tuple[Any, Any, bool], dict[str, Site]] = {}
    for site in resolve(model, "attention", kind="linear"):
        found.setdefault((site.stack, site.layer, site.cross), {})[site.place] = site
    made, tables = [], {}
    for (stack, _, cross), places in found.items():
        path = places["query"].path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(getattr(module, _BIAS, None), nn.Embedding):
            tables[stack] = f"{path}.{_BIAS}"  # in a stack's first layer
        size = next((v for n in _HEAD_SIZE if isinstance(v := getattr(module, n, None), int)), None)
        if size:
            query, key, value, output = (places[p] for p in ("query", "key", "value", "output"))
            made.append(Attention(path, query, key, value, output, size, None if cross else tables.get(stack)))
    return made


def with_heads(model: nn.Module, sites: list[Site]) -> list[Site]:
    """The attention calls with how many query heads they have, and how wide.

    Raises:
        Incompatible: for a family whose attention modules do not say it.
    """
    found = {about.path: about for about in attentions(model)}
    missing = next((site.path for site in sites if site.path not in found), None)
    if missing is not None:
        raise Incompatible(f"{type(model).__name__}: the attention at {missing} does not say how many features a head has")
    return [dataclasses.replace(site, heads=found[site.path].heads, head_size=found[site.path].size) for site in sites]


def head_attributes(module: nn.Module, *, heads: int, size: int) -> dict[str, int]:
    """The attributes of an attention module that say how many heads it has, with their values for so many."""
    values = dict.fromkeys(_COUNTS, heads) | dict.fromkeys(_WIDTHS, heads * size)
    return {name: value for name, value in values.items() if name in module.__dict__}


def set_field(model: nn.Module, field: str, *, value: int) -> None:
    """Sets a field of the model's config, and of those that its stacks have for themselves."""
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        if hasattr(config, field) and getattr(config, "model_type", None) == model_type(model):
            setattr(config, field, value)


def say_heads(model: Any) -> bool:
    """Writes the numbers of heads into the config, if a model built from it then has the very shapes that this one has; did it?"""
    found = attentions(model)
    counts = {(a.heads, a.groups, a.size) for a in found}
    if len(counts) != 1:
        return False
    ((heads, groups, size),) = counts
    fields = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": size}
    named = any("head_dim" in model.get_submodule(a.path).__dict__ for a in found)
    fields = {f: v for f, v in fields.items() if hasattr(model.config, f) or f == "head_dim" and named}
    if not _builds(model, fields, [path for a in found for path in a.weights]):
        return False
    for field, value in fields.items():
        setattr(model.config, field, value)
        set_field(model, field, value=value)
    return True


def _builds(model: Any, fields: dict[str, int], paths: list[str]) -> bool:
    config = copy.deepcopy(model.config)
    config.__dict__.pop("attn_implementation", None)
    try:
        for field, value in fields.items():
            setattr(config, field, value)
        with torch.device("meta"):
            twin = type(model)(config)
    except ValueError:  # most families divide the hidden size by the number of heads
        return False
    return all(twin.get_submodule(path).weight.shape == model.get_submodule(path).weight.shape for path in paths)
