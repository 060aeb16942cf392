"""int8 weights: codes of 8 bits in the file and in memory, products in the number format of the inputs.

    w_oi ≈ s_o q_oi,   s_o = max_i |w_oi| / 127,   q = round(w / s)       per output channel, or per group of inputs
    y = x Ŵᵀ + b,      ŵ = s q

Dettmers et al. 2022, arXiv:2208.07339, section 2.1 (absmax, vector-wise); weights alone, so no activation is rounded.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from paretune.card import Card, knob
from paretune.weights.kernels import Way
from paretune.weights.numerics import absmax, grouped, scaled, ungrouped
from paretune.weights.packed import PackedLinear, Packing


@dataclasses.dataclass(frozen=True, repr=False)
class Int8Weights(Packing):
    """Packs the backbone's linear maps, and its token embedding, into int8 codes and keeps activations as they are."""

    card = Card(
        title="int8 weights",
        paper="Dettmers et al. 2022, LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
        arxiv="2208.07339",
        equation="y = x (s q)ᵀ + b",
        lowers="E",
        why="A quarter of the bytes to store and to read, which is what a single token's time is made of.",
        note="Weights are off by 0.7 %. A kernel on the codes reads inputs in bf16 (0.3 % of the output); where dequantizing, to the inputs' format or to bf16, "
        "was faster for so many tokens (timed once per process, format and shape), and with groups, weights are dequantized at every use, as always in "
        "training. Measured on one thread of AMD EPYC (avx512_bf16, avx512_vnni, avx_vnni, avx512f, avx2), eagerly, by CPU time, a map from 768 to 3072: for 1, 8, "
        "32, 128 and 512 tokens it takes 0.13, 0.24, 0.51, 0.41 and 0.3 times as long as in fp32, and with inputs in bf16 0.19, 0.99, 1.7, 1.6 and 1.2 "
        "times as long as a bf16 map. `paretune doctor` measures it here. int8 is faster for 32 tokens and more. Tied outputs and the task's head stay "
        "float.",
    )
    carries = True
    error = 0.01

    group: int = knob(0, "inputs with one scale; 0 is all inputs of an output channel", low=0)
    embeddings: bool = knob(True, "store the token embedding in int8, too, with a scale per token")

    @property
    def grid(self) -> tuple[int, int] | None:
        return 8, self.group

    def encode(self, weight: Tensor, steps: Tensor | None = None) -> dict[str, Tensor]:
        groups = grouped(weight, self.group or weight.shape[1])  # (O, G, I / G)
        codes, scales = absmax(groups, scales=None if steps is None else steps.view(groups.shape[:2]))
        return {"weight": ungrouped(codes, weight.shape[1]).flatten(), "scales": scales.flatten()}

    def decode(self, codes: dict[str, Tensor], shape: tuple[int, int], *, rows: slice | Tensor) -> Tensor:
        q, scales = codes["weight"].view(shape)[rows], codes["scales"].view(shape[0], -1)[rows]
        return ungrouped(scaled(grouped(q, self.group or shape[1]), scales), shape[1])

    def ways(self, module: PackedLinear, dtype: torch.dtype) -> dict[str, Way]:
        ways = super().ways(module, dtype)
        if self.group in (0, module.in_features) and module.in_features % 32 == 0 and module.out_features % 32 == 0:
            ways["codes"] = lambda x: module.with_bias(self._on_codes(module, x.flatten(0, -2).bfloat16()), x)
        return ways

    def _on_codes(self, module: PackedLinear, x: Tensor) -> Tensor:
        """x (T, I) in bf16 times the codes, by a kernel that scales their sums: (T, O)."""
        return torch.ops.aten._weight_int8pack_mm(x, module.aligned().view(module.shape), module.kept("scales", module.scales.bfloat16))
