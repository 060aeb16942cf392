"""The input-embeddings seam: virtual tokens among the embedded input, entered once and absent from every output.

    H = layers([V; E(x)]),   of which the caller gets H at the places of x

V (P, D) stands before the input, in an encoder that reads a class token also behind or between tokens. A decoder takes V in
with the first call; its cache has it from then on, and mask and positions count it. An encoder-decoder's encoder takes
it in, and hands it on to the decoder, whose cross-attention sees it (`Encoding`). A head that reads an encoder's first
position reads what stands first: with V before the input that is a virtual token, as in PEFT.

Shapes: B rows, P virtual tokens, T tokens of the call, D features of an embedding.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from paretune import anatomy
from paretune.anatomy import Site
from paretune.errors import Incompatible
from paretune.patches import owner
from paretune.roles import Adapter
from paretune.seams import Adapted, Patch, seams_of

CLASS, INPUT, SOURCE, MEMORY = "class_input", "input", "source", "memory"  # what is entered, or (memory) what sees what was entered


def sites(model: nn.Module, method: Adapter, *, length: int, places: Sequence[int] = (0,)) -> list[Site]:
    """Where virtual tokens enter this model.

    Raises:
        Incompatible: for a model without tokens, places that it has not, or one whose positions leave no room.
    """
    stacks = {ref.stack: ref.path.rpartition(".")[0].rpartition(".")[0] for ref in anatomy.layers(model)}
    embedding, table = model.get_input_embeddings(), anatomy.embeddings(model).tokens
    if table is None:
        raise Incompatible(f"{method!r}: {type(model).__name__} embeds no tokens, among which virtual ones could stand; use lora or adapter")
    _, limit = anatomy.positions(model)
    if limit is not None and length >= limit:
        raise Incompatible(f"{method!r}: {length} virtual tokens leave no room for an input among the {limit} positions of {type(model).__name__}")
    reads_first = set(stacks) == {"encoder"} and len(anatomy.family(model).stacks) == 1
    if set(places) != {0} and not reads_first:
        raise Incompatible(f"{method!r}: {type(model).__name__} has no class token to stand behind; virtual tokens go before its input")
    width = {"in_features": embedding.embedding_dim, "out_features": embedding.embedding_dim}
    if len(stacks) == 2:
        return [Site(SOURCE, stacks["encoder"], stack="encoder", **width), Site(MEMORY, stacks["decoder"], stack="decoder", **width)]
    return [Site(CLASS if reads_first else INPUT, _reader(table, anatomy.layers(model)[0].path), stack=next(iter(stacks)), **width)]


def _reader(tokens: str, layer: str) -> str:
    """The innermost module that holds both the token embedding and the layers: it alone is called by every model of the family."""
    pairs = zip(tokens.split("."), layer.split("."), strict=False)
    return ".".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def room(model: nn.Module) -> int | None:
    """How many tokens fit beside the active virtual ones; None: there are none, or no limit."""
    entered = sum(len(p.places) for _, _, s in seams_of(model) for _, _, p in s.patches(s.active) if isinstance(p, VirtualTokens))
    limit = anatomy.positions(model)[1] if entered else None
    return None if limit is None else limit - entered


class VirtualTokens(Patch):
    """`virtual()` (P, D), which enter with the input of a base model, or of an encoder-decoder's encoder.

    Args:
        places: for each virtual token, how many tokens of the input stand before it; a negative number counts those behind it.
        positions: "tokens" counts what is attended to, so that padding changes nothing; "all" counts padding, too, as PEFT does.
    """

    wraps = True

    def __init__(self, site: Site, *, places: Sequence[int], positions: str) -> None:
        super().__init__(site)
        self.places, self.positions = tuple(places), positions

    def virtual(self) -> Tensor:
        """The virtual tokens (P, D)."""
        raise AssertionError(f"{type(self).__name__} has no virtual tokens")

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _Entrance((self,)).around(forward, *args, **kwargs)

    def among(self, patches: Sequence[Patch | None]) -> Callable[..., Any]:
        return _Entrance(patches).around


class Memory(Patch):
    """Lets a decoder's cross-attention see the virtual tokens that its encoder's output begins with."""

    wraps = True

    def __init__(self, site: Site, *, places: Sequence[int]) -> None:
        super().__init__(site)
        self.places = tuple(places)

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _Sight((self,)).around(forward, *args, **kwargs)

    def among(self, patches: Sequence[Patch | None]) -> Callable[..., Any]:
        return _Sight(patches).around


@dataclasses.dataclass
class Encoding(BaseModelOutput):
    """What an encoder-decoder's encoder answers: by its names what belongs to the input, and as [0], which the decoder reads, [V; x] in every row."""

    memory: Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return (self.memory, *(self[name] for name in self if name not in ("last_hidden_state", "memory")))


