"""Casting: the weights in a 16-bit number format, half the bytes.

    w ← round_to_nearest(w)        bf16: 8 bits of precision, |error| ≤ 2⁻⁸ |w|;  fp16: 11 bits, |error| ≤ 2⁻¹¹ |w| where normal

Micikevicius et al. 2017, arXiv:1710.03740 (fp16); Kalamkar et al. 2019, arXiv:1905.12322 (bf16).
"""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import nn

from paretune import surgery
from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.roles import Examples, Trail, Transform
from paretune.seams import CHILD

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True, repr=False)
class Cast(Transform):
    """Stores and computes in bf16 or fp16; adapter tensors keep fp32."""

    card = Card(
        title="16-bit weights",
        paper="Kalamkar et al. 2019, A Study of BFLOAT16 for Deep Learning Training",
        arxiv="1905.12322",
        equation="w = round(w)",
        lowers="E",
        why="Half the bytes to store and to move; faster only where the processor computes in the format.",
        note="Measured, linear 384 to 1536: with AVX512-BF16, bf16 is 2.0 to 2.2 times as fast as fp32 from 26 tokens on, with AMX 4 to 6 times; "
        "without either, and for single tokens, it is slower. fp16 has no fast path on such processors (26 to 128 tokens take 4.6 to 5.8 times "
        "as long as in fp32); it is for graphics cards.",
    )

    dtype: str = knob("bf16", "the number format", choices=("bf16", "fp16"))

    def follow(self, trail: Trail) -> Trail:
        if trail.weights != "float":
            raise Incompatible(f"{self!r}: {trail.by} left {trail.weights} weights, and cast starts from float ones; keep one of the two")
        return trail.replace(weights=self.dtype, by=self.spelling())

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        surgery.settle(model)
        dtype = FORMATS[self.dtype]
        stay = _stay(model, dtype)
        saved = set(model.state_dict())  # not the other buffers: tables of rotary angles are made anew in fp32 at every loading
        for name, tensor in (*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in saved)):
            if tensor.is_floating_point() and CHILD not in name.split(".") and not (stay and stay.search(name)):
                tensor.data = tensor.data.to(dtype)
        model.config.dtype = dtype
        return model


def _stay(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Which tensors the family needs in fp32 (T5's `wo` in fp16); from_pretrained would load them so, too."""
    names = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    return re.compile("|".join(name.replace("*", ".*") for name in names)) if names else None
