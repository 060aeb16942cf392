"""Diff pruning: a difference is added to the weights, and only its largest few entries stay.

    W' = W + δ,   δ = z ⊙ w,   z = clamp(s̄, 0, 1),   s̄ = l + (r − l) · σ(α + log u − log(1 − u)),   u ~ U(0, 1)
    L + λ Σ P(z ≠ 0),          P(z ≠ 0) = σ(α − log(−l / r)),          l = −1.5, r = 1.5

w starts at zero and α at 5. Structured, every matrix and every bias has one further gate z for all its entries. For
the last steps, and for good, only the largest |δ| stay, over all adapted maps together. Guo et al. 2021,
arXiv:2012.07463, sections 3 and 4; the gates are Louizos et al. 2018, arXiv:1712.01312.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from paretune import anatomy
from paretune.anatomy import Site
from paretune.card import Card, knob
from paretune.roles import Adapter
from paretune.seams import Patch, seams_of
from paretune.training import Events, Loop

LOW, HIGH = -1.5, 1.5  # l, r
ALPHA, ALPHA_LR = 5.0, 0.1  # where α starts and its peak learning rate, both after the authors' code
OPEN = 20.0  # an α whose gate is 1, sampled or not


def chance(alpha: Tensor) -> Tensor:
    """P(z ≠ 0)."""
    return torch.sigmoid(alpha - math.log(-LOW / HIGH))


def sampled(alpha: Tensor) -> Tensor:
    """A sample of z."""
    u = torch.rand_like(alpha).clamp(1e-4, 1 - 1e-4)
    return (LOW + (HIGH - LOW) * torch.sigmoid(alpha + u.logit())).clamp(0, 1)


@dataclasses.dataclass(frozen=True, repr=False)
class DiffPruning(Adapter):
    """Trains a sparse difference from the weights and biases of the targeted linear maps."""

    card = Card(
        title="Diff pruning",
        paper="Guo et al. 2021, Parameter-Efficient Transfer Learning with Diff Pruning",
        arxiv="2012.07463",
        equation="W' = W + z ⊙ w,  L + λ Σ P(z ≠ 0)",
        lowers="E",
        why="A task costs 0.5 % of the adapted weights to store, as places and values; training holds two numbers and their optimizer state for every weight.",
        lr=5e-5,
        lr_falls_with_size=True,
        exact_at_start=True,
        note="The paper adapts every parameter and counts its share of all; here linear maps are adapted, and the share is of their weights and biases "
        "(in BERT-base 0.5 % of these are 0.39 % of all). The last stage, on the kept values alone, ends the same phase. "
        "Evaluated before that, a gate counts with its chance to be open. In a loop other than paretune's there is no penalty, and the largest "
        "differences are kept when the phase ends. Measured on MiniLM (docs/method-steps.md, docs/adaptation.md): a step takes 2.3 times full "
        "fine-tuning's CPU time, for the gates of every weight are drawn, and half as much memory again.",
    )
    reweighs = True

    sparsity: float = knob(0.005, "share of the adapted weights that differ in the end", low=0.0, high=1.0, search="0.001..0.02 log")
    structured: bool = knob(False, "one further gate for each matrix and each bias")
    penalty: float = knob(1.25e-7, "λ, for each weight that is expected to differ", low=0.0)
    fixed: float = knob(0.3, "share of the steps, the last ones, that train the kept values alone", low=0.0, high=1.0)
    targets: str | tuple[str, ...] = knob("linear", "which linear maps: places or module paths", search="attention, ffn, linear")

    def sites(self, model: nn.Module) -> list[Site]:
        return anatomy.resolve(model, self.targets, kind="linear")

    def patch(self, site: Site) -> Patch:
        return Difference(site, structured=self.structured)

    def settle(self, patches: list[Patch]) -> list[dict[str, Tensor]]:
        kept = largest(patches, self.sparsity)  # type: ignore[arg-type]
        return [{"places": at.int(), "values": patch.difference()[at]} for patch, at in zip(patches, kept, strict=True)]  # type: ignore[operator]

    def events(self, loop: Loop) -> Events:
        return _Stages(self, loop)


class Difference(Patch):
    """δ at one linear map, as one vector: its matrix, row by row, then its bias."""

    reweighs = True
    places: Tensor  # (k,) int32, with `values` (k,) what is left of δ once it is settled
    values: Tensor

    def __init__(self, site: Site, *, structured: bool) -> None:
        super().__init__(site)
        self.sizes = [site.out_features * site.in_features] + [site.out_features] * site.bias
        self.w = nn.Parameter(torch.zeros(sum(self.sizes)))
        self.alpha = nn.Parameter(torch.full((sum(self.sizes),), ALPHA))
        self.groups = nn.Parameter(torch.full((len(self.sizes),), ALPHA)) if structured else None  # α of the matrix and of the bias

    def delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        matrix, *rest = self.difference(sampled if self.training else chance).split(self.sizes)
        return matrix.view(weight.shape), rest[0] if rest else None

    def difference(self, gate: Callable[[Tensor], Tensor] = chance) -> Tensor:
        """δ, with sampled gates or, where a number must be certain, with each gate's chance to be open in its place."""
        if self.settled:
            return self.values.float().new_zeros(sum(self.sizes)).index_copy(0, self.places.long(), self.values.float())
        return self.gates(gate) * self.w.float()  # z ⊙ w

    def gates(self, gate: Callable[[Tensor], Tensor] = chance) -> Tensor:
        """A gate for each entry: z, or P(z ≠ 0)."""
        own = gate(self.alpha.float())
        return own if self.groups is None else own * torch.cat([g.expand(n) for g, n in zip(gate(self.groups.float()), self.sizes, strict=True)])

    @torch.no_grad()
    def keep(self, at: Tensor) -> None:
        """Leaves these entries as they are, with open gates, and sets all others to zero."""
        self.w.copy_(torch.zeros_like(self.w).index_copy(0, at, self.difference()[at]))
        for alpha in (self.alpha,) if self.groups is None else (self.alpha, self.groups):
            alpha.fill_(OPEN)


