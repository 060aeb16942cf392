"""fp8 weights: floats of 8 bits with a scale per output channel.

    w_oi ≈ s_o · f_oi,   s_o = max_i |w_oi| / max f,   f = round(w / s) to e4m3 (max 448) or e5m2 (max 57344)
    y = x Ŵᵀ + b

Micikevicius et al. 2022, arXiv:2209.05433. |ŵ − w| ≤ 2⁻⁴ |w| for e4m3 and 2⁻³ |w| for e5m2, above s · 2⁻⁶ and s · 2⁻¹⁴.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from paretune.card import Card, knob
from paretune.weights.numerics import TINY
from paretune.weights.packed import Packing

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclasses.dataclass(frozen=True, repr=False)
class FP8(Packing):
    """Packs the backbone's linear maps, and its token embedding, into 8-bit floats; for memory, not for time."""

    card = Card(
        title="fp8 weights",
        paper="Micikevicius et al. 2022, FP8 Formats for Deep Learning",
        arxiv="2209.05433",
        equation="w = s f",
        lowers="E",
        why="A quarter of the bytes, with an error in proportion to each weight, so that small weights beside large ones stay.",
        note="For memory alone on a processor, which has no fp8 products: weights are dequantized at every use. Measured on one thread of AMD EPYC "
        "(avx512_bf16, avx512_vnni, avx_vnni, avx512f, avx2), eagerly, by CPU time, a map from 768 to 3072: for 1, 8, 32, 128 and 512 tokens it takes 11, 3.6, 1.2, "
        "0.62 and 0.35 times as long as in fp32, and with inputs in bf16 13, 11, 5.3, 2.6 and 1.4 times as long as a bf16 map. Normal weights are off by "
        "2.7 % in e4m3 and 5.3 % in e5m2, where int8 with the same bytes is off by 0.7 %: fp8 is for weights of very different sizes in one row. Outside "
        "training, fp32 inputs of many tokens are multiplied in bf16 where that was faster (0.3 % of the output; `paretune doctor` prints where, and the "
        "slow-down here). Tied outputs and the task's head stay float.",
    )
    carries = True
    error = 0.06

    format: str = knob("e4m3", "bits of exponent and mantissa", choices=("e4m3", "e5m2"))
    embeddings: bool = knob(True, "store the token embedding in fp8, too, with a scale per token")

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        dtype = FORMATS[self.format]
        scales = weight.float().abs().amax(1) / torch.finfo(dtype).max
        codes = (weight.float() / scales.clamp(min=TINY)[:, None]).to(dtype)  # to the nearest, halves to the even mantissa
        return {"weight": codes.view(torch.int8).flatten(), "scales": scales}

    def decode(self, codes: dict[str, Tensor], shape: tuple[int, int], *, rows: slice | Tensor) -> Tensor:
        bits = codes["weight"].view(shape)[rows].contiguous().view(torch.uint8)
        values = torch.arange(256, dtype=torch.uint8, device=bits.device).view(FORMATS[self.format]).float()
        return values.index_select(0, bits.flatten().int()).view_as(bits).mul_(codes["scales"][rows][:, None])  # a lookup is faster than a conversion
