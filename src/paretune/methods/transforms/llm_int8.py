"""LLM.int8(): vector-wise int8 products, but for the few input features with outliers, which stay in 16 bits.

    O = {i : max_t |x_ti| ≥ threshold}
    y_to = a_t s_o Σ_{i ∉ O} u_ti q_oi / 127 + Σ_{i ∈ O} x_ti ŵ_oi + b_o
    a_t = max_{i ∉ O} |x_ti|,  u = round(127 x / a);     s_o = max_i |w_oi| / 127,  q = round(w / s),  ŵ = s q

Dettmers et al. 2022, arXiv:2208.07339, equations 7 and 8. Codes are those of bitsandbytes, which keeps outlier columns of W as codes, too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from paretune.card import Card, knob
from paretune.roles import Examples
from paretune.weights.calibration import unpadded
from paretune.weights.kernels import Way
from paretune.weights.numerics import absmax, scaled
from paretune.weights.packed import PackedLinear, Packing
from paretune.weights.ranges import watch

EXAMPLES = 32  # read for the facts


@dataclasses.dataclass(frozen=True, repr=False)
class LLMInt8(Packing):
    """Packs the backbone's linear maps into int8 and multiplies in integers, apart from outlier features."""

    card = Card(
        title="LLM.int8()",
        paper="Dettmers et al. 2022, LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
        arxiv="2208.07339",
        equation="y = s a Σ u q / 127 + Σ_O x w + b",
        lowers="E",
        why="A quarter of the bytes, without the error that a few features with values a hundred times as large bring to int8.",
        note="Measured on one thread of AMD EPYC (avx512_bf16, avx512_vnni, avx_vnni, avx512f, avx2), eagerly, by CPU time, a map from 768 to 3072: for 1, 8, 32, 128 "
        "and 512 tokens it takes 0.61, 0.54, 0.22, 0.23 and 0.19 times as long as in fp32, and with inputs in bf16 0.78, 1.1, 0.96, 0.95 and 0.85 times as "
        "long as a bf16 map. int8 takes its range per token, so that outliers cost it precision. Which features are outliers is decided over all tokens of "
        "a batch, so other rows may change a result within rounding. Where dequantizing was faster for so many tokens (timed once per process, format and "
        "shape; `paretune doctor` prints it), weights are dequantized, and no input is rounded to 8 bits. Gradients are those of the dequantized weight. "
        "Graphics cards dequantize. Embeddings, tied outputs and the task's head stay float; facts give the share of outlier features of each map.",
    )
    carries = True
    error = 0.01

    threshold: float = knob(6.0, "the size of an input from which its feature is an outlier; 0 is none", low=0.0)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        codes, scales = absmax(weight)
        return {"weight": codes.flatten(), "scales": scales}

    def decode(self, codes: dict[str, Tensor], shape: tuple[int, int], *, rows: slice | Tensor) -> Tensor:
        return scaled(codes["weight"].view(shape)[rows], codes["scales"][rows])

    def ways(self, module: PackedLinear, dtype: torch.dtype) -> dict[str, Way]:
        return {"codes": lambda x: self._split(module, x), **super().ways(module, dtype)}

    def _split(self, module: PackedLinear, x: Tensor) -> Tensor:
        """y (..., O): regular features in integers, outliers in 16 bits."""
        rows = x.flatten(0, -2)  # (T, I)
        outliers = self.outliers(rows).nonzero().flatten()
        regular = rows.index_fill(1, outliers, 0) if len(outliers) else rows
        codes, scales = absmax(regular)  # u, a / 127
        q = module.weight.view(module.shape)
        y = torch._int_mm(codes, q.T).float().mul_(scales[:, None]).mul_(module.scales)  # (T, O), exact sums of integers
        if len(outliers):
            half = x.dtype if x.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
            w = scaled(q.index_select(1, outliers), module.scales).to(half)  # (O, |O|)
            y += rows.index_select(1, outliers).to(half) @ w.T
        return module.with_bias(y, x)

    def outliers(self, x: Tensor) -> Tensor:
        """Which of the features (I) of inputs (..., I) reach the threshold in any token."""
        return (x.abs() >= self.threshold).flatten(0, -2).any(0) & (self.threshold > 0)

    def facts(self, processor: Any, model: nn.Module, *, task: Any) -> dict[str, float]:
        """The share of each map's input features that are outliers in training examples, by the map's path."""
        paths = {m: path for path, m in model.named_modules() if isinstance(m, PackedLinear)}
        found: dict[str, Tensor] = {}

        def see(m: PackedLinear, x: Tensor) -> None:
            found[paths[m]] = found.get(paths[m], torch.tensor(False)) | self.outliers(x)

        with torch.no_grad():
            batches = unpadded(model, Examples(task, processor), count=EXAMPLES)
            watch(model, list(paths), see=see, batches=batches, kind=task.kind)
        return {f"outlier_share {path}": float(found[path].float().mean()) for path in found}