@torch.no_grad()
def largest(patches: list[Difference], share: float) -> list[Tensor]:
    """Where in each patch's δ the largest entries are: exactly this share of all of them together."""
    sizes = [len(patch.w) for patch in patches]
    magnitudes = torch.cat([patch.difference().abs() for patch in patches])
    chosen = torch.zeros_like(magnitudes, dtype=torch.bool)
    chosen[magnitudes.topk(round(share * len(magnitudes))).indices] = True
    return [part.nonzero().flatten() for part in chosen.split(sizes)]


class _Stages(Events):
    """First w and the gates learn, under the penalty; from step `start` on the largest entries alone.

    It holds no state: which entries were kept is to be seen from w, so that a resumed training goes on with the same ones.
    """

    def __init__(self, knobs: DiffPruning, loop: Loop) -> None:
        self.knobs = knobs
        self.patches = [p for _, _, seam in seams_of(loop.model) for _, _, p in seam.patches() if isinstance(p, Difference) and not p.settled]
        self.alphas = [a for p in self.patches for a in (p.alpha, p.groups) if a is not None]
        of_gates = {id(a) for a in self.alphas}
        for group in loop.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in of_gates]
        share = ALPHA_LR / loop.schedule.lr if loop.schedule.lr else 1.0
        loop.optimizer.add_param_group({"params": self.alphas, "weight_decay": 0.0, "share": share})

    def before_step(self, loop: Loop) -> None:
        if loop.step < self._start(loop):
            torch.stack([self.knobs.penalty * p.gates().sum() for p in self.patches]).sum().backward()  # λ Σ P(z ≠ 0)
            return
        self.kept = [p.w != 0 for p in self.patches]
        for alpha in self.alphas:
            alpha.grad = None

    @torch.no_grad()
    def after_step(self, loop: Loop) -> None:
        if loop.step > self._start(loop):
            for patch, kept in zip(self.patches, self.kept, strict=True):
                patch.w *= kept  # what the optimizer still remembers of the others moves them no more
        elif loop.step == self._start(loop):
            for patch, at in zip(self.patches, largest(self.patches, self.knobs.sparsity), strict=True):
                patch.keep(at)
            loop.best, loop.best_epoch = None, -1  # an epoch before this is none to come back to

    def _start(self, loop: Loop) -> int:
        return math.ceil((1 - self.knobs.fixed) * loop.total)
