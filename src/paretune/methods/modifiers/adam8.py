"""8-bit optimizer states: AdamW with both moments in a byte a weight.

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   θ ← θ − lr (m̂ / (√v̂ + ε) + λ θ)           in fp32, then
    q_i = argmin_j |Q_j − m_i / N_b|,   N_b = max |m_i| of block b                                 and the same of v

m and v stand for Q_q N_b between two steps. Q are the levels of dynamic floats, with a sign for m and without one for v.
Dettmers et al. 2021, arXiv:2110.02861, sections 2 and 3. Paged: Dettmers et al. 2023, arXiv:2305.14314, section 3; there a card's states
move to the machine's memory when the card is full, here the processor's move to the disk, as pages of mapped files.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paretune.card import Card, knob
from paretune.errors import Incompatible, RecipeError
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
        "It saves what full fine-tuning needs most; an adapter of few weights has little to save. One tensor's moments at a time are in fp32. Paged "
        "states are mapped files without a name in the folder for temporary files (TMPDIR, which must lie on a disk): the system writes them out when "
        "memory is short, without any swap, and they are gone with the process. While memory is not short they stay in it, and peak memory "
        "counts them. Graphics cards refuse them.",
    )

    bits: int = knob(8, "bits of a state; 32 is AdamW as without adam8", choices=(8, 32))
    block: int = knob(2048, "weights with one absolute maximum", low=1, search="256, 2048")

    paged: bool = knob(False, "keep the codes in mapped files, which the system may write out where memory is short; on the processor")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paged and self.bits == 32:
            raise RecipeError(f"{self!r}: the states of plain AdamW are not paged; leave bits at 8, or paged out")

    def events(self, loop: Loop) -> Events:
        if self.paged and any(p.device.type != "cpu" for p in loop.parameters.values()):
            raise Incompatible(f"{self!r}: mapped files are the processor's memory, and this model is on {loop.accelerator.device}; leave paged out")
        if self.bits == 8:
            loop.optimizer = AdamW8(loop.optimizer, block=self.block, paged=self.paged)
        return Events()


class AdamW8(torch.optim.Optimizer):
    """AdamW over the parameter groups of another one; a state is `m`, `v` as codes, `m_absmax`, `v_absmax` and the `step`."""

    def __init__(self, plain: torch.optim.Optimizer, *, block: int, paged: bool = False) -> None:
        super().__init__(plain.param_groups, plain.defaults)
        self.block, self.paged = block, paged

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
        old, state[name] = state.get(name), moment
        if moment.dim() > 1:
            codes, state[f"{name}_absmax"] = blockwise(moment.flatten(), levels(name), size=self._size(moment))
            state[name] = codes if not self.paged else (old if is_mapped(old) else mapped(codes)).copy_(codes)

    def _size(self, moment: Tensor) -> int:
        return min(self.block, moment.numel())


def levels(name: str) -> Tensor:
    """Q: the 256 levels of a moment; v has no sign."""
    return dynamic_float(signed=name == "m")


def mapped(like: Tensor) -> Tensor:
    """A tensor of this shape and number format in the pages of a file, which has lost its name and ends with the tensor."""
    with tempfile.NamedTemporaryFile() as file:
        storage = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=like.nbytes)
    return torch.empty(0, dtype=like.dtype).set_(storage, 0, like.shape)


def is_mapped(tensor: Tensor | None) -> bool:
    """Are these the pages of a file?"""
    return tensor is not None and tensor.untyped_storage().filename is not None
