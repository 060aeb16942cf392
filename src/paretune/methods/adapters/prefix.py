"""Prefix tuning: learned keys and values in front of those of every attention.

    out = softmax(q [P_K; K]ᵀ) [P_V; V],   [P_K, P_V] = MLP(P') while they are trained,   MLP(P') = W_o tanh(W_i P')

P_K and P_V (P, N·D) have no position. P' (P, d), W_i and its bias are one for all layers of a kind of attention (encoder,
decoder, cross), W_o is a layer's own part of the MLP's output map; at the end of training the MLP is dropped and P_K, P_V stay.
Li & Liang 2021, arXiv:2101.00190, sections 4.2 and 4.3. A gated prefix weighs what the prefix changes:

    out ← out_without + g · (out − out_without)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paretune import anatomy, attention, processors
from paretune.anatomy import Site
from paretune.attention import Attend, Call, efficient
from paretune.card import Card, knob
from paretune.errors import Incompatible, RecipeError
from paretune.patches import Patch, openness
from paretune.roles import Adapter


@dataclasses.dataclass(frozen=True, repr=False)
class Prefix(Adapter):
    """Trains keys and values that every query of a layer attends to."""

    card = Card(
        title="Prefix tuning",
        paper="Li & Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation",
        arxiv="2101.00190",
        equation="out = softmax(q [P_K; K]ᵀ) [P_V; V], [P_K, P_V] = MLP(P')",
        lowers="E",
        why="2 · length · width numbers a layer learn and no weight; every later inference attends to length more keys, since it cannot be merged.",
        lr=5e-4,
        note="A prefix takes a share of the softmax, so it moves the output before training, unless zero_start puts a gate of zero before it. "
        "Tokens keep their positions; the paper's code and peft begin to count behind the prefix (positions=\"shifted\"). "
        "Layers that share their weights (ALBERT) share one prefix. gate mixes the outputs with and without the prefix, token by token, where UniPELT's code "
        "scales keys and values by a mean over the row, which would read later tokens and padding.",
    )
    foldable = False
    attends = True
    additive = True  # rows of a batch meet in no attention, and each may have its own keys and values

    length: int = knob(10, "keys and values in front of each attention", low=1, search="5..100 log")
    reparametrize: str = knob("mlp", "train them as the output of an MLP, or themselves", choices=("mlp", "none"))
    hidden: int = knob(512, "width of the MLP", low=1)
    text: str = knob("", "start from the keys and values of this text, repeated or cut to the length; with reparametrize=\"none\"")
    zero_start: bool = knob(False, "a trained gate for each layer, zero at the start; the attention is then computed twice")
    gate: bool = knob(False, "a trained gate σ(w·x + b) for each layer and token, as in UniPELT; the attention is then computed twice")
    positions: str = knob("unchanged", "where tokens begin to count: at zero, or behind the prefix as peft has it", choices=("unchanged", "shifted"))
    targets: str | tuple[str, ...] = knob("attention_call", "which attention: also encoder., decoder., self. or cross.attention_call")
    layers: str = knob("all", 'in which layers, as in "0,2,5"')

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text and self.reparametrize != "none":
            raise RecipeError(f'{self!r}: a text gives keys and values themselves and not an MLP; add reparametrize="none" or leave text out')

    @property
    def exact_at_start(self) -> bool:
        """Is the gate zero?"""
        return self.zero_start

    def sites(self, model: nn.Module) -> list[Site]:
        if self.text:
            self._ids(model)  # refuses what cannot be, before anything has changed
        calls = anatomy.in_layers(attention.sites(model, self.targets, asked_by=repr(self)), self.layers, asked_by=repr(self))
        efficient.require_own(model, calls, by=self)
        return calls + (self._shifts(model) if self.positions == "shifted" else [])

    def _shifts(self, model: nn.Module) -> list[Site]:
        paths = [] if getattr(model.config, "is_encoder_decoder", False) else anatomy.position_modules(model)
        if not paths:
            raise Incompatible(f'{self!r}: {type(model).__name__} has no position ids that one prefix could shift; use positions="unchanged"')
        _, limit = anatomy.positions(model)
        if limit is not None and self.length >= limit:
            raise Incompatible(f"{self!r}: a shift by {self.length} leaves no room for an input among the {limit} positions of {type(model).__name__}")
        return [Site("positions", path) for path in paths]

    def shared(self, model: nn.Module) -> nn.Module | None:
        if self.reparametrize == "none":
            return None
        widths = {_kind(site): site.in_features for site in self.sites(model) if site.place == "attention_call"}
        return nn.ModuleDict({kind: Trunk(self.length, width=width, hidden=self.hidden) for kind, width in widths.items()})

    def patch(self, site: Site) -> Patch:
        return Shift(site, self.length) if site.place == "positions" else KeysAndValues(site, self)

    def _ids(self, model: nn.Module) -> Tensor:
        """The text's tokens, repeated or cut to the length: (1, P)."""
        tokenizer = processors.get(model)
        if not hasattr(tokenizer, "tokenize"):
            raise Incompatible(f"{self!r}: a start from text needs a text model with its tokenizer; set it with paretune.processors.put, or leave text out")
        ids = tokenizer(self.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise Incompatible(f"{self!r}: the tokenizer finds no token in this text; give a text with words")
        return torch.tensor([(ids * self.length)[: self.length]])

    @torch.no_grad()
    def start(self, model: nn.Module, patches: list[Patch]) -> None:
        if not self.text:
            return
        row = self._ids(model).to(next(model.parameters()).device)
        decoder = {"decoder_input_ids": row} if {layer.stack for layer in anatomy.layers(model)} == {"encoder", "decoder"} else {}
        was_training = model.training
        for patch in patches:
            patch.listens = True
        model.eval().base_model(row, **decoder)
        for patch in patches:
            patch.listens = False
        model.train(was_training)


def _kind(site: Site) -> str:
    return "cross" if site.cross else str(site.stack)


class Trunk(nn.Module):
    """tanh(W_i P' + b): what the prefixes of all layers are made of."""

    def __init__(self, length: int, *, width: int, hidden: int) -> None:
        super().__init__()
        self.P = nn.Parameter(torch.randn(length, width))
        self.W = nn.Linear(width, hidden)

    def forward(self) -> Tensor:
        """(P, hidden)"""
        return torch.tanh(self.W(self.P))


class KeysAndValues(Patch):
    """P_K and P_V of one attention."""

    attends = True
    listens = False  # are keys and values taken from the next call, instead of given to it?

    def __init__(self, site: Site, knobs: Prefix) -> None:
        super().__init__(site)
        if knobs.reparametrize == "mlp":
            self.out = nn.Linear(knobs.hidden, 2 * site.out_features)
        else:
            self.keys = nn.Parameter(0.02 * torch.randn(knobs.length, site.out_features))
            self.values = nn.Parameter(0.02 * torch.randn(knobs.length, site.out_features))
        if knobs.zero_start:
            self.opening = nn.Parameter(torch.zeros(()))
        if knobs.gate:
            self.gate = nn.Parameter(torch.zeros(site.in_features + 1))

    def front(self) -> tuple[Tensor, Tensor]:
        """P_K and P_V, each (P, N·D), a head's features side by side."""
        if "out" not in self._modules:
            return self.keys, self.values
        assert self.shared is not None and self.site is not None
        keys, values = self.out(self.shared[_kind(self.site)]()).chunk(2, -1)  # type: ignore[index]
        return keys, values

    def attend(self, attend: Attend, call: Call) -> tuple[Tensor, Tensor | None]:
        if self.listens:
            return self._listen(attend, call)
        keys, values = self.front()
        out, weights = attention.preceded(attend, call, keys=keys[None], values=values[None])
        share = self._share(call.x)
        if share is None:
            return out, weights
        without, _ = attend(call)
        return without + share.to(out.dtype) * (out - without), weights  # g = 0 is the backbone, bit for bit

    def _share(self, x: Tensor) -> Tensor | None:
        """g, of a shape that (B, T, H, D) takes; None without a gate."""
        opening, gate = getattr(self, "opening", None), getattr(self, "gate", None)
        if gate is None:
            return opening
        per_token = openness(x, gate)[..., None]  # (B, T, 1, 1)
        return per_token if opening is None else opening * per_token

    def _listen(self, attend: Attend, call: Call) -> tuple[Tensor, Tensor | None]:
        for own, heard in ((self.keys, call.key), (self.values, call.value)):
            own.copy_(heard[0].transpose(0, 1).flatten(1))  # (1, N, P, D) -> (P, N·D)
        return attend(call)

    def settle(self) -> dict[str, Tensor]:
        if "out" not in self._modules:
            return {}
        keys, values = self.front()
        gates = {n: t.detach().clone() for n, t in self.named_parameters() if n in ("opening", "gate")}
        return {"keys": keys.contiguous(), "values": values.contiguous(), **gates}


class Shift(Patch):
    """Lets tokens count from behind the prefix: the position ids that reach this module are the model's plus the length."""

    wraps = True
    listens = False  # is a text being read for its keys and values? it stands in the prefix's own place

    def __init__(self, site: Site, length: int) -> None:
        super().__init__(site)
        self.length = length

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _shifted(lambda ids: ids if self.listens else ids + self.length)(forward, *args, **kwargs)

    def among(self, patches: Sequence[Patch | None]) -> Callable[..., Any]:
        by = torch.tensor([[0 if p is None else p.length] for p in patches])  # (rows, 1)
        return _shifted(lambda ids: ids + by.to(ids.device).repeat_interleave(max(1, len(ids) // len(by)), 0))  # a row's beams follow each other


def _shifted(shift: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """An `around` for what reads position ids: they are its `position_ids`, or its last argument."""

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("position_ids") is not None:
            return forward(*args, **{**kwargs, "position_ids": shift(kwargs["position_ids"])})
        return forward(*args[:-1], shift(args[-1]), **kwargs)

    return around
