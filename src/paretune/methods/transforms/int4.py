"""int4 weights: codes of 4 bits with a scale and a zero point per group of inputs.

    w_oi ≈ s_og (q_oi − z_og),   s = (h − l) / 15,   z = −8 − round(l / s),   q = round(w / s) + z      per group g of inputs
    y = x Ŵᵀ + b

Round to nearest, the mapping of Jacob et al. 2017, arXiv:1712.05877, by group as in Frantar et al. 2022, arXiv:2210.17323, section 4.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from paretune.card import Card, knob
from paretune.weights.kernels import Way
from paretune.weights.numerics import absmax, grouped, levels_of_nibbles, nibbles, scaled, ungrouped, zero_point
from paretune.weights.packed import PackedLinear, Packing

LEVELS = torch.arange(16, device="cpu") - 8  # what a half byte stands for


@dataclasses.dataclass(frozen=True, repr=False)
class Int4(Packing):
    """Packs the backbone's linear maps, and its token embedding, into int4 codes by group."""

    card = Card(
        title="int4 weights by group",
        paper="Frantar et al. 2022, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        arxiv="2210.17323",
        equation="w = s (q - z)",
        lowers="E",
        why="4.4 bits a weight to store and to read, which is what a single token's time is made of.",
        note="Normal weights are off by 8, 9 and 10 % for groups of 32, 64 and 128; |w - s (q - z)| is at most 0.57 s. Measured on one thread of AMD EPYC "
        "(avx512_bf16, avx512_vnni, avx_vnni, avx512f, avx2), eagerly, by CPU time, a map from 768 to 3072: for 1, 8, 32, 128 and 512 tokens it takes 0.13, 0.22, "
        "0.41, 0.55 and 0.34 times as long as in fp32, and with inputs in bf16 0.18, 0.86, 1.6, 2.3 and 1.3 times as long as a bf16 map. A kernel on the "
        "codes reads inputs in bf16 (0.3 % of the output) and holds the codes a second time, in its own layout; where dequantizing, to the inputs' format "
        "or to bf16, was faster for so many tokens (timed once per process, format and shape), weights are dequantized at every use, as always in "
        "training. `paretune doctor` measures it here. Tied outputs and the task's head stay float.",
    )
    carries = True
    error = 0.12

    group: int = knob(64, "inputs with one scale", choices=(32, 64, 128))
    symmetric: bool = knob(False, "absmax: codes of -7 to 7 and no zero point")
    embeddings: bool = knob(True, "store the token embedding in int4, too, by groups of its features")

    @property
    def grid(self) -> tuple[int, int] | None:
        return (4, self.group) if self.symmetric else None

    def encode(self, weight: Tensor, steps: Tensor | None = None) -> dict[str, Tensor]:
        groups = grouped(weight, self.group)  # (O, G, group)
        if self.symmetric:
            codes, scales, *zeros = absmax(groups, bits=4, stored=torch.bfloat16, scales=None if steps is None else steps.view(groups.shape[:2]))
        else:
            codes, scales, *zeros = zero_point(groups, bits=4, stored=torch.bfloat16)
        packed = {"weight": nibbles(ungrouped(codes, weight.shape[1]) + 8).flatten(), "scales": scales.flatten()}
        return packed | ({"zeros": zeros[0].flatten()} if zeros else {})

    def decode(self, codes: dict[str, Tensor], shape: tuple[int, int], *, rows: slice | Tensor) -> Tensor:
        by_row = {name: tensor.view(shape[0], -1)[rows] for name, tensor in codes.items()}
        q = grouped(levels_of_nibbles(by_row["weight"], LEVELS)[:, : shape[1]], self.group)
        return ungrouped(scaled(q, by_row["scales"], zeros=by_row.get("zeros")), shape[1])

    def ways(self, module: PackedLinear, dtype: torch.dtype) -> dict[str, Way]:
        ways = super().ways(module, dtype)
        if module.in_features % self.group == 0 and module.out_features % 16 == 0:
            ways["codes"] = lambda x: module.with_bias(self._on_codes(module, x.flatten(0, -2).bfloat16()), x)
        return ways

    def _on_codes(self, module: PackedLinear, x: Tensor) -> Tensor:
        """x (T, I) in bf16 times the codes, which the kernel decodes as it goes: (T, O)."""
        codes, scales = module.kept("codes", lambda: self._layout(module))
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, self.group, scales)

    def _layout(self, module: PackedLinear) -> tuple[Tensor, Tensor]:
        """The codes as the kernel wants them, and (G, O, 2) of s and −s z."""
        codes = levels_of_nibbles(module.weight.view(module.out_features, -1), LEVELS).int() + 8
        scales = module.scales.view(module.out_features, -1).float()
        shift = torch.zeros_like(scales) if self.symmetric else -scales * module.zeros.view_as(scales).float()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
        return packed, torch.stack([scales, shift], -1).transpose(0, 1).contiguous().bfloat16()  # kernel: w = s (q − 8) + shift
