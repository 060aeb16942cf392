"""Dynamic int8 quantization: linear maps multiply in 8-bit integers, embeddings are stored in 8 bits.

    w_oi ≈ s_o q_oi,         s_o = max_i |w_oi| / 127,          q = round(w / s)            per output channel, once
    x_i ≈ m + s u_i,         m = min x,  s = (max x − m) / 255,  u = round((x − m) / s)      per token, at every forward
    y_o = s · s_o Σ_i u_i q_oi + m · c_o + b_o,                  c_o = s_o Σ_i q_oi

Jacob et al. 2017, arXiv:1712.05877 (integer arithmetic, equations 1 to 7); Zafrir et al. 2019, arXiv:1910.06188 (Q8BERT).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune import anatomy, surgery
from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.roles import Examples, Trail, Transform
from paretune.seams import CHILD, Adapted

_TINY = torch.finfo(torch.float32).tiny


@dataclasses.dataclass(frozen=True, repr=False)
class Int8(Transform):
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
        "as bf16. Processors without VNNI get 7-bit inputs; those without the kernel, and graphics cards, dequantize: small, not fast. "
        "The task's head, tied outputs and convolutions stay float.",
    )

    embeddings: bool = knob(True, "store the token embedding in int8, too, with a scale per token")

    def follow(self, trail: Trail) -> Trail:
        if trail.weights != "float":
            raise Incompatible(f"{self!r}: {trail.by} left {trail.weights} weights, and int8 starts from float ones; keep one of the two")
        inside = next((m for m in trail.attached if m.reweighs), None)
        if inside is not None:
            raise Incompatible(f"{self!r}: {inside!r} computes with the float weights that int8 packs; put merge before int8")
        return trail.replace(weights="int8", by=self.spelling())

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        paths = packable(model, embeddings=self.embeddings)
        if not paths:
            raise Incompatible(f"{self!r}: {type(model).__name__} has no float linear map left to pack")
        surgery.settle(model)
        for path in paths:
            module = model.get_submodule(path)
            packed = self.empty(module)
            packed.pack(module)
            surgery.replace(model, path, packed)
        surgery.freeze(model)  # codes cannot learn, and nothing else may without them
        return model

    def empty(self, module: nn.Module) -> nn.Module:
        packed: Packed
        if isinstance(module, nn.Embedding):
            packed = Int8Embedding(module.num_embeddings, module.embedding_dim, device=module.weight.device)
        else:
            out_features, in_features = anatomy.weight(module).shape
            packed = Int8Linear(in_features, out_features, bias=module.bias is not None, device=module.weight.device)
        packed.packed_by = self.spell()
        return packed


def packable(model: nn.Module, *, embeddings: bool = True) -> list[str]:
    """Paths of the modules that int8 packs: linear maps outside the task's head, and the token embedding.

    The head stays float (it is small, each named adapter has its own, and at one row per example fp32 is faster), and so
    does whatever shares its weight with another module, such as an output embedding tied to the input's.
    """
    outside = tuple(f"{path}." for path in anatomy.head(model))
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    tokens = model.get_input_embeddings() if embeddings else None
    return [
        path
        for path, module in model.named_modules()
        if (_class_of(module) is nn.Linear or anatomy.is_transposed(module) or module is tokens and _is_plain_table(module))
        and owners[id(module.weight)] == 1
        and CHILD not in path.split(".")
        and not f"{path}.".startswith(outside or ("\0",))
    ]


def _is_plain_table(module: nn.Module) -> bool:
    return _class_of(module) is nn.Embedding and module.max_norm is None


def _class_of(module: nn.Module) -> type:
    """The module's own class, adapted or not; a subclass may read its weight in a way of its own and is left alone."""
    return type(module).__bases__[1] if isinstance(module, Adapted) else type(module)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (O, I) in −127..127 and scales (O,) of a weight (O, I): symmetric, per row; |w − s q| ≤ s / 2."""
    weight = weight.detach().float()
    scales = weight.abs().amax(1) / 127
    codes = (weight / scales.clamp(min=_TINY)[:, None]).round()
    return codes.to(torch.int8), scales


class Packed(nn.Module):
    """A weight (O, I) as flat codes and scales: flat, so that software that does not know it stops at the shape."""

    packed_by: str
    weight: Tensor  # (O·I,) int8
    scales: Tensor  # (O,) fp32

    def __init__(self, rows: int, columns: int, *, device: Any = None) -> None:
        super().__init__()
        self.shape = (rows, columns)
        self.register_buffer("weight", torch.zeros(rows * columns, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.zeros(rows, dtype=torch.float32, device=device))

    def pack(self, module: nn.Module) -> None:
        """Takes the values of a float module of the same shape."""
        codes, scales = quantize(anatomy.weight(module))
        self.weight, self.scales = codes.flatten(), scales

    def dequantized(self) -> Tensor:
        """The weight (O, I) that the codes stand for, in fp32."""
        return self.weight.view(self.shape).float() * self.scales.float()[:, None]


class Int8Embedding(Packed):
    """Looks up rows of codes and scales them."""

    def __init__(self, rows: int, columns: int, *, device: Any = None) -> None:
        super().__init__(rows, columns, device=device)
        self.num_embeddings, self.embedding_dim = rows, columns

    def forward(self, ids: Tensor) -> Tensor:
        codes = self.weight.view(self.shape)[ids]  # (B, T, D)
        return codes.to(self.scales.dtype) * self.scales[ids][..., None]


class Int8Linear(Packed):
    """y = x Wᵀ + b in integers where the processor can; packed for its kernel at the first forward, never saved so."""

    paretune_linear = True
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, device: Any = None) -> None:
        super().__init__(out_features, in_features, device=device)
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)
        self._ready: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def pack(self, module: nn.Module) -> None:
        super().pack(module)
        self.bias = None if module.bias is None else module.bias.detach().float().clone()

    def forward(self, x: Tensor) -> Tensor:
        levels = levels_here() if x.device.type == "cpu" else 0
        if not levels or x.requires_grad and torch.is_grad_enabled():  # the integer kernel has no gradient
            return F.linear(x, self.dequantized().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        weight, scales, zeros, sums, bias = self._kernel()
        given = x.dtype
        x = x if given is torch.float32 else x.float()  # (B, T, I)
        low = x.amin(-1, True)  # (B, T, 1): a scale per token, so that no row of a batch changes another's result
        scale = x.amax(-1, True).sub_(low).div_(levels).clamp_min_(_TINY)
        codes = (x - low).div_(scale).add_(0.5).to(torch.uint8)  # (B, T, I): the conversion cuts off, so this rounds
        y = _multiply(codes, weight, scales, zeros)  # (B, T, O)
        y = torch.addcmul(bias, y, scale, out=y).addcmul_(low, sums)  # in place: a fresh tensor of this size costs more than the sum
        return y if given is torch.float32 else y.to(given)

    def _kernel(self) -> tuple[Tensor, ...]:
        """The weight as the kernel wants it, s_o, its zero points, c_o and b_o."""
        if self._ready is None or self._ready[0] is not self._buffers["weight"]:
            codes, scales = self.weight.view(self.shape), self.scales.float()
            zeros = torch.zeros(self.out_features, dtype=torch.int32)
            bias = torch.zeros(self.out_features) if self.bias is None else self.bias.float()
            self._ready = self.weight, (torch.ops.onednn.qlinear_prepack(codes, None), scales, zeros, scales * codes.sum(1), bias)
        return self._ready[1]

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        self._ready = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._ready = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}  # the kernel's own layout can be neither copied nor pickled

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _multiply(codes: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """s_o Σ_i u_i q_oi (..., O) in fp32, from codes (..., I) and a weight that the kernel has packed."""
    return torch.ops.onednn.qlinear_pointwise.default(codes, 1.0, 0, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")


@functools.cache
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
