"""What training examples do inside a model: the inputs that linear maps see, and how much the loss needs each of their features.

Examples of one length go through together, so that no padding is counted. Shapes: B examples, T positions, I input features.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paretune import training
from paretune.roles import Examples

BATCH = 16


def unpadded(model: nn.Module, examples: Examples, *, count: int) -> list[dict[str, Tensor]]:
    """Batches without padding of `count` training examples, evenly drawn from the split."""
    task = examples.task
    rows = task.train[:: max(1, len(task.train) // count)]
    encodings = sorted(training.encode(task, rows[:count], model=model)[:count], key=task.kind.length)
    same = [list(group) for _, group in itertools.groupby(encodings, key=task.kind.length)]
    parts = [group[i : i + BATCH] for group in same for i in range(0, len(group), BATCH)]
    processor, device = examples.processor, next(model.parameters()).device
    return [{k: v.to(device) for k, v in task.kind.collate(part, processor).items()} for part in parts]


@contextlib.contextmanager
def at_inputs(model: nn.Module, paths: Sequence[str], *, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Within the block these modules compute with `change(path, x)` in the place of their input x; the model is in evaluation mode."""

    def hook(path: str) -> Callable[[nn.Module, tuple], tuple]:
        return lambda _, args: (change(path, args[0]), *args[1:])

    with _hooked(model, [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in dict.fromkeys(paths)]):
        yield


@contextlib.contextmanager
def at_outputs(model: nn.Module, paths: Sequence[str], *, change: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within the block these layers give `change(path, x, y)` in the place of their output y for the input x; the model is in evaluation mode."""

    def hook(path: str) -> Callable[[nn.Module, tuple, dict[str, Any], Any], Any]:
        def changed(_: nn.Module, args: tuple, named: dict[str, Any], out: Any) -> Any:
            x = args[0] if args else named["hidden_states"]
            return (change(path, x, out[0]), *out[1:]) if isinstance(out, tuple) else change(path, x, out)

        return changed

    with _hooked(model, [model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in paths]):
        yield


@contextlib.contextmanager
def _hooked(model: nn.Module, handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """The model in evaluation mode; afterwards these hooks are gone and its mode is as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)


@torch.no_grad()
def second_moments(model: nn.Module, paths: Sequence[str], *, batches: Sequence[dict[str, Tensor]], kind: Any, diagonal: bool = False) -> dict[str, Tensor]:
    """E[x xᵀ] (I, I) of the inputs of each map over all tokens; with `diagonal` E[x_j²] (I) alone."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(paths, 0)

    def add(path: str, x: Tensor) -> Tensor:
        rows = x.detach().float().flatten(0, -2)  # (B·T, I)
        moment = rows.pow(2).sum(0) if diagonal else rows.T @ rows
        sums[path] = sums[path] + moment if path in sums else moment
        counts[path] += len(rows)
        return x

    with at_inputs(model, paths, change=add):
        for batch in batches:
            model(**kind.inputs(batch))
    return {path: total / counts[path] for path, total in sums.items()}


def gate_gradients(model: nn.Module, paths: Sequence[str], *, batches: Sequence[dict[str, Tensor]], kind: Any) -> dict[str, Tensor]:
    """∂L(x)/∂ξ_j (examples, I) at ξ = 1, where ξ_j multiplies input feature j of a map at all tokens; equal to Σ_t x_tj ∂L/∂x_tj."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}
    gates: dict[str, Tensor] = {}

    rows = 0

    def open_gate(path: str, x: Tensor) -> Tensor:
        if path not in gates:  # layers that share their modules share the gate
            gates[path] = torch.ones(rows, 1, x.shape[-1], dtype=x.dtype, device=x.device, requires_grad=True)
        return (x.reshape(rows, -1, x.shape[-1]) * gates[path]).view_as(x)  # some models flatten (B, T, I) to (B·T, I)

    with at_inputs(model, paths, change=open_gate):
        for batch in batches:
            gates.clear()
            rows = len(next(iter(batch.values())))
            for path, gradient in _by_gate(model, gates, batch, kind=kind).items():
                found[path].append(gradient[:, 0])
    return {path: torch.cat(parts) for path, parts in found.items()}


def layer_gradients(model: nn.Module, paths: Sequence[str], *, batches: Sequence[dict[str, Tensor]], kind: Any) -> dict[str, Tensor]:
    """∂L(x)/∂ξ (examples) at ξ = 1 of each layer, which gives h + ξ (f(h) − h); equal to Σ_t (f(h) − h)_t · ∂L/∂f(h)_t."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}
    gates: dict[str, Tensor] = {}

    def open_gate(path: str, x: Tensor, y: Tensor) -> Tensor:
        gates[path] = torch.ones(len(x), 1, 1, dtype=y.dtype, device=y.device, requires_grad=True)
        return y + (gates[path] - 1) * (y - x)

    with at_outputs(model, paths, change=open_gate):
        for batch in batches:
            gates.clear()
            for path, gradient in _by_gate(model, gates, batch, kind=kind).items():
                found[path].append(gradient.flatten())
    return {path: torch.cat(parts) for path, parts in found.items()}


def _by_gate(model: nn.Module, gates: dict[str, Tensor], batch: dict[str, Tensor], *, kind: Any) -> dict[str, Tensor]:
    """The gradient of a batch's loss in each gate, which the forward pass opens, in fp32."""
    with torch.enable_grad():
        loss, _ = kind.loss(model(**kind.inputs(batch)), batch)
        gradients = torch.autograd.grad(loss, list(gates.values()))
    return {path: gradient.float() for path, gradient in zip(gates, gradients, strict=True)}
