"""Packed weights: one module for a linear map, one for an embedding, and the transform that puts them there.

A format is a method file that says how a weight (O, I) becomes tensors of codes and scales (`encode`), and what weight those stand
for (`decode`); where a kernel multiplies with the codes themselves, `ways` names it beside the two that dequantize, and `kernels` chooses by the
number of tokens. The rest is here. Codes are stored
flat, so that software that does not know them stops at the shape, and as int8, since T5 asks a weight for its number format and
would bring its hidden states to any other.

Gradients go through a packed map to its input, x ↦ Wᵀ ∂L/∂y with the W that the codes stand for, dequantized again in the backward
pass and never kept, so that adapters learn on a base that stays small (Dettmers et al. 2023, arXiv:2305.14314, equation 5).

Shapes: B rows, T positions, I and O features of a map.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from paretune import anatomy, surgery
from paretune.errors import Incompatible
from paretune.roles import Examples, Trail, Transform
from paretune.seams import CHILD, RANGES, base_of, drop_ranges, seam_of
from paretune.weights import kernels
from paretune.weights.maps import require_floats
from paretune.weights.sharing import require_own_layers, require_unshared

T = TypeVar("T")
CHUNK = 2**22  # so many weights are dequantized at a time: 16 MB in fp32
ALIGNED = 64  # bytes: where torch's own tensors begin, and the longest vector that a kernel loads at once


class Packing(Transform):
    """A transform that packs linear maps, and with a knob `embeddings` the token embedding, into its format."""

    keeps_ranges = True  # where they are its own
    carries: ClassVar[bool] = False  # may adapters be trained on what it packed?
    error: ClassVar[float]  # of a map: ‖Ŵ − W‖ ≤ error · ‖W‖ for weights that are spread about normally
    embeddings: bool = False  # does it pack the token embedding, too? a format may have a knob of this name

    @property
    def grid(self) -> tuple[int, int] | None:
        """(bits, group; 0 is a row) of its codes, where they are symmetric with a scale each, so that `qat` can learn the scales."""
        return None

    def encode(self, weight: Tensor, steps: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors, by name, that stand for a weight (O, I); their shapes and number formats depend on its shape alone.

        A format with a `grid` takes the steps (O · groups) between its codes, where they have been learned.
        """
        raise AssertionError(f"{self!r} does not say what its codes are")

    def decode(self, codes: dict[str, Tensor], shape: tuple[int, int], *, rows: slice | Tensor) -> Tensor:
        """These rows of the weight (O, I) that the tensors stand for, in fp32."""
        raise AssertionError(f"{self!r} does not say what its codes stand for")

    def ways(self, module: PackedLinear, dtype: torch.dtype) -> dict[str, kernels.Way]:
        """By name, each way to multiply inputs of a number format with these codes on a processor: (..., I) to (..., O) in that format.

        The first is the format's own; `kernels` takes another where that is faster for so many tokens.
        """
        return dequantized_ways(module, dtype)

    def multiply(self, module: PackedLinear, x: Tensor) -> Tensor:
        """x (..., I) times the weight, plus the bias: (..., O) in the format of x."""
        return kernels.product(module, x) if x.device.type == "cpu" else module.dequantized_product(x)

    def follow(self, trail: Trail) -> Trail:
        require_floats(self, trail)
        require_unshared(self, trail)
        self._check_ranges(trail)
        name = self.spelling()
        return trail.replace(ranges=None, weights=name, by=name, carries=self.carries, embeddings=name if self.embeddings else trail.embeddings)

    def _check_ranges(self, trail: Trail) -> None:
        if trail.ranges is None:
            return
        self._check_grid(trail.ranges)
        loose = next((m for m in trail.attached if m.foldable and not m.selects), None)
        if loose is not None:
            raise Incompatible(f"{self!r}: {trail.ranges!r} learned step sizes for the weights with {loose!r} in them; put merge before {self.spelling()}")

    def _check_grid(self, by: Any) -> None:
        if self.grid != by.grid:
            raise Incompatible(f"{self!r}: {by!r} trained the weights for other codes, of its own bits, groups and symmetry; use {by.becomes}")

    def _learned(self, model: nn.Module) -> dict[str, Any]:
        """The patches, by path, whose steps this format's codes shall have."""
        found = {path: ranges for path, _, seam in surgery.seams_of(model) if (ranges := seam.ranges()) is not None}
        for path, ranges in found.items():
            self._check_grid(ranges.method)
            others = (p for adapter, _, p in seam_of(model.get_submodule(path)).patches() if adapter != RANGES)  # type: ignore[union-attr]
            if any(not isinstance(p, surgery.Selected) and p.method.foldable for p in others):
                raise Incompatible(f"{self!r}: {ranges.method!r} learned steps for the weight of {path} with an adapter in it; merge it first")
        return found

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        require_own_layers(model, by=self)
        paths = packable(model, embeddings=self.embeddings)
        if not paths:
            raise Incompatible(f"{self!r}: {type(model).__name__} has no float linear map left to pack")
        learned = self._learned(model)
        surgery.settle(model)
        surgery.replace(model, ((path, self._packed(model.get_submodule(path), learned.get(path))) for path in paths))
        surgery.freeze(model)  # codes cannot learn, and nothing else may without them
        return model

    def _packed(self, module: nn.Module, learned: Any) -> Packed:
        packed = self.empty(module)
        packed.pack(module, learned and learned.steps)
        if learned:
            drop_ranges(module)
        return packed

    def empty(self, module: nn.Module) -> Packed:
        return (PackedEmbedding if isinstance(module, nn.Embedding) else PackedLinear)(self, module)


