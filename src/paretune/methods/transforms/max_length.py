"""Shorter inputs: the tokenizer cuts at n tokens and the model keeps n positions; for images, n is the resolution.

    P ← P[: offset + n]                 text;  self-attention costs n² d, everything else n d²
    P ← bicubic(P, to (n / patch)²)     images, as transformers resizes positions

Dosovitskiy et al. 2020, arXiv:2010.11929, section 3.2 (interpolated positions).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from paretune import anatomy, hub, processors, surgery
from paretune.anatomy import Embeddings
from paretune.attention import efficient, lengths
from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.roles import Examples, Transform


@dataclasses.dataclass(frozen=True, repr=False)
class MaxLength(Transform):
    """Limits texts to n tokens, images to n × n pixels."""

    card = Card(
        title="Shorter inputs",
        paper="Dosovitskiy et al. 2020, An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
        arxiv="2010.11929",
        equation="P = P[: offset + n]",
        lowers="E",
        why="Long inputs cost less, in training, too, where it stands before the adapter; what lies beyond the cut is not read.",
        note="Texts of at most n tokens give the same outputs as before, bit for bit. Models with rotary or relative positions have no rows to cut.",
    )
    needs_processor = True

    n: int = knob(64, "tokens of a text, special ones included, or pixels of an image's side", low=2, search="16..512 log")

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        where = anatomy.embeddings(model)
        image = where.length == "image_size"
        limit = None if where.length is None else getattr(model.config, where.length)
        if not image and limit is not None and where.positions and where.counted:
            limit -= where.offset
        self._check(model, limit, image=image)
        surgery.settle(model)
        if image:
            _resize(model, where, self.n)
        elif where.positions and where.length is not None:
            lengths.set_positions(model, where, n=self.n)
        _limit(processors.get(model), self.n)
        hub.refresh(model)
        return model

    def _check(self, model: nn.Module, limit: Any, *, image: bool) -> None:
        name = type(model).__name__
        if "input_values" in getattr(model, "main_input_name", ""):
            raise Incompatible(f"{self!r}: {name} reads sound, whose length is set by its feature extractor; max_length is for texts and images")
        if image and (not isinstance(limit, int) or self.n % model.config.patch_size):
            raise Incompatible(f"{self!r}: the side of an image of {name} is a multiple of its patches' {model.config.patch_size} pixels")
        if image:
            efficient.require_room(model, (self.n // model.config.patch_size) ** 2 + anatomy.embeddings(model).offset, by=self)
        if not image and limit is not None and self.n > limit:
            raise Incompatible(f"{self!r}: {name} has {limit} positions; give n from 2 to {limit}")


def _resize(model: nn.Module, where: Embeddings, n: int) -> None:
    (path,) = where.positions
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    old = getattr(holder, name)  # (1, offset + G², D)
    extra, grid = old.detach()[:, : where.offset], old.detach()[:, where.offset :]
    side, new = int(grid.shape[1] ** 0.5), n // model.config.patch_size
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, G, G)
    grid = grid if new == side else F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    positions = torch.cat([extra, grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], 1)
    setattr(holder, name, nn.Parameter(positions, requires_grad=old.requires_grad))
    for module in holder.modules():
        if hasattr(module, "image_size"):
            module.image_size = (n, n)
        if hasattr(module, "num_patches"):
            module.num_patches = new * new
    model.config.image_size = n


def _limit(processor: Any, n: int) -> None:
    if hasattr(processor, "model_max_length"):
        processor.model_max_length = n
        processors.truncate(processor)
    for name in ("size", "crop_size"):
        if getattr(processor, name, None) is not None:
            setattr(processor, name, {"height": n, "width": n})
