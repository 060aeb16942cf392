"""FLOPs, counted from the shapes that one call works on. 1 MAC = 2 FLOPs; norms, softmax, activations and look-ups count 0.

torch's counter misses attention on the CPU, the fused encoder path, products with packed weights and with vectors, and takes sparse matrices for
dense ones; here they are counted. What is computed counts: a sparse matrix of torch its stored values, a dense one with zeros
in it (as `magnitude` and `wanda` leave them) every element, attention every pair of positions, masked or not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from paretune.meters.reading import Reading, missing

SOURCE = "counted from shapes, 1 MAC = 2 FLOPs"
_ATEN = torch.ops.aten


def forward(call: Callable[[], Any], model: torch.nn.Module) -> Reading:
    """FLOPs of one call of the model, without gradients.

    Args:
        call: runs the model once, as `lambda: model(**batch)`.
        model: the model that it runs.

    Returns:
        None with a reason rather than 0, when the counter saw nothing.
    """
    with torch.no_grad(), _counting(model) as counter:
        call()
    return _reading(counter)


def step(loss: Callable[[], torch.Tensor], model: torch.nn.Module) -> Reading:
    """FLOPs of one training step, forward and backward, without the optimizer; gradients and random state are left as they were.

    Args:
        loss: runs the model once and returns a scalar loss.
        model: the model that it runs.
    """
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        with torch.random.fork_rng(), _counting(model) as counter:
            loss().backward()
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
    return _reading(counter)


class PerShape:
    """Counts once for each shape of batch and remembers: the counter costs a third of a step, and shapes repeat."""

    def __init__(self, count: Callable[[Mapping[str, Any]], Reading]) -> None:
        self._count, self._known = count, {}

    def __call__(self, batch: Mapping[str, Any]) -> Reading:
        """FLOPs for a batch of this shape."""
        shape = tuple((name, tuple(value.shape)) for name, value in sorted(batch.items()) if isinstance(value, torch.Tensor))
        if shape not in self._known:
            self._known[shape] = self._count(batch)
        return self._known[shape]


def _reading(counter: FlopCounterMode) -> Reading:
    total = counter.get_total_flops()
    if not total:
        return missing("FLOP", "the counter saw no matrix product or attention; a model without any is not believed", source=SOURCE)
    return Reading(total, "FLOP", source=SOURCE)


@contextlib.contextmanager
def _counting(model: torch.nn.Module) -> Iterator[FlopCounterMode]:
    counter = FlopCounterMode(display=False, custom_mapping=_MISSED)
    counter.mod_tracker = _OnePlace()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    hooks = [hook for module in model.modules() if _is_linear(module) for hook in _watch(module, counter)]
    try:
        with counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for hook in hooks:
            hook.remove()


class _OnePlace(contextlib.nullcontext[None]):
    """Stands for torch's module tracker, whose backward hooks break on some models (DeBERTa): all FLOPs are booked in one place."""

    parents = ("Global",)


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int)


def _watch(module: torch.nn.Module, counter: FlopCounterMode) -> tuple[Any, Any]:
    """Counts a linear map from its shape when nothing was seen while it ran: kernels of other libraries on packed weights."""
    seen = []

    def before(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(counter.get_total_flops())

    def after(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        if counter.get_total_flops() == seen.pop() and inputs:
            counter.flop_counts["Global"][_UNSEEN] += 2 * inputs[0].numel() * module.out_features

    return module.register_forward_pre_hook(before), module.register_forward_hook(after)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Scores and weighted sum of [batch, heads, positions, width] shapes; with grouped queries the query's heads count."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Five products: the scores once more, then the gradients of value, probabilities, query and key."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _packed(left: torch.Size, *rest: Any, out_shape: torch.Size) -> int:
    """Rows (..., I) times weights that their kernel has packed, to (..., O): the shape of the result says how many."""
    return 2 * math.prod(out_shape) * left[-1]


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Has torch's counter hand the tensors over, not their shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


@_raw
def _product(left: torch.Tensor, right: torch.Tensor, *rest: Any, out_val: Any = None) -> int:
    """(M, K) times (K, N), or times a vector (K): two for each stored value of the one and each column or row of the other that it meets."""
    columns = right.shape[1] if right.dim() > 1 else 1
    if _is_sparse(left) and _is_sparse(right):
        here, there = left.to_sparse_coo().coalesce().indices()[1], right.to_sparse_coo().coalesce().indices()[0]
        return 2 * int((torch.bincount(here, minlength=left.shape[1]) * torch.bincount(there, minlength=left.shape[1])).sum())
    return 2 * (_stored(right) * left.shape[0] if _is_sparse(right) else _stored(left) * columns)


@_raw
def _added_product(added: Any, left: torch.Tensor, right: torch.Tensor, *rest: Any, alpha: Any = 1, beta: Any = 1, out_val: Any = None) -> int:
    """The product of what is added to it."""
    return _product(left, right)


@_raw
def _dot(left: torch.Tensor, right: torch.Tensor, *, out_val: Any = None) -> int:
    """Two vectors."""
    return 2 * left.numel()


def _is_sparse(matrix: torch.Tensor) -> bool:
    return matrix.layout is not torch.strided


def _stored(matrix: torch.Tensor) -> int:
    """How many values a matrix of any layout holds; of a layout in blocks, the whole blocks."""
    if not _is_sparse(matrix):
        return matrix.numel()
    return (matrix._values() if matrix.layout is torch.sparse_coo else matrix.values()).numel()


_PACKED = (  # kernels on packed weights, of which a build of torch may lack some
    "aten._int_mm", "aten._weight_int8pack_mm", "aten._weight_int4pack_mm", "aten._weight_int4pack_mm_for_cpu", "aten._dyn_quant_matmul_4bit",
    "onednn.qlinear_pointwise", "quantized.linear", "quantized.linear_relu", "quantized.linear_dynamic", "quantized.linear_relu_dynamic",
)  # fmt: skip


def _kernels(names: Sequence[str]) -> list[Any]:
    spaces = [(getattr(torch.ops, space), name) for space, name in (full.split(".") for full in names)]
    return [getattr(space, name) for space, name in spaces if hasattr(space, name)]


_MISSED = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **dict.fromkeys((_ATEN.mm, _ATEN.mv), _product),
    **dict.fromkeys((_ATEN.addmm, _ATEN.addmm_, _ATEN.addmv, _ATEN._sparse_addmm), _added_product),
    **dict.fromkeys((_ATEN.dot, _ATEN.vdot), _dot),
    **dict.fromkeys(_kernels(_PACKED), _packed),
}
_UNSEEN = "linear maps counted from their shapes"
