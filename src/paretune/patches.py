"""What a method does at one site: a patch with its tensors; `seams.py` runs the patches of a module.

Shapes: B rows, T positions, D features of a block, I and O features of a linear map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune import attention
from paretune.anatomy import Site


def fitting(x: Tensor, weight: Tensor) -> Tensor:
    """x as a linear map with this weight takes it: in the weight's number format, and as it is under autocast, which casts by itself."""
    return x if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


def openness(x: Tensor, gate: Tensor) -> Tensor:
    """σ(w·x + b) of each token: (B, T, I) to (B, T, 1); the gate (I + 1) holds w and, last, b."""
    return torch.sigmoid(F.linear(fitting(x, gate), gate[None, :-1], gate[-1:]))


def owner(forward: Callable[..., Any]) -> nn.Module:
    """The module whose forward this is, under the patches around it."""
    while isinstance(forward, functools.partial):
        forward = forward.args[-1]
    return forward.__self__  # type: ignore[attr-defined]


class Patch(nn.Module):
    """One method's tensors at one site. `patch(x, y)` gives the output, from the module's input x and output y."""

    wraps: ClassVar[bool] = False  # does it act around the whole call, through `around`?
    reweighs: ClassVar[bool] = False  # is `delta` all it says? then the module computes with W + ΔW and b + Δb
    attends: ClassVar[bool] = False  # does it act inside the attention call, through `attend`?
    method: Any  # the adapter it is of; set when it is installed
    shared: nn.Module | None  # what `Adapter.shared` gave: one for all patches of the adapter; set when it is installed

    def __init__(self, site: Site | None = None) -> None:
        super().__init__()
        self.site = site
        self.settled = False  # has it given up its training form?
        self.borrow(None)

    @property
    def plain(self) -> bool:
        """Does it act on what the module takes and gives, and nowhere else?"""
        return not (self.wraps or self.reweighs or self.attends)

    def borrow(self, shared: nn.Module | None) -> None:
        """Takes the adapter's shared module, not as a child: its tensors are stored once, where it is installed."""
        self.__dict__["shared"] = shared

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """For a patch that `wraps`: the module's call, with other inputs or another reading of its outputs."""
        return forward(*args, **kwargs)

    def among(self, patches: Sequence[Patch | None]) -> Callable[..., Any]:
        """For a patch that `wraps` and may serve single rows: an `around` in which row i of the batch meets `patches[i]` alone."""
        raise AssertionError(f"{type(self).__name__} cannot tell rows apart")

    def attend(self, attend: attention.Attend, call: attention.Call) -> tuple[Tensor, Tensor | None]:
        """For a patch that `attends`: the attention call, with other keys and values or by other means."""
        return attend(call)

    def enter(self, x: Tensor) -> Tensor:
        """The input (B, T, I) as the patched map shall see it."""
        return x

    def forward(self, x: Tensor, y: Any) -> Any:
        """The cheap path: the output y (B, T, O) of the map at the entered input x (B, T, I), patched."""
        return y

    def whole(self, x: Tensor, module: nn.Module) -> Tensor | None:
        """Alone at a module: its output (B, T, O) at x (B, T, I), patched, as one product with W + ΔW; None where `forward` takes fewer operations."""
        return None

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The matrix path: what is added to the weight (O, I) and the bias (O), in fp32.

        Only methods whose card does not exclude merging have it.
        """
        raise AssertionError(f"{type(self).__name__} has no matrix")

    def on_grid(self, weight: Tensor) -> Tensor:
        """For the ranges that `qat` learned: the nearest weight (O, I) that codes stand for, in fp32."""
        raise AssertionError(f"{type(self).__name__} has no grid")

    def settle(self) -> dict[str, Tensor]:
        """At the end of its phase: the frozen tensors by which it works from here on; none if it stays as it is."""
        return {}

    def hold(self, tensors: dict[str, Tensor]) -> None:
        """Has these tensors in the place of all that it had to train; the patch tells by `settled` which form it has."""
        for own in (self._parameters, self._buffers, self._modules):
            own.clear()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.settled = True
        self.borrow(None)


class Selected(Patch):
    """Existing parameters of one module that learn: they are trained in place and this holds their other value.

    While the adapter is active the module has the trained values and this the original ones; a switch exchanges them.
    """

    plain = False

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        for name in names:
            self.register_buffer(name, getattr(module, name).detach().clone())

    def swap(self, module: nn.Module) -> None:
        """Exchanges the values, without a copy."""
        for name in self.names:
            parameter = getattr(module, name)
            parameter.data, self._buffers[name] = self._buffers[name], parameter.data
