"""The attention seam: patches inside the one call in which transformers computes attention.

    out = softmax(scale · Q Kᵀ + mask) V

The call comes after rotary positions and after the update of a generation cache, so what a patch does to keys and values
there is right with caches, grouped heads, beams and padding, and moves no position.

A module with a seam sees its config through a view that names our function in transformers' table of attention
implementations; our function asks the seam, and then calls the implementation that the real config names. The model's own
config stays as it is, so masks are made for the real implementation and `set_attn_implementation` works as before.

Shapes: B rows, T queries, S keys, P prepended keys, H heads, N heads of keys and values, D features of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from paretune import anatomy
from paretune.errors import Incompatible
from paretune.step import short_attention

NAME = "paretune"  # of our function in transformers' table
INPUT = "paretune_input"  # the keyword by which the module's input comes to the call
SPELLED = ("eager", short_attention.NAME)  # the implementations whose masks say all; without one every key is seen
MASKED = (*SPELLED, "sdpa")  # those whose masks are known here: (B, 1, T, S), additive or True where seen


class Call(NamedTuple):
    """One attention call: what transformers hands over."""

    module: Any
    implementation: str  # the one that the model's config names
    x: Tensor  # the module's input (B, T, features)
    query: Tensor  # (B, H, T, D)
    key: Tensor  # (B, N, S, D)
    value: Tensor  # (B, N, S, D)
    mask: Tensor | None
    more: dict[str, Any]  # scaling, dropout, position_bias, ...

    def preceded_by(self, keys: Tensor, values: Tensor) -> Call:
        """The call with these keys and values (1 or B, P, N·D) in front, which every query sees.

        Raises:
            Incompatible: for an implementation whose masks are not known here.
        """
        self.require_known("takes no further keys and values")
        more, length = dict(self.more), keys.shape[1]
        if more.get("position_bias") is not None:  # T5's, by distance: what is prepended has none
            more["position_bias"] = F.pad(more["position_bias"], (length, 0))
        key, value = (_in_front(new, own) for new, own in ((keys, self.key), (values, self.value)))
        return self._replace(key=key, value=value, mask=self._mask_behind(length), more=more)

    def require_known(self, why: str) -> None:
        """Refuses, with Incompatible, an implementation whose masks are not known here."""
        if self.implementation not in MASKED:
            raise Incompatible(f"attention implementation {self.implementation!r} {why}; call model.set_attn_implementation('sdpa') or ('eager') first")

    def _mask_behind(self, length: int) -> Tensor | None:
        mask = self.mask
        if mask is None and self.is_triangular():
            # No mask means a triangle that SDPA aligns with the first key; further keys in front would shift it.
            queries, keys = self.query.shape[2], self.key.shape[2]
            mask = torch.ones(queries, keys, dtype=torch.bool, device=self.query.device).tril()[None, None]
        if mask is None:
            return None
        seen = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        return torch.cat([seen((*mask.shape[:-1], length)), mask], -1)

    def is_triangular(self) -> bool:
        """Does this call, where it has no mask, see a triangle that begins at the first key? Eager attention, and ours, then see all."""
        said = self.more.get("is_causal")
        causal = getattr(self.module, "is_causal", True) if said is None else said
        return self.implementation not in SPELLED and self.query.shape[2] > 1 and bool(causal)

    def of_rows(self, index: Tensor) -> Call:
        """The call for some rows of the batch."""
        batch = len(self.query)

        def part(value: Any) -> Any:
            return value.index_select(0, index) if isinstance(value, Tensor) and value.dim() > 1 and len(value) == batch else value

        return self._replace(**{n: part(getattr(self, n)) for n in ("x", "query", "key", "value", "mask")}, more={n: part(v) for n, v in self.more.items()})


Attend = Callable[[Call], tuple[Tensor, Tensor | None]]  # the output (B, T, H, D), and the weights (B, H, T, S) where they are made


def _in_front(new: Tensor, own: Tensor) -> Tensor:
    heads = new.to(own.dtype).unflatten(-1, (own.shape[1], -1)).transpose(1, 2)  # (1 or B, P, N·D) -> (1 or B, N, P, D)
    return torch.cat([heads.expand(len(own), -1, -1, -1), own], 2)


def preceded(attend: Attend, call: Call, *, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention with further keys and values (1 or B, P, N·D) in front; weights are given for the model's own keys alone."""
    out, weights = attend(call.preceded_by(keys, values))
    return out, None if weights is None else weights[..., keys.shape[1] :]


def sites(model: Any, spec: str | Sequence[str], *, asked_by: str) -> list[anatomy.Site]:
    """The attention calls that a target spec hits.

    Raises:
        TargetError: for a word of the spec that hits no attention call.
        Incompatible: for a model that computes attention in its own code and not through transformers' table.
    """
    found = anatomy.resolve(model, spec, kind="call")
    for site in found:
        if not anatomy.calls_attention(type(model.get_submodule(site.path))):
            raise Incompatible(
                f"{asked_by}: {type(model).__name__} computes attention in its own code, where nothing can enter; "
                "use a method that works on linear maps or on the input, such as lora or prompt"
            )
    return found


class _View:
    """A config as an attention module shall see it: everything is the real config's but the name of the implementation."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self._real = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Attending:
    """Mixed in front of the class of an attention module while it has a seam."""

    @property
    def config(self) -> Any:
        """The model's config, or the view of it while a patch acts in this module's attention call."""
        real = self.__dict__["config"]
        return _View(real) if self._modules[NAME].attending() else real  # type: ignore[attr-defined]


def _routed_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: the seam's patches around the implementation that the real config names."""
    seam = module._modules[NAME]
    implementation = module.__dict__["config"]._attn_implementation or "eager"
    function = anatomy.attention_function(type(module), implementation)
    call = Call(module, implementation, kwargs.pop(INPUT), query, key, value, mask, kwargs)

    def attend(call: Call) -> tuple[Tensor, Tensor | None]:
        return function(call.module, call.query, call.key, call.value, call.mask, **call.more)

    if seam.rows is None:
        return _around(attend, seam.attending())(call)
    return _by_rows(call, seam.rows, lambda name: _around(attend, seam.attending((name,))))


def _around(attend: Attend, patches: Sequence[Any]) -> Attend:
    for patch in patches:
        attend = functools.partial(patch.attend, attend)
    return attend


def _by_rows(call: Call, names: Sequence[str | None], attend_for: Callable[[str | None], Attend]) -> tuple[Tensor, None]:
    """Each row through its own adapter; a batch of k times as many rows (beams) repeats each k times."""
    repeat = len(call.query) // len(names)
    out: Tensor | None = None
    for name in dict.fromkeys(names):
        mine = torch.tensor([i * repeat + k for i, n in enumerate(names) if n == name for k in range(repeat)], device=call.query.device)
        y, _ = attend_for(name)(call.of_rows(mine))
        out = (y.new_empty(len(call.query), *y.shape[1:]) if out is None else out).index_copy(0, mine, y)
    assert out is not None
    return out, None


anatomy.register_attention(NAME, _routed_attention)
