"""What goes on inside a model during a forward pass: its hidden states, and the queries, keys and values of its attention.

    H_0 = E(x),   H_m = f_m(H_(m-1)),   A_m = softmax(Q_m K_mᵀ / √d)          m = 1 ... M layers

Nothing in the model changes: hooks read the layers, and an onlooker at the attention seam reads the attention calls.

Shapes: B rows, T tokens, D features, H heads, d features of a head.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paretune import anatomy, seams
from paretune.attention import Attend, Call
from paretune.errors import Incompatible
from paretune.seams import Patch

ONLOOKER = "~onlooker"  # its name at a seam; no adapter can have it, as it is no identifier


@dataclasses.dataclass
class Sight:
    """What was seen in the last forward pass, in the order of the layers."""

    states: list[Tensor] = dataclasses.field(default_factory=list)  # H_0 ... H_M (B, T, D)
    heads: list[tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=list)  # Q_m / √d, K_m, V_m, each (B, T, H, d); grouped heads repeated
    causal: bool = False  # does a token see those before it alone?

    @property
    def depth(self) -> int:
        """How many layers were run."""
        return len(self.states) - 1


def real(seen: Sight, batch: Mapping[str, Tensor]) -> Tensor:
    """Where there is no padding: (B, T) of truth values."""
    shape = seen.states[0].shape[:2]
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(shape, dtype=torch.bool, device=seen.states[0].device)


def sees(seen: Sight, real: Tensor) -> Tensor:
    """Which token (B, T, ·) sees which (B, ·, T)."""
    pairs = real[:, None] & real[:, :, None]
    return pairs.tril() if seen.causal else pairs


@contextlib.contextmanager
def watching(model: nn.Module, *, heads: bool = False) -> Iterator[Sight]:
    """Within the block a forward pass of the model leaves its hidden states here and, if asked, its attention heads.

    Raises:
        Incompatible: for a model of several stacks, or one that computes attention in its own code.
    """
    seen, layers = Sight(causal=anatomy.layers(model)[0].stack == "decoder"), stack(model)
    with contextlib.ExitStack() as undo:
        for i, path in enumerate(layers):
            layer = model.get_submodule(path)
            if i == 0:
                undo.callback(layer.register_forward_pre_hook(lambda _, args, kwargs: _enter(seen, args, kwargs), with_kwargs=True).remove)
            undo.callback(layer.register_forward_hook(lambda _, args, out: seen.states.append(out[0] if isinstance(out, tuple) else out)).remove)
        for path in callers(model) if heads else []:
            undo.enter_context(onlooking(model.get_submodule(path), _Onlooker(seen)))
        yield seen


@contextlib.contextmanager
def entering(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Within the block what a module reads is left here, call by call."""
    read: list[Tensor] = []
    hook = module and module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        yield read
    finally:
        if hook is not None:
            hook.remove()


def stack(model: nn.Module) -> list[str]:
    """Paths of the layers, which stand in one stack.

    Raises:
        Incompatible: for an encoder-decoder.
    """
    refs = anatomy.layers(model)
    if len({ref.stack for ref in refs}) > 1:
        raise Incompatible(f"{type(model).__name__} has an encoder and a decoder, and hidden states are compared in models of one stack; compare logits alone")
    return [ref.path for ref in refs]


def callers(model: nn.Module) -> list[str]:
    """Paths of the modules that compute attention through transformers' table.

    Raises:
        Incompatible: for a model that computes it in its own code.
    """
    paths = [site.path for site in anatomy.resolve(model, "attention_call", kind="call")]
    if not all(anatomy.calls_attention(type(model.get_submodule(path))) for path in paths):
        raise Incompatible(f"{type(model).__name__} computes attention in its own code, where it cannot be watched; compare logits or hidden states")
    return paths


def _enter(seen: Sight, args: tuple, kwargs: dict[str, Any]) -> None:
    if not seen.states:  # ALBERT calls one layer many times
        seen.states.append(args[0] if args else kwargs["hidden_states"])


class _Onlooker(Patch):
    """Reads an attention call, and changes nothing."""

    attends = True

    def __init__(self, seen: Sight) -> None:
        super().__init__()
        self.seen = seen

    def attend(self, attend: Attend, call: Call) -> tuple[Tensor, Tensor | None]:
        scale = call.more.get("scaling") or call.query.shape[-1] ** -0.5
        key, value = (x.repeat_interleave(call.query.shape[1] // x.shape[1], 1) for x in (call.key, call.value))  # grouped heads
        self.seen.heads.append((call.query.transpose(1, 2) * scale, key.transpose(1, 2), value.transpose(1, 2)))
        return attend(call)


@contextlib.contextmanager
def onlooking(module: nn.Module, eye: Patch) -> Iterator[None]:
    """Within the block a patch that changes nothing sees what a module asks of its attention; afterwards the module is as before."""
    seam = seams.open_seam(module, working=True)
    before, seam.active = seam.active, (*seam.active, ONLOOKER)
    seam.add(ONLOOKER, "eye", patch=eye)
    try:
        yield
    finally:
        del seam._modules[ONLOOKER]
        seam.active = before
        seams.close_if_empty(module)
