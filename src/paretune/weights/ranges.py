"""The fixed range of a packed map's inputs, from training examples: the whole of it, nearly all of it, or what costs the least information.

Wu et al. 2020, arXiv:2004.09602, section 3.3: minmax, percentile (here all but one in 10 000 inputs) and entropy, the range [f l, f h]
of all f = 1/64 ... 64/64 whose codes have the least relative entropy KL(P ‖ Q) to the inputs; Migacz 2017 (TensorRT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paretune.weights.packed import PackedLinear

BINS = 2048
CODES = 256
OUTSIDE = 1e-4  # the share of inputs that a percentile leaves out


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[dict[str, Tensor]], *, kind: Any, rule: str) -> None:
    """Gives each map that has a `range` (2,) the one that the rule finds in its inputs; until then they are quantized token by token."""
    maps = [m for m in model.modules() if isinstance(m, PackedLinear) and hasattr(m, "range")]
    spans: dict[PackedLinear, Tensor] = {}
    counts = {m: torch.zeros(BINS) for m in maps}

    def widen(m: PackedLinear, x: Tensor) -> None:
        low, high = x.float().aminmax()
        old = spans.get(m, torch.zeros(2))  # zero is always inside
        spans[m] = torch.stack([torch.minimum(low, old[0]), torch.maximum(high, old[1])])

    def tally(m: PackedLinear, x: Tensor) -> None:
        low, high = spans[m].tolist()
        counts[m] += torch.histc(x.float().cpu(), BINS, low, high)

    watch(model, maps, see=widen, batches=batches, kind=kind)
    if rule != "minmax":
        watch(model, maps, see=tally, batches=batches, kind=kind)
    for m in maps:
        if m in spans:
            m.range.copy_(spans[m] if rule == "minmax" else clipped(counts[m], spans[m], rule=rule))
            m.forget()  # what was kept of the range before


def watch(model: nn.Module, maps: Sequence[PackedLinear], *, see: Callable[[PackedLinear, Tensor], None], batches: Sequence[Any], kind: Any) -> None:
    """Shows `see` every input of the maps, as the adapters before them leave it, while the batches go through the model."""
    was_training = model.training
    model.eval()
    for m in maps:
        m.watch = lambda x, m=m: see(m, x)
    try:
        for batch in batches:
            model(**kind.inputs(batch))
    finally:
        for m in maps:
            m.watch = None
        model.train(was_training)


def clipped(counts: Tensor, span: Tensor, *, rule: str) -> Tensor:
    """The range [low, high] within a span that a rule finds for inputs counted in even bins of it."""
    if rule == "percentile":
        share = counts.cumsum(0) / counts.sum()
        edges = torch.linspace(*span.tolist(), BINS + 1)
        first = int((share < OUTSIDE / 2).sum())
        last = int((share <= 1 - OUTSIDE / 2).sum())
        return torch.stack([edges[first].clamp(max=0), edges[min(last + 1, BINS)].clamp(min=0)])
    factors = torch.arange(1, 65) / 64
    losses = torch.stack([divergence(counts, span, inner=f * span) for f in factors])
    return factors[losses.argmin()] * span


def divergence(counts: Tensor, span: Tensor, *, inner: Tensor) -> Tensor:
    """KL(P ‖ Q): P the inputs in fine bins, those outside the range moved to its ends; Q the same mass evenly within each code's bins."""
    low, high = inner.tolist()
    edges = torch.linspace(*span.tolist(), BINS + 1)
    middles = ((edges[:-1] + edges[1:]) / 2).clamp(low, high)
    codes = ((middles - low) / max(high - low, 1e-30) * (CODES - 1)).round().long()
    inside = counts * ((edges[1:] > low) & (edges[:-1] < high))  # Q knows nothing of what was cut off
    filled = (inside > 0).float()
    mass, bins = (torch.zeros(CODES).index_add(0, codes, t) for t in (inside, filled))
    q = (mass / bins.clamp(min=1))[codes] * filled
    place = middles.new_zeros(BINS, dtype=torch.long) + torch.bucketize(middles, edges[1:-1])
    p = torch.zeros(BINS).index_add(0, place, counts)  # the ends take the outliers
    p, q = p / p.sum(), (q + 1e-9) / (q + 1e-9).sum()
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum()