class _Rows:
    """What the rows of a batch have at one module: the same patch all, or each its own or none; k times as many rows (beams) repeat them."""

    def __init__(self, patches: Sequence[Any]) -> None:
        self.patches = patches
        self.longest = max((p for p in patches if p is not None), key=lambda p: len(p.places))
        self.equal = all(p is not None and len(p.places) == len(self.longest.places) for p in patches)
        self.site = self.longest.site

    def present(self, rows: Tensor) -> Tensor:
        """(B, P): which virtual tokens a row has; one with fewer lacks the first ones."""
        counts = torch.tensor([0 if p is None else len(p.places) for p in self.patches], device=rows.device)
        length = len(self.longest.places)
        return self._spread(torch.arange(length, device=rows.device) >= length - counts[:, None], rows)

    def each(self, tensor: Callable[[Any], Tensor], *, like: Tensor) -> Tensor:
        """(B, P, D): each row's tensor (its P, D), zeros where it has none."""
        empty = like.new_zeros(len(self.longest.places), like.shape[-1])
        found = [empty if p is None else tensor(p).to(like) for p in self.patches]
        return self._spread(torch.stack([nn.functional.pad(f, (0, 0, len(empty) - len(f), 0)) for f in found]), like)

    def next_to(self, present: Tensor, own: Tensor) -> Tensor:
        """(B, P + T): which of [V; x] stands where V is next to what is read, behind padding on the left; absent tokens stand first."""
        left = own.bool().long().cumsum(1) == 0
        return torch.cat([present.long(), 2 * (~left).long()], 1).argsort(dim=1, stable=True)

    def _spread(self, tensor: Tensor, rows: Tensor) -> Tensor:
        repeat, rest = divmod(len(rows), len(self.patches))
        assert not rest, f"{len(self.patches)} adapters were named for a batch of {len(rows)} rows"
        return tensor.repeat_interleave(repeat, 0)


