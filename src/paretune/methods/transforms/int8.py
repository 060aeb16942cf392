"""int8 quantization: linear maps multiply in 8-bit integers, embeddings are stored in 8 bits.

    w_oi ≈ s_o q_oi,         s_o = max_i |w_oi| / 127,          q = round(w / s)            per output channel, once
    x_i ≈ m + s u_i,         m = min x,  s = (max x − m) / 255,  u = round((x − m) / s)      per token, at every forward
    y_o = s · s_o Σ_i u_i q_oi + m · c_o + b_o,                  c_o = s_o Σ_i q_oi

or, static, with one range [l, h] of a map's inputs from training examples, which holds 0:

    x_i ≈ s (u_i − z),       s = (h − l) / 255,  z = round(−l / s),  u = round(x / s) + z, kept in 0 .. 255
    y_o = s · s_o Σ_i (u_i − z) q_oi + b_o

Jacob et al. 2017, arXiv:1712.05877 (integer arithmetic, equations 1 to 7); Zafrir et al. 2019, arXiv:1910.06188 (Q8BERT).
The static ranges: Wu et al. 2020, arXiv:2004.09602, section 3.3 (minmax, percentile, entropy).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _python_dispatch

from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.roles import Examples
from paretune.weights import ranges
from paretune.weights.calibration import unpadded
from paretune.weights.kernels import Way
from paretune.weights.numerics import TINY, absmax, scaled
from paretune.weights.packed import Packed, PackedLinear, Packing


@dataclasses.dataclass(frozen=True, repr=False)
class Int8(Packing):
    """Packs the backbone's linear maps, and its token embedding, into int8 codes and fp32 scales."""

    card = Card(
        title="Dynamic int8 quantization",
        paper="Zafrir et al. 2019, Q8BERT: Quantized 8Bit BERT",
        arxiv="1910.06188",
        equation="y = s · s_o Σ u q + m · c + b",
        lowers="E",
        why="A quarter of the bytes, and integer products that processors do several times as fast as fp32.",
        note="A linear map's output is off by about 1 %. MiniLM's sentence vectors keep a cosine of 0.998 to the float ones; its int8 "
        "embedding table adds 0.6 % to their error. Measured on one thread with AVX512-VNNI and AVX512-BF16, without AMX: for 26, 128 and "
        "1024 tokens a map from 768 to 3072 is 4.1, 3.9 and 3.9 times as fast as fp32 (1.8 times as bf16), from 384 to 1536 2.5, 3.2 and "
        "3.7 times (1.3 to 1.6 times as bf16). For one token wide maps gain 1.7 times and narrow ones lose: 384 to 384 takes 3.4 times as "
        "long as in fp32. Whole MiniLM: 1.8 times as fast as fp32 for a text of 26 tokens, 2.2 times for 8 texts of 128; 1.1 and 1.25 times "
        "as bf16. With two threads, one text at a time, it took 1.07 to 1.2 times bf16's time on three tasks, and as an ONNX graph 0.24 to 0.42 of it "
        "(docs/shrinking.md). Processors without VNNI get 7-bit inputs, twice as coarse; those without the kernel, and graphics cards, dequantize: small, not fast. "
        "The task's head, tied outputs and convolutions stay float. Static ranges, measured with AMX: 1.2 times as fast as "
        "dynamic ones for 128 tokens and 1.4 times for 1024, equal for fewer; a map's output is off by 1.1 % in the place of 0.8 %, and inputs outside "
        "the range of the examples are cut off. Where bf16 was faster for so many tokens on this processor (timed once per process, format and shape; "
        "`paretune doctor` prints it), a map multiplies by a copy of its weights in bf16: 2 bytes a weight of memory beside the codes, none in the file; "
        "the integer kernel holds the codes a second time, in a layout of its own: 1 byte a weight; a map that takes both, for few tokens and for many, holds both. "
        "Between the maps numbers stay fp32, which takes longer than `cast` from 64 tokens on where the processor has AMX; cast | int8 keeps them in "
        "bf16, so that each of its maps takes what is faster of int8 and `cast`, and is for such processors.",
    )

    error = 0.01

    embeddings: bool = knob(True, "store the token embedding in int8, too, with a scale per token")
    mode: str = knob("dynamic", "where the range of a map's inputs comes from: each token, or training examples", choices=("dynamic", "static"))
    calibration: str = knob("minmax", "static: the range from the examples' inputs", choices=("minmax", "percentile", "entropy"))
    examples: int = knob(64, "static: how many training examples are read", low=1)

    @property
    def needs_examples(self) -> bool:  # type: ignore[override]
        return self.mode == "static"

    @property
    def grid(self) -> tuple[int, int] | None:
        return 8, 0

    def encode(self, weight: Tensor, steps: Tensor | None = None) -> dict[str, Tensor]:
        codes, scales = absmax(weight, scales=steps)
        return {"weight": codes.flatten(), "scales": scales}

    def decode(self, codes: dict[str, Tensor], shape: tuple[int, int], *, rows: slice | Tensor) -> Tensor:
        return scaled(codes["weight"].view(shape)[rows], codes["scales"][rows])

    def empty(self, module: nn.Module) -> Packed:
        made = super().empty(module)
        if self.mode == "static" and isinstance(made, PackedLinear):
            made.register_buffer("range", torch.zeros(2, device=made.weight.device))
        return made

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        if self.mode == "static" and examples is None:
            raise Incompatible(f"{self!r}: the ranges come from a task's training examples; give the task, or take mode=\"dynamic\"")
        super().apply(model, examples)
        if examples is not None and self.mode == "static":
            batches = unpadded(model, examples, count=self.examples)
            ranges.calibrate(model, batches, kind=examples.task.kind, rule=self.calibration)
        return model

    def ways(self, module: PackedLinear, dtype: torch.dtype) -> dict[str, Way]:
        if not levels_here():
            return super().ways(module, dtype)
        product = self._static if self.mode == "static" and module.kept("grid", lambda: _grid(module)) else self._dynamic  # until its examples are read, by token
        return {"codes": lambda x: product(module, x.float()).to(dtype), "bf16 copy": lambda x: _by_copy(module, x)}

    def _dynamic(self, module: PackedLinear, x: Tensor) -> Tensor:
        """y (..., O) of x (..., I) with a scale per token, so that no row of a batch changes another's result."""
        weight, sums, bias = module.kept("codes", lambda: _prepared(module))
        low, high = x.amin(-1, True), x.amax(-1, True)  # (B, T, 1)
        scale = (high - low).div_(levels_here()).clamp_min_(TINY)
        codes = (x - low).div_(scale).add_(0.5).to(torch.uint8)  # (B, T, I): the conversion cuts off, so this rounds
        y = _multiply(codes, *weight)  # (B, T, O)
        return torch.addcmul(bias, y, scale, out=y).addcmul_(low, sums)  # in place: a fresh tensor of this size costs more than the sum

    def _static(self, module: PackedLinear, x: Tensor) -> Tensor:
        """y (..., O) of x (..., I) with the range that examples gave."""
        weight, _, bias = module.kept("codes", lambda: _prepared(module))
        scale, zero, start = module.kept("grid", lambda: _grid(module))
        codes = torch.add(start, x, alpha=1 / scale).clamp_(0, levels_here())  # the conversion cuts off, so this rounds
        return _multiply(codes.to(torch.uint8), *weight, scale=scale, zero=zero, bias=bias)


