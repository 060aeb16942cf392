"""Sequences cut into chunks of equal size, and each chunk beside its neighbors: what local attention computes on.

Shapes: ... any leading sizes, T positions, D features, C chunks of c positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def chunks(x: Tensor, size: int) -> Tensor:
    """(..., T, D) as (..., C, c, D) with c = size; zeros fill the last chunk."""
    short = -x.shape[-2] % size
    return (F.pad(x, (0, 0, 0, short)) if short else x).unflatten(-2, (-1, size))


def beside(x: Tensor, *, back: int, ahead: int = 0) -> Tensor:
    """Chunks (..., C, c, D) with so many chunks in front of and behind each: (..., C, (back + 1 + ahead) c, D); zeros where there is none."""
    count = x.shape[-3]
    wide = F.pad(x, (0, 0, 0, 0, back, ahead))
    return torch.cat([wide.narrow(-3, i, count) for i in range(back + 1 + ahead)], -2)


def places(length: int, size: int, *, like: Tensor) -> Tensor:
    """The positions (C, c) that the chunks of a sequence of this length hold; -1 where the last one is filled up."""
    return chunks(torch.arange(1, length + 1, device=like.device)[:, None], size)[..., 0] - 1


def places_beside(length: int, size: int, *, back: int, ahead: int = 0, like: Tensor) -> Tensor:
    """The positions (C, (back + 1 + ahead) c) that each chunk has in and beside it; -1 where there is none."""
    return beside(places(length, size, like=like)[..., None] + 1, back=back, ahead=ahead)[..., 0] - 1