def dequantized_ways(module: PackedLinear, dtype: torch.dtype) -> dict[str, kernels.Way]:
    """The ways that every format has: dequantize and multiply in the format of the inputs, or in bf16."""
    ways: dict[str, kernels.Way] = {"dequantized": module.dequantized_product}
    if dtype is not torch.bfloat16:
        ways["dequantized to bf16"] = lambda x: module.dequantized_product(x.bfloat16()).to(dtype)
    return ways


def packable(model: nn.Module, *, embeddings: bool = True) -> list[str]:
    """Paths of the modules that a format packs: linear maps outside the task's head, and the token embedding.

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
        if (_has_matrix(module) or module is tokens and _is_plain_table(module))
        and owners[id(module.weight)] == 1
        and CHILD not in path.split(".")
        and not f"{path}.".startswith(outside or ("\0",))
    ]


def timed(model: nn.Module) -> list[tuple[str, tuple[int, int], tuple[kernels.Slowdown, ...]]]:
    """For each format in a model its spelling, the shape (O, I) that most of its maps have, and what such a map costs here beside a float one."""
    maps = [m for m in model.modules() if isinstance(m, PackedLinear)]
    found = []
    for spelling, method in {m.packed_by: m.method for m in maps}.items():
        ((shape, _),) = collections.Counter(m.shape for m in maps if m.packed_by == spelling).most_common(1)
        found.append((spelling, shape, tuple(kernels.slowdowns(method, shape=shape))))
    return found


def _has_matrix(module: nn.Module) -> bool:
    return base_of(module) is nn.Linear or anatomy.is_transposed(module) or getattr(module, "paretune_sparse", False)


def _is_plain_table(module: nn.Module) -> bool:
    return base_of(module) is nn.Embedding and module.max_norm is None  # a subclass may read its weight in a way of its own


def unpack(model: nn.Module) -> bool:
    """Puts float maps with the dequantized weights in the place of packed ones; were there any?"""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Packed)]
    surgery.replace(model, ((path, module.unpacked()) for path, module in found))
    return bool(found)


@functools.lru_cache(maxsize=256)
def _form(method: Packing, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of a weight of this shape, without values: a model has many maps of few shapes."""
    return method.encode(torch.empty(shape, dtype=torch.float32, device="meta"))


