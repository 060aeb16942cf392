"""Linear maps whose stored weights a transform rewrites: which ones it may, and cutting features out of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paretune import anatomy, seams
from paretune.anatomy import Site
from paretune.errors import Incompatible
from paretune.roles import Method, Trail

FLOATS = ("float", "bf16", "fp16")


def require_floats(method: Method, trail: Trail) -> None:
    """Refuses a method that rewrites weights where a transform before it left them as codes, or an adapter computes with them."""
    if trail.weights not in FLOATS:
        raise Incompatible(f"{method!r}: {trail.by} left {trail.weights} weights, and {method.spelling()} starts from float ones; put it before {trail.by}")
    inside = next((m for m in trail.attached if m.reweighs), None)
    if inside is not None:
        raise Incompatible(f"{method!r}: {inside!r} computes with the weights that {method.spelling()} changes; put merge before {method.spelling()}")


def rewritable(model: nn.Module, targets: str | Sequence[str], *, by: Method, forms: tuple[type[nn.Module], ...] = ()) -> list[Site]:
    """The linear maps that a target spec hits, each with float weights of its own.

    Args:
        by: the transform that will rewrite them, for the refusals.
        forms: classes of packed modules that it can rewrite, too.

    Raises:
        TargetError: for a word of the spec that hits nothing.
        Incompatible: for a packed or tied weight, or one that an attached adapter computes with.
    """
    sites = anatomy.resolve(model, targets, kind="linear")
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for site in sites:
        module = model.get_submodule(site.path)
        if hasattr(module, "packed_by") and not isinstance(module, forms):
            raise Incompatible(f"{by!r}: {module.packed_by} has changed the form of {site.path} already; keep one of the two, or put {by!r} first")
        if owners[id(module.weight)] > 1:
            raise Incompatible(f"{by!r}: the weight of {site.path} is shared with another module, which would change, too; put {by!r} first or leave it out")
        seam = seams.seam_of(module)
        if seam is not None and any(p.reweighs for _, _, p in seam.patches()):
            raise Incompatible(f"{by!r}: an adapter at {site.path} computes with its weight; merge or remove it first")
    return sites


def require_bare(model: nn.Module, paths: Sequence[str], *, by: Method) -> None:
    """Refuses where an adapter's tensors have the widths of these modules, which are about to change."""
    for path in paths:
        seam = seams.seam_of(model.get_submodule(path))
        if seam is not None and any(not isinstance(p, seams.Selected) for _, _, p in seam.patches()):
            raise Incompatible(f"{by!r}: an adapter at {path} has its width, which {by.spelling()} changes; merge it first, or attach it afterwards")


@torch.no_grad()
def cut(module: Any, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keeps these output features (rows) and input features (columns) of a plain linear map, or of a table; None keeps all."""
    weight, bias = anatomy.weight(module), getattr(module, "bias", None)
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    out, inside = weight.shape
    transposed = anatomy.is_transposed(module)
    learns = module.weight.requires_grad
    module.weight = nn.Parameter((weight.T if transposed else weight).contiguous(), requires_grad=learns)
    if bias is not None:
        module.bias = nn.Parameter(bias.clone(), requires_grad=module.bias.requires_grad)
    names = ("num_embeddings", "embedding_dim") if isinstance(module, nn.Embedding) else ("nf", "nx") if transposed else ("out_features", "in_features")
    setattr(module, names[0], out)
    setattr(module, names[1], inside)


def resize(module: nn.Module, sizes: dict[str, int]) -> None:
    """Brings a module that was just built from its config to the sizes that the config does not say, before its values are loaded.

    `out` and `in` are the rows and columns of a weight; every other name is an attribute. They stay on the module as `resized`.
    """
    if "out" in sizes:
        device = module.weight.device  # type: ignore[union-attr]
        cut(module, rows=torch.arange(sizes["out"], device=device), columns=torch.arange(sizes["in"], device=device))
    for name, value in sizes.items():
        if name in module.__dict__:
            setattr(module, name, value)
    mark(module, sizes)


def cut_and_mark(module: nn.Module, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """`cut`, where the config cannot say the new sizes."""
    cut(module, rows=rows, columns=columns)
    out, inside = anatomy.weight(module).shape
    mark(module, {"out": out, "in": inside})


def mark(module: nn.Module, sizes: dict[str, int]) -> None:
    """Writes on a module which sizes its config does not say; saved in the record, and taken over by what replaces the module."""
    module.__dict__["resized"] = {**module.__dict__.get("resized", {}), **sizes}