def _prepared(module: PackedLinear) -> Any:
    """The weight as the kernel wants it, with s_o and its zero points; c_o; and b_o."""
    codes, scales = module.weight.view(module.shape), module.scales.float()
    zeros = torch.zeros(module.out_features, dtype=torch.int32)
    bias = torch.zeros(module.out_features) if module.bias is None else module.bias.float()
    return (torch.ops.onednn.qlinear_prepack(codes, None), scales, zeros), scales * codes.sum(1), bias


def _grid(module: PackedLinear) -> tuple[float, int, Tensor] | None:
    """s, z, and z + ½ of the range that examples gave; None until they have."""
    low, high = module.range.tolist()
    scale = max((high - low) / levels_here(), TINY)
    zero = round(-low / scale)
    return (scale, zero, torch.tensor(zero + 0.5)) if low or high else None


def _by_copy(module: PackedLinear, x: Tensor) -> Tensor:
    """y (..., O) by the weights that the codes stand for, kept in bf16: 2 bytes a weight of memory, and nothing in the file."""
    weight, bias = module.kept("bf16 copy", lambda: (module.dequantized().bfloat16(), None if module.bias is None else module.bias.bfloat16()))
    return F.linear(x.bfloat16(), weight, bias).to(x.dtype)


def _multiply(codes: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, *, scale: float = 1.0, zero: int = 0, bias: Tensor | None = None) -> Tensor:
    """s · s_o Σ_i (u_i − z) q_oi + b_o (..., O) in fp32, from codes (..., I) and a weight that the kernel has packed."""
    return torch.ops.onednn.qlinear_pointwise.default(codes, scale, zero, weight, scales, zeros, bias, 1.0, 0, torch.float32, "none", [], "")


@functools.cache
@_python_dispatch._disable_current_modes()  # who counts a model's FLOPs shall not count this
def levels_here() -> int:
    """The largest activation code this processor multiplies rightly: 255, 127, or 0 where it lacks the integer kernel.

    Without VNNI the kernel adds two products u·q in 16 bits, and 2 · 255 · 127 saturates there in silence; 2 · 127 · 127
    does not. So the largest sum is tried once; with 0 the weights are dequantized and multiplied in the input's format.
    """
    n = 256
    try:
        weight = torch.ops.onednn.qlinear_prepack(torch.full((n, n), 127, dtype=torch.int8), None)
        for levels in (255, 127):
            codes = torch.full((3, n), levels, dtype=torch.uint8)
            y = _multiply(codes, weight, torch.ones(n), torch.zeros(n, dtype=torch.int32))
            if bool((y == 127 * levels * n).all()):
                return levels
    except (RuntimeError, AttributeError):  # no such operator in this build, or none for this processor
        return 0
    return 0