class Packed(nn.Module):
    """A weight (O, I) as the tensors of a format."""

    def __init__(self, method: Packing, module: nn.Module) -> None:
        super().__init__()
        self.method, self.packed_by = method, method.spell()
        self.shape: tuple[int, int] = tuple(anatomy.weight(module).shape)  # type: ignore[assignment]
        self.dtype = module.weight.dtype  # in which the module answers, where its input does not say
        self._names: list[str] = []
        self._hold(_form(method, self.shape), device=module.weight.device)
        self._kept: dict[str, tuple[Tensor, Any]] = {}

    def _hold(self, tensors: dict[str, Tensor], *, device: torch.device | None = None) -> None:
        self._names = list(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor if device is None else torch.zeros_like(tensor, device=device))

    def pack(self, module: nn.Module, steps: Tensor | None = None) -> None:
        """Takes the values of a float module of the same shape, with the steps between codes that were learned for it."""
        weight = anatomy.weight(module).detach()
        self._hold(self.method.encode(weight) if steps is None else self.method.encode(weight, steps))

    def codes(self) -> dict[str, Tensor]:
        """The format's tensors by name."""
        return {name: getattr(self, name) for name in self._names}

    def dequantized(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """The weight (O, I) that the codes stand for, or some of its rows, in fp32."""
        return self.method.decode(self.codes(), self.shape, rows=rows)

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """What a way to multiply needs and the file does not hold, such as a layout of its own; made again when the codes have changed, and never saved."""
        if name not in self._kept or self._kept[name][0] is not self._buffers["weight"]:
            self._kept[name] = self.weight, make()
        return self._kept[name][1]

    def aligned(self) -> Tensor:
        """The codes, moved where a kernel may load whole vectors from; a file has them at any address, from which such a load ends the process."""
        if self.weight.data_ptr() % ALIGNED:
            with torch.inference_mode(False):  # they may be used outside inference mode, too
                self.weight = self.weight.clone()
        return self.weight

    def forget(self) -> None:
        """Frees what was kept."""
        self._kept.clear()

    def unpacked(self) -> nn.Module:
        """A float module in the place of this one."""
        raise AssertionError(f"{type(self).__name__} has no float form")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """Codes and scales move and keep their formats; what changes with `to(dtype)` is the format of the answers."""
        self.forget()
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(lambda t: moved if (moved := fn(t)).dtype == t.dtype or t is self._buffers.get("bias") else t.to(moved.device), recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # a kernel's own layout can be neither copied nor pickled


class PackedEmbedding(Packed):
    """Looks up rows of codes and dequantizes them."""

    def __init__(self, method: Packing, module: nn.Module) -> None:
        super().__init__(method, module)
        self.num_embeddings, self.embedding_dim = self.shape

    def forward(self, ids: Tensor) -> Tensor:
        return self.dequantized(ids.flatten()).to(self.dtype).view(*ids.shape, self.embedding_dim)  # (B, T, D)

    def unpacked(self) -> nn.Module:
        return nn.Embedding(*self.shape, _weight=self.dequantized())


class PackedLinear(Packed):
    """y = x Wᵀ + b, by the format's kernel."""

    paretune_linear = True
    bias: Tensor | None

    def __init__(self, method: Packing, module: nn.Module) -> None:
        super().__init__(method, module)
        self.out_features, self.in_features = self.shape
        self.register_buffer("bias", None if module.bias is None else torch.zeros_like(module.bias))
        self.watch: Callable[[Tensor], None] | None = None  # is shown every input, while examples are read

    def pack(self, module: nn.Module, steps: Tensor | None = None) -> None:
        super().pack(module, steps)
        self.bias = None if module.bias is None else module.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return self._product(x)
        with torch.autocast(kind, enabled=False):
            return self._product(x.to(torch.get_autocast_dtype(kind)))

    def _product(self, x: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(x)
        return _Through.apply(x, self) if x.requires_grad and torch.is_grad_enabled() else self.method.multiply(self, x)  # (B, T, I) to (B, T, O)

    def dequantized_product(self, x: Tensor) -> Tensor:
        """y (..., O) by dequantizing a chunk of rows at a time and multiplying in the format of x, so that the peak stays small."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        parts = [F.linear(x, self.dequantized(rows).to(x.dtype), None if bias is None else bias[rows]) for rows in self._chunks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def with_bias(self, y: Tensor, x: Tensor) -> Tensor:
        """A kernel's product (T, O), with the bias, as the answer (..., O) to x (..., I)."""
        y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def gradient(self, dy: Tensor) -> Tensor:
        """∂L/∂x (..., I) = ∂L/∂y W, a chunk of rows at a time."""
        dx = dy.new_zeros(*dy.shape[:-1], self.in_features)
        for rows in self._chunks():
            dx += dy[..., rows] @ self.dequantized(rows).to(dy.dtype)
        return dx

    def _chunks(self) -> Iterator[slice]:
        step = max(1, CHUNK // self.in_features)
        return (slice(start, min(start + step, self.out_features)) for start in range(0, self.out_features, step))

    def unpacked(self) -> nn.Module:
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        made.weight = nn.Parameter(self.dequantized(), requires_grad=False)
        made.bias = None if self.bias is None else nn.Parameter(self.bias.float(), requires_grad=False)  # type: ignore[assignment]
        return made

    def extra_repr(self) -> str:
        return f"{self.method!r}, in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Through(torch.autograd.Function):
    """The format's product with the gradient of the dequantized weight; the codes are kept for it, not the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedLinear) -> Tensor:
        ctx.module = module
        return module.method.multiply(module, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.module.gradient(dy), None
