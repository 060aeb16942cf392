"""Of what rank attention is: the singular values of each head's attention matrix, on the examples of a task.

    A = softmax(Q Kᵀ / √d) (n, n),    c(x) = Σ_{i ≤ x n} σ_i / Σ_i σ_i,    0 ≤ x ≤ 1,    σ_1 ≥ ... ≥ σ_n of A

The sooner c rises, the fewer mixtures of keys and values (`linformer(k=...)`) say what all n of them say. Wang et al. 2020,
arXiv:2006.04768, section 3 and figure 1, where n = 512 for all texts; here c is over the share x = i / n, as texts differ in length.

Shapes: B examples of one length, H heads, n tokens, G points of x.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from paretune import anatomy, processors, seams, sight
from paretune.attention import Attend, Call, efficient
from paretune.errors import Incompatible
from paretune.patches import Patch
from paretune.roles import Examples
from paretune.tasks import Task
from paretune.weights import calibration

POINTS = 65  # of x, both ends counted
QUARTER = 0.25  # of n: where the paper's map of layers and heads reads c (128 of 512)


@dataclasses.dataclass(frozen=True)
class Spectra:
    """c of every layer and head, as means over the examples."""

    lengths: tuple[int, ...]  # tokens of each example
    cumulative: Tensor  # (layers, H, G), in fp64

    @property
    def at(self) -> Tensor:
        """x (G), from 0 to 1."""
        return torch.linspace(0, 1, POINTS, dtype=torch.float64)

    def reached(self, x: float) -> Tensor:
        """c(x) of each layer and head: (layers, H)."""
        return self.cumulative[..., round(x * (POINTS - 1))]

    def share_for(self, energy: float) -> Tensor:
        """The least x with c(x) of at least this much, between the points by a line: (layers, H)."""
        after = (self.cumulative < energy).sum(-1).clamp(max=POINTS - 1)
        high, low = (self.cumulative.gather(-1, i[..., None])[..., 0] for i in (after, (after - 1).clamp(min=0)))
        step = ((energy - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        return (after - 1 + step).clamp(min=0) / (POINTS - 1)

    def to_json(self) -> dict[str, Any]:
        """As the report's file has it."""
        return {
            "examples": len(self.lengths), "tokens_min": min(self.lengths), "tokens_mean": sum(self.lengths) / len(self.lengths), "tokens_max": max(self.lengths),
            "x": self.at.tolist(), "cumulative": self.cumulative.tolist(),
            "at_a_quarter": self.reached(QUARTER).tolist(), "share_for_90_percent": self.share_for(0.9).tolist(),
        }  # fmt: skip


@torch.no_grad()
def of_attention(model: nn.Module, task: Task, *, count: int = 16) -> Spectra:
    """The spectra of every head on `count` training examples, evenly drawn, each without padding.

    Raises:
        Incompatible: for an encoder-decoder, a model that computes attention in its own code or by other means, or heads of which layers have other numbers.
    """
    sight.stack(model)
    calls = [model.get_submodule(path) for path in sight.callers(model)]
    _require_own(model)
    batches = calibration.unpadded(model, Examples(task, processors.get(model)), count=count)
    lengths: list[int] = []
    total: Tensor | None = None
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            eye = _Eye()
            with contextlib.ExitStack() as looking:
                for module in calls:
                    looking.enter_context(sight.onlooking(module, eye))
                model(**task.kind.inputs(batch))
            found = _stacked(eye.found, by=type(model).__name__)  # (layers, B, H, G)
            lengths += [eye.tokens] * found.shape[1]
            total = found.sum(1) if total is None else total + found.sum(1)
    finally:
        model.train(was_training)
    assert total is not None
    return Spectra(tuple(lengths), total / len(lengths))


def _require_own(model: nn.Module) -> None:
    replaced = next((p.method for p in efficient.replaced(model)), None)
    if replaced is not None:
        raise Incompatible(f"{type(model).__name__}: {replaced!r} has replaced the attention, of which softmax(QKᵀ/√d) says nothing; take the model before it")
    for _, _, seam in seams.seams_of(model):
        inside = next((p.method for p in seam.attending()), None)
        if inside is not None:
            raise Incompatible(f"{type(model).__name__}: {inside!r} acts inside the attention, whose matrices would be shown without it; switch it off first")


def _stacked(layers: list[Tensor], *, by: str) -> Tensor:
    if len({layer.shape for layer in layers}) > 1:
        raise Incompatible(f"{by}: its layers have different numbers of heads, which one map of layers and heads cannot show")
    return torch.stack(layers)


class _Eye(Patch):
    """Takes c of every attention call that it sees, and changes nothing."""

    attends = True

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []  # (B, H, G) of each call, in the order of the layers
        self.tokens = 0  # n of the last call

    def attend(self, attend: Attend, call: Call) -> tuple[Tensor, Tensor | None]:
        self.found.append(cumulative(matrices(call)))
        self.tokens = call.query.shape[2]
        return attend(call)


def matrices(call: Call) -> Tensor:
    """A (B, H, n, n) of one attention call, in fp32, by the eager attention of its own family: with the masks, windows, caps and biases that this has.

    Raises:
        Incompatible: for an implementation whose masks are not known.
    """
    call.require_known("hands over its masks in a form that is not known here")
    query, key, value = (x.float() for x in (call.query, call.key, call.value))
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)[None, None]
    if call.mask is not None:
        seen = efficient.visible(call.mask)
    elif call.is_triangular():
        seen = seen.tril()
    mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
    weights = anatomy.attention_function(type(call.module), "eager")(call.module, query, key, value, mask, **call.more)[1]
    assert weights is not None
    return weights


def cumulative(matrix: Tensor) -> Tensor:
    """c at the points of x, between singular values by a line: (..., n, n) to (..., G), in fp64."""
    values = torch.linalg.svdvals(matrix).double()
    rising = values.cumsum(-1) / values.sum(-1, keepdim=True)
    rising = torch.cat([torch.zeros_like(rising[..., :1]), rising], -1)  # c(0) = 0, (..., n + 1)
    place = torch.linspace(0, 1, POINTS, dtype=torch.float64, device=values.device) * values.shape[-1]
    low = place.floor().long().clamp(max=values.shape[-1] - 1)
    return torch.lerp(rising[..., low], rising[..., low + 1], (place - low).expand(*rising.shape[:-1], POINTS))
