"""What a model is made of: its family, its stacks of layers, and its linear maps."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paretune.anatomy.families import FAMILIES, Family, Stack
from paretune.errors import Incompatible, all_of, did_you_mean, one_of

OURS = "paretune"  # child modules of this name are adapters, not anatomy


@dataclasses.dataclass(frozen=True)
class LayerRef:
    """One layer of a stack."""

    stack: str
    index: int
    path: str


@dataclasses.dataclass(frozen=True)
class LayerList:
    """One stack's nn.ModuleList, the config field that counts it, and the config fields that are lists with an entry per layer."""

    stack: str
    path: str
    counter: str
    per_layer: tuple[str, ...]


def family(model: nn.Module) -> Family:
    """The description of the model's family.

    Raises:
        Incompatible: for a model type that the table lacks.
    """
    kind = model_type(model)
    if kind not in FAMILIES:
        raise Incompatible(
            f"model type {kind!r} is not described{did_you_mean(kind, FAMILIES)}; there are {all_of(sorted(FAMILIES))}; "
            "describe a new one with paretune.anatomy.register(model_type, Family(...)), or give targets as module paths"
        )
    return FAMILIES[kind]


def layers(model: nn.Module) -> list[LayerRef]:
    """All layers, stack by stack; ALBERT's shared layers appear once."""
    return [ref for stack, refs in stacks_of(model, modules_of(model)) for ref in refs]


def layer_lists(model: nn.Module) -> list[LayerList]:
    """The lists of layers, for methods that drop some.

    Raises:
        Incompatible: for a model whose layers share their weights.
    """
    found = []
    for stack, refs in stacks_of(model, modules_of(model)):
        if stack.counter is None:
            raise Incompatible(f"{type(model).__name__}: its layers share one set of weights, so dropping one would drop all")
        per_layer = tuple(f for f in ("layer_types", "mlp_layer_types") if isinstance(getattr(model.config, f, None), list))
        found.append(LayerList(stack.name, refs[0].path.rpartition(".")[0], stack.counter, per_layer))
    return found


def is_linear(module: nn.Module) -> bool:
    """Is it a linear map: nn.Linear, transformers' Conv1D, or a module that says so by `paretune_linear = True`?

    Such a module has `in_features`, `out_features`, and a `weight` of shape (out, in) or `dequantized()`, which gives one.
    """
    return isinstance(module, nn.Linear | Conv1D) or getattr(module, "paretune_linear", False) is True


def is_transposed(module: nn.Module) -> bool:
    """Is its weight stored as (in, out)?"""
    return isinstance(module, Conv1D)


def weight(module: nn.Module) -> Tensor:
    """The weight of a linear map as (out, in): a view, so that writing to it writes to the module; of a packed map, what its codes stand for."""
    if hasattr(module, "dequantized"):
        return module.dequantized()
    return module.weight.T if is_transposed(module) else module.weight


def model_type(model: nn.Module) -> str:
    """`config.model_type`, or the class's name for a model that has none."""
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules by path, in its order, without the adapters on it."""
    return {path: module for path, module in model.named_modules() if OURS not in path.split(".")}


def base_prefix(model: nn.Module) -> str:
    """What stands before the base model's paths: `bert.` in a task model, nothing in a base model."""
    name = getattr(model, "base_model_prefix", "")
    return f"{name}." if name and isinstance(getattr(model, name, None), nn.Module) else ""


def stacks_of(model: nn.Module, modules: dict[str, nn.Module]) -> list[tuple[Stack, list[LayerRef]]]:
    """The stacks that this model has, with their layers; an encoder without its decoder is a model, too."""
    found = []
    for stack in family(model).stacks:
        pattern = base_prefix(model) + stack.layers
        lists = [p for p, m in modules.items() if isinstance(m, nn.ModuleList) and fnmatchcase(p, pattern)]
        paths = [f"{p}.{i}" for p in lists for i in range(len(modules[p]))]  # type: ignore[arg-type]
        if paths:
            found.append((stack, [LayerRef(stack.name, i, path) for i, path in enumerate(paths)]))
    if not found:
        raise Incompatible(f"{type(model).__name__}: no layers at {one_of(s.layers for s in family(model).stacks)}")
    return found
