"""NormalFloat4: a frozen base in four bits, on which adapters learn; `nf4 | lora(targets="linear")` is QLoRA.

    c_i = argmin_k |w_i / a_b − v_k|,   a_b = max_{i in block b} |w_i|,   v: the 16 quantile levels of a normal distribution
    a_b ≈ m + A_g · u_{d_b},            m = mean a,  A_g = max over 256 blocks of |a − m|,  u: the 256 levels of dynamic floats
    y = x Ŵᵀ + b,  ŵ_i = a_b v_{c_i};   ∂L/∂x = ∂L/∂y Ŵ, and no gradient for the codes

Dettmers et al. 2023, arXiv:2305.14314, equations 4 to 6. Codes, packing and constants are those of bitsandbytes;
`paretune.weights.bitsandbytes_format` reads and writes its files' tensors.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from paretune.card import Card, knob
from paretune.weights.numerics import blockwise, dynamic_float, grouped, levels_of_nibbles, nibbles, normal_float, ungrouped
from paretune.weights.packed import Packing

NESTED = 256  # constants with one second-level constant


@dataclasses.dataclass(frozen=True, repr=False)
class NF4(Packing):
    """Packs the backbone's linear maps into NormalFloat4 with doubly quantized constants."""

    card = Card(
        title="NormalFloat4 (the base of QLoRA)",
        paper="Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs",
        arxiv="2305.14314",
        equation="w = a_b v_c",
        lowers="E",
        why="4.13 bits a weight, so that a model several times as large can be trained on; time is not saved but spent.",
        note="For memory, not for time: weights are dequantized at every use, at most 16 MB at a time, and again in the backward pass. Measured on one thread "
        "of AMD EPYC (avx512_bf16, avx512_vnni, avx_vnni, avx512f, avx2), eagerly, by CPU time, a map from 768 to 3072: for 1, 8, 32, 128 and 512 tokens it takes "
        "6.3, 1.5, 0.9, 0.5 and 0.33 times as long as in fp32, and with inputs in bf16 9, 6.5, 3.8, 1.8 and 1.3 times as long as a bf16 map. Normal "
        "weights are off by 9 %, and double quantization adds less than 0.1 % to that. Outside training, fp32 inputs of many tokens are multiplied in bf16 "
        "where that was faster (0.3 % of the output; `paretune doctor` prints where, and the slow-down here). Embeddings, tied outputs and the task's head "
        "stay float.",
    )
    carries = True
    error = 0.12

    block: int = knob(64, "weights with one constant, a power of two", choices=(32, 64, 128, 256, 512, 1024, 2048, 4096))
    double_quant: bool = knob(True, "store the constants in 8 bits, too: 0.127 bits a weight in the place of 0.5")

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        codes, largest = blockwise(weight.flatten(), normal_float(), size=self.block)
        if not self.double_quant:
            return {"weight": nibbles(codes), "absmax": largest}
        offset = largest.mean()
        constants, nested = blockwise(largest - offset, dynamic_float(), size=NESTED)
        return {"weight": nibbles(codes), "absmax": constants, "nested_absmax": nested, "nested_offset": offset}

    def decode(self, codes: dict[str, Tensor], shape: tuple[int, int], *, rows: slice | Tensor) -> Tensor:
        packed, constants = codes["weight"], self.constants(codes)
        whole_rows = shape[1] % self.block == 0
        if whole_rows:  # no block lies in two rows, and only the blocks of these rows are needed
            packed, constants = packed.view(shape[0], -1)[rows].flatten(), constants.view(shape[0], -1)[rows].flatten()
        levels = levels_of_nibbles(packed, normal_float())
        if whole_rows:
            return levels.view(-1, self.block).mul_(constants[:, None]).view(-1, shape[1])  # ŵ = a_b v_c
        levels = levels[: shape[0] * shape[1]]
        return ungrouped(grouped(levels, self.block) * constants[:, None], len(levels)).view(shape)[rows]

    def constants(self, codes: dict[str, Tensor]) -> Tensor:
        """a (⌈n / block⌉,) in fp32."""
        if not self.double_quant:
            return codes["absmax"]
        levels = dynamic_float().to(codes["absmax"].device)[codes["absmax"].int()]
        blocks = grouped(levels, NESTED) * codes["nested_absmax"][:, None]  # A_g u_d
        return ungrouped(blocks, len(levels)) + codes["nested_offset"]
