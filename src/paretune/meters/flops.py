"""FLOPs, counted from the shapes that one call works on. 1 MAC = 2 FLOPs; norms, softmax, activations and look-ups count 0.

torch's counter misses attention on the CPU, the fused encoder path and quantized layers; here they are counted. Masks and sparsity are
not: attention counts every pair of positions, a matrix product every element.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
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
    """Counts a linear map from its shape when torch's counter saw nothing while it ran: int8 and other packed weights."""
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


def _product(left: torch.Size, right: torch.Size, *, out_shape: Any = None) -> int:
    """A product of matrices of whole numbers."""
    return 2 * left[0] * left[1] * right[1]


_MISSED = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _ATEN._int_mm: _product,
}
_UNSEEN = "linear maps counted from their shapes"