class _Entrance(_Rows):
    """The virtual tokens of a batch on their way through a model."""

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's call with them in it, and its output without them."""
        model = owner(forward)
        call = {**dict(zip(_parameters(model), args, strict=False)), **kwargs}
        cache = call.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        _check(model, call, past, len(self.longest.places))
        entered, places = self._continued(model, call, past) if past else self._entered(model, call)
        out = forward(**{**entered, "return_dict": True})
        if self.site.place == SOURCE:
            out = Encoding(out.last_hidden_state, out.get("hidden_states"), out.get("attentions"), memory=out[0])
        _take(out, places, unseen=len(self.longest.places))
        return _as_asked(out, call, model)

    def _entered(self, model: nn.Module, call: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """The first call, with the virtual tokens; and where each of its own tokens now stands (B, T)."""
        x = call["inputs_embeds"] if call.get("inputs_embeds") is not None else model.get_input_embeddings()(call["input_ids"])
        mask, types, present = call.get("attention_mask"), call.get("token_type_ids"), self.present(x)
        own = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if mask is None else mask
        order = self._order(present, own)  # (B, P + T): which of [V; x] stands there
        v = self.each(lambda patch: patch.virtual(), like=x)
        call = {**call, "input_ids": None, "inputs_embeds": torch.cat([v, x], 1).take_along_dim(order[..., None], 1)}
        if mask is not None or not self.equal:
            call["attention_mask"] = torch.cat([present.to(own.dtype), own], 1).take_along_dim(order, 1)
        if types is not None:
            call["token_type_ids"] = torch.cat([types.new_zeros(present.shape), types], 1).take_along_dim(order, 1)
        places = order.argsort(1)[:, present.shape[1] :]
        if self.site.place == CLASS:
            places[:, 0] = 0
        return self._counted(model, call, present, past=0), places

    def _order(self, present: Tensor, own: Tensor) -> Tensor:
        """Sorted by place where a class token is read: absent and padding last. Elsewhere [V; x], absent first."""
        both = torch.cat([present, own.bool()], 1)
        if self.site.place == SOURCE:
            return self.next_to(present, own)
        if self.site.place != CLASS:
            return torch.arange(both.shape[1], device=both.device).expand(both.shape)
        rank = (own.long().cumsum(1) - 1).float()  # (B, T)
        at = self.each(lambda patch: torch.tensor(patch.places)[:, None], like=rank[..., None])[..., 0]  # (B, P)
        at = torch.where(at < 0, at + own.long().sum(1, keepdim=True), at) - 0.5
        return torch.cat([at, rank], 1).masked_fill(~both, torch.inf).argsort(dim=1, stable=True)

    def _continued(self, model: nn.Module, call: dict[str, Any], past: int) -> tuple[dict[str, Any], None]:
        """A later call, whose cache has the virtual tokens."""
        x = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        present, mask, at = self.present(x), call.get("attention_mask"), call.get("position_ids")
        before = past - present.shape[1]  # tokens of the input in the cache
        counted = before if mask is None and at is None else mask.shape[1] - x.shape[1] if mask is not None else int(at[0, 0])
        if counted != before:
            raise Incompatible(
                f"virtual tokens: the call goes on behind {counted} tokens, and its cache has {before} beside {present.shape[1]} virtual ones; "
                "give a cache only to the calls that go on from the one which filled it"
            )
        if mask is None and not self.equal:
            mask = present.new_ones(len(x), before + x.shape[1])
        if mask is not None:
            call = {**call, "attention_mask": torch.cat([present.to(mask.dtype), mask], 1)}
        return self._counted(model, call, present, past=past), None

    def _counted(self, model: nn.Module, call: dict[str, Any], present: Tensor, *, past: int) -> dict[str, Any]:
        """The call with positions that count the virtual tokens; without them the model counts all that is there."""
        given, mask = call.pop("position_ids", None), call.get("attention_mask")
        if "position_ids" not in _parameters(model) or self.longest.positions == "all":
            return call
        first, _ = anatomy.positions(model)
        if given is not None:
            if self.site.place == CLASS:
                raise Incompatible("virtual tokens: position_ids would have to count them; leave position_ids out, the mask tells where tokens are")
            before = (present.long().cumsum(1) - 1).clamp(min=0) + first  # (B, P)
            given = (given + present.sum(1, keepdim=True)).expand(len(before), -1)
            return {**call, "position_ids": given if past else torch.cat([before, given], 1)}
        if mask is None:
            return call
        return {**call, "position_ids": ((mask.long().cumsum(1) - 1).clamp(min=0) + first)[:, past:]}


class _Sight(_Rows):
    """A decoder's view of an encoder's output that begins with virtual tokens."""

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The decoder's call, with a mask over the virtual tokens, too, and its attention to them left out of its output."""
        model = owner(forward)
        call = {**dict(zip(_parameters(model), args, strict=False)), **kwargs}
        own, memory = call.get("encoder_attention_mask"), call.get("encoder_hidden_states")
        if memory is None:
            return forward(**call)
        present, order = self.present(memory), None
        if own is None and not self.equal:
            own = present.new_ones(len(memory), memory.shape[1] - present.shape[1])
        if own is not None:
            _check_memory(memory, own, length=present.shape[1])
            order = self.next_to(present, own)
            call["encoder_attention_mask"] = torch.cat([present.to(own.dtype), own], 1).take_along_dim(order, 1)
        out = forward(**{**call, "return_dict": True})
        if out.get("cross_attentions") is not None:
            places = None if order is None else order.argsort(1)[:, None, None, present.shape[1] :]
            out["cross_attentions"] = tuple(
                a[..., present.shape[1] :] if places is None else a.take_along_dim(places, 3) for a in out.cross_attentions
            )
        return _as_asked(out, call, model)


def _as_asked(out: Any, call: dict[str, Any], model: nn.Module) -> Any:
    return out if call.get("return_dict", getattr(model.config, "return_dict", True)) in (None, True) else out.to_tuple()


def _parameters(model: nn.Module) -> tuple[str, ...]:
    return _names(type(model).__bases__[-1] if isinstance(model, Adapted) else type(model))


@functools.cache
def _names(cls: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _check(model: nn.Module, call: dict[str, Any], past: int, length: int) -> None:
    """Refuses what the virtual tokens would silently spoil."""
    x = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    mask = call.get("attention_mask")
    if mask is not None and (isinstance(mask, dict) or mask.dim() != 2):
        raise Incompatible(
            "virtual tokens: the attention mask has a place for each pair of tokens, and none for the virtual ones; "
            "give a mask of shape (rows, tokens), and generate with the usual cache (cache_implementation=None), which grows"
        )
    if getattr(call.get("past_key_values"), "is_compileable", False):
        raise Incompatible("virtual tokens: a static cache has no places for them; generate with the usual cache, which grows (cache_implementation=None)")
    _, limit = anatomy.positions(model)
    total = x.shape[1] + (past or length)
    if limit is not None and total > limit:
        raise Incompatible(
            f"{total - length} tokens and {length} virtual ones are {total}, and {type(model).__name__} has {limit} positions; shorten the input"
        )


def _check_memory(memory: Tensor, own: Tensor, *, length: int) -> None:
    """Refuses states of the input alone, in which the decoder would take tokens of the input for virtual ones."""
    if memory.shape[1] < own.shape[1] + length:
        raise Incompatible(
            f"virtual tokens: encoder_outputs has states of {memory.shape[1]} tokens, which are those of the input alone, without the {length} virtual "
            "ones that stand among them; give what model.get_encoder()(...) answers, whole"
        )


def _take(out: Any, places: Tensor | None, *, unseen: int) -> None:
    """Leaves what belongs to the call's own tokens; in a later call (no places) only attentions have more."""
    if places is not None:
        out["last_hidden_state"] = out.last_hidden_state.take_along_dim(places[..., None], 1)
        if out.get("hidden_states") is not None:
            out["hidden_states"] = tuple(h if h is None else h.take_along_dim(places[..., None], 1) for h in out.hidden_states)
    if out.get("attentions") is not None:
        out["attentions"] = tuple(a if a is None else _attention(a, places, unseen) for a in out.attentions)


def _attention(weights: Tensor, places: Tensor | None, unseen: int) -> Tensor:
    if places is None:
        return weights[..., unseen:]
    return weights.take_along_dim(places[:, None, :, None], 2).take_along_dim(places[:, None, None, :], 3)
