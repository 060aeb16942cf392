"""Small moves that many tests make on a tiny model: variants of a method, a loss, a few steps, a nudge to what learns."""

from __future__ import annotations

import copy
import functools

import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune import registry
from paretune.roles import Method

BESIDE = {("init", "text"): {"text": "a good film"}}  # what a choice of a knob cannot be without


def variants(name: str) -> list[Method]:
    """A method with its defaults, and once with each other choice of each knob that has choices or is a switch."""
    cls, knobs = registry.get(name), registry.describe(name).knobs
    others = [(k["name"], c) for k in knobs for c in k["choices"] or ((True, False) if k["type"] == "bool" else ()) if c != k["default"]]
    return [cls(), *(cls(**{knob: choice}, **BESIDE.get((knob, choice), {})) for knob, choice in others)]


@functools.cache
def _made(family: str, task: str) -> nn.Module:
    return tiny.model(family, task)


def model(family: str, task: str = "classification") -> nn.Module:
    """A fresh copy of the tiny model of a family; all copies are equal."""
    return copy.deepcopy(_made(family, task))


def logits(model: nn.Module, family: str, **how: int) -> Tensor:
    """(B, C), in evaluation mode, without gradient; images come in the model's number format."""
    model.eval()
    with torch.no_grad():
        return model(**inputs(model, family, **how)).logits


def inputs(model: nn.Module, family: str, **how: int) -> dict[str, Tensor]:
    """A batch of the family in the model's number format."""
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in tiny.inputs(family, **how).items()}


def loss(model: nn.Module, family: str) -> Tensor:
    """Cross-entropy of one fixed batch with fixed labels."""
    out = model(**inputs(model, family)).logits.float()
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[-1])


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def descend(model: nn.Module, family: str, *, steps: int = 8, lr: float = 5e-3, autocast: bool = False) -> list[float]:
    """The losses before each of a few Adam steps on one batch, without dropout; computed in bf16 under `autocast`."""
    optimizer = torch.optim.Adam(learning(model).values(), lr=lr)
    losses = []
    model.eval()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(model, family)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def disturb(model: nn.Module, *, seed: int = 1, std: float = 0.1) -> None:
    """Moves everything that learns a little at random, so that no adapter is at its start any more."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learning(model).values():
            parameter += std * torch.randn(parameter.shape, generator=random).to(parameter.dtype)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters, tied ones once."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """The same names, with bit for bit the same values."""
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
