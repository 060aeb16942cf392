"""8-bit optimizer states: AdamW with both moments in a byte a weight.

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   θ ← θ − lr (m̂ / (√v̂ + ε) + λ θ)           in fp32, then
    q_i = argmin_j |Q_j − m_i / N_b|,   N_b = max |m_i| of block b                                 and the same of v

m and v stand for Q_q N_b between two steps. Q are the levels of dynamic floats, with a sign for m and without one for v.
Dettmers et al. 2021, arXiv:2110.02861, sections 2 and 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paretune.card import Card, knob
from paretune.roles import Modifier
from paretune.training import Events, Loop
from paretune.weights.numerics import blockwise, dynamic_float, grouped, ungrouped


@dataclasses.dataclass(frozen=True, repr=False)
class Adam8(Modifier):
    """Trains with the moments of AdamW in 8 bits."""

    card = Card(
        title="8-bit optimizer states",
        paper="Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization",
        arxiv="2110.02861",
        equation="m = Q[q] · N_b,  v = Q⁺[q] · N_b",
        lowers="E",
        why="The optimizer keeps 2 bytes of states for a weight that learns in the place of 8, and checkpoints shrink with it.",
        note="With blocks of 2048, 2.004 bytes a weight; with 256, 2.03. Vectors (biases, norms) keep fp32 states: they are few and are hurt first. "
        "It saves what full fine-tuning needs most; an adapter of few weights has little to save. One tensor's moments at a time are in fp32.",
    )

    bits: int = knob(8, "bits of a state; 32 is AdamW as without adam8", choices=(8, 32))
    block: int = knob(2048, "weights with one absolute maximum", low=1, search="256, 2048")

    def events(self, loop: Loop) -> Events:
        if self.bits == 8:
            loop.optimizer = AdamW8(loop.optimizer, block=self.block)
        return Events()


class AdamW8(torch.optim.Optimizer):
    """AdamW over the parameter groups of another one; a state is `m`, `v` as codes, `m_absmax`, `v_absmax` and the `step`."""

    def __init__(self, plain: torch.optim.Optimizer, *, block: int) -> None:
        super().__init__(plain.param_groups, plain.defaults)
        self.block = block

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on the gradients that are there."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad.float(), group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta_m, beta_v) = self.state[parameter], group["betas"]
        t = state["step"] = state.get("step", torch.zeros(())) + 1
        m = self._moment("m", parameter, state).lerp_(gradient, 1 - beta_m)
        v = self._moment("v", parameter, state).mul_(beta_v).addcmul_(gradient, gradient, value=1 - beta_v)
        root = v.sqrt().div_((1 - beta_v ** float(t)) ** 0.5).add_(group["eps"])  # √v̂ + ε
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(m.to(parameter.dtype), root.to(parameter.dtype), value=-group["lr"] / (1 - beta_m ** float(t)))
        self._keep("m", m, state)
        self._keep("v", v, state)

    def _moment(self, name: str, parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The moment in fp32, of the parameter's shape."""
        if name not in state:
            return torch.zeros_like(parameter, dtype=torch.float32)
        if f"{name}_absmax" not in state:
            return state[name]
        units = levels(name).to(parameter.device)[state[name].int()]  # Q_q
        blocks = grouped(units, self._size(parameter)) * state[f"{name}_absmax"][:, None]
        return ungrouped(blocks, len(units)).view_as(parameter)

    def _keep(self, name: str, moment: Tensor, state: dict[str, Tensor]) -> None:
        state[name] = moment
        if moment.dim() > 1:
            state[name], state[f"{name}_absmax"] = blockwise(moment.flatten(), levels(name), size=self._size(moment))

    def _size(self, moment: Tensor) -> int:
        return min(self.block, moment.numel())


def levels(name: str) -> Tensor:
    """Q: the 256 levels of a moment; v has no sign."""
    return dynamic_float(signed=name == "m")
