"""Arithmetic on adapters of one backbone: weighted sums, averages, negation, extraction from two checkpoints, truncation.

    combine    ΔW = Σ_k w_k s_k B_k A_k = [w_1 s_1 B_1, w_2 s_2 B_2, …] [A_1; A_2; …]    exact: the ranks add up
    truncate   ΔW_r = Σ_{i ≤ r} σ_i u_i v_iᵀ, the nearest matrix of rank r               error √(Σ_{i > r} σ_i²)
    extract    the same of ΔW = W_tuned − W

The adapters are of lora, or train the backbone's own parameters (full, top_layers, bitfit). These, heads and norms are summed
alike: θ = θ_0 + Σ_k w_k (θ_k − θ_0). A sum of the factors, (Σ w_k B_k)(Σ w_k A_k), would hold products B_j A_k of two adapters,
which neither of them means. Task arithmetic: Ilharco et al. 2022, arXiv:2212.04089; the nearest matrix: Eckart & Young 1936.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from paretune import anatomy, surgery
from paretune.anatomy import Site
from paretune.errors import Incompatible, all_of, one_of
from paretune.methods.adapters.lora import LoRA, LowRank
from paretune.roles import Adapter
from paretune.seams import CHILD, Selected


@dataclasses.dataclass
class _Change:
    """What an adapter does to its backbone: B A at each site, and differences of parameters that it trains in place."""

    factors: dict[Site, tuple[Tensor, Tensor]]  # B (O, r) with the scale in it, A (r, I)
    differences: dict[str, Tensor]
    in_place: tuple[Adapter, ...] = ()  # what trained those


@torch.no_grad()
def combine(model: nn.Module, weights: Mapping[str, float], *, name: str) -> nn.Module:
    """Attaches the weighted sum of adapters under a new name, active and ready to train; `weights` is adapter to weight.

    Raises:
        Incompatible: for adapters that are not attached, that are no sums of thin matrices or of parameters, or not at the same places.
    """
    if not weights:
        raise Incompatible("combine: no adapter is named; give a weight for each, as in combine(model, {'a': 0.5, 'b': 0.5}, name='both')")
    with _bare(model, weights):
        changes = {adapter: _read(model, adapter) for adapter in weights}
    first, *others = weights
    for other in others:
        _refuse_unlike(first, other, changes)
    factors = {}
    for site in changes[first].factors:
        pairs = [(w * B, A) for adapter, w in weights.items() for B, A in [changes[adapter].factors[site]]]
        factors[site] = torch.cat([B for B, _ in pairs], 1), torch.cat([A for _, A in pairs])
    differences = {n: torch.stack([w * changes[a].differences[n] for a, w in weights.items()]).sum(0) for n in changes[first].differences}
    return _write(model, name, _Change(factors, differences, changes[first].in_place))


def average(model: nn.Module, names: Sequence[str], *, name: str) -> nn.Module:
    """Attaches the mean of adapters; raises what `combine` raises."""
    return combine(model, {adapter: 1 / len(names) for adapter in names}, name=name)


def negate(model: nn.Module, of: str, *, name: str) -> nn.Module:
    """Attaches the adapter that takes away what `of` adds; raises what `combine` raises."""
    return combine(model, {of: -1.0}, name=name)


@torch.no_grad()
def truncate(model: nn.Module, of: str, *, r: int, name: str) -> dict[str, float]:
    """Attaches the nearest adapter of rank r at most; what `of` trains in place is kept.

    Returns:
        Per module the Frobenius norm of what was cut off.

    Raises:
        Incompatible: for an adapter that is not attached or not of lora.
    """
    with _bare(model, [of]):
        change = _read(model, of)
    lost: dict[str, float] = {}
    for site, (B, A) in change.factors.items():
        (Q, R), (P, S) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
        U, sigma, V = torch.linalg.svd(R @ S.T)  # B A = Q (R Sᵀ) Pᵀ, and the middle is small
        change.factors[site] = _first(Q @ U, sigma, V @ P.T, r)
        lost[site.path] = float(torch.tensor([lost.get(site.path, 0.0), *sigma[r:]]).norm())
    _write(model, name, change)
    return lost


@torch.no_grad()
def extract(model: nn.Module, tuned: nn.Module, *, r: int, targets: str | Sequence[str] = "linear", name: str = "default") -> dict[str, float]:
    """Attaches to a backbone the adapter of rank r that comes nearest to a fine-tuned checkpoint of it, with the checkpoint's head.

    Returns:
        For each parameter that is not the checkpoint's with it, the Frobenius norm of the difference that is left.

    Raises:
        Incompatible: for a checkpoint of another backbone, or one with adapters on it.
        TargetError: for a target that hits nothing.
    """
    _refuse_other_backbone(model, tuned)
    in_head, theirs = surgery.in_head(model), dict(tuned.named_parameters())
    with _bare(model, []):
        missing = {n: theirs[n].double() - p.double() for n, p in model.named_parameters() if CHILD not in n.split(".")}
        change = _Change({}, {n: missing.pop(n).float() for n in list(missing) if in_head(n)})
        for site in (s for s in anatomy.resolve(model, targets, kind="linear") if not in_head(f"{s.path}.weight")):
            left = missing[f"{site.path}.weight"].T if site.transposed else missing[f"{site.path}.weight"]  # (O, I), a view
            rows = slice(None) if site.rows is None else torch.tensor(site.rows)
            B, A = change.factors[site] = _first(*torch.linalg.svd(left[rows], full_matrices=False), r)
            left[rows] -= B.double() @ A.double()
    _write(model, name, change)
    return {n: float(left.norm()) for n, left in missing.items() if left.any()}


def _first(U: Tensor, sigma: Tensor, V: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B = U_r √σ_r and A = √σ_r V_r of the first r singular values."""
    root = sigma[:r].sqrt()
    return (U[:, : len(root)] * root).float(), (root[:, None] * V[: len(root)]).float()


@contextlib.contextmanager
def _bare(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """The backbone alone inside the block, then what was active before; adapters of these names are attached."""
    before = surgery.state(model).active
    surgery.switch(model, *names)
    surgery.switch(model)
    try:
        yield
    finally:
        surgery.switch(model, *before)


def _read(model: nn.Module, name: str) -> _Change:
    found: dict[Site, list[LowRank]] = {}
    change = _Change({}, {}, tuple(method for method in surgery.state(model).adapters[name] if not isinstance(method, LoRA)))
    for path, module, seam in surgery.seams_of(model):
        for _, _, patch in seam.patches([name]):
            if isinstance(patch, Selected):
                change.differences |= {f"{path}.{n}": patch.get_buffer(n).float() - getattr(module, n).detach().float() for n in patch.names}
            elif type(patch) is LowRank and patch.site is not None:
                found.setdefault(patch.site, []).append(patch)
            else:
                raise Incompatible(f"adapter {name!r}: {patch.method!r} is no sum of thin matrices at {path}; add adapters of lora, full, top_layers or bitfit")
    change.factors = {s: (torch.cat([p.scale * p.B.float() for p in ps], 1), torch.cat([p.A.float() for p in ps])) for s, ps in found.items()}
    return change


def _write(model: nn.Module, name: str, change: _Change) -> nn.Module:
    surgery.attach(model, [], name=name, head=False)
    methods = []
    for site, (B, A) in change.factors.items():
        methods.append(LoRA(r=len(A), alpha=float(len(A)), targets=site.path))  # scale 1
        patch = surgery.install(model, name, method=methods[-1], site=site)
        patch.get_parameter("A").copy_(A)
        patch.get_parameter("B").copy_(B)
    in_head = surgery.in_head(model)
    for key, inside in ((LoRA.spelling(), False), (surgery.HEAD, True)):
        surgery.select(model, name, key=key, parameters=[n for n in change.differences if in_head(n) == inside])
    surgery.state(model).adapters[name] = tuple(dict.fromkeys([*methods, *change.in_place]))
    surgery.switch(model, name)
    for parameter, difference in change.differences.items():
        own = model.get_parameter(parameter)
        own.copy_(own.float() + difference)
    return model


def _refuse_unlike(first: str, other: str, changes: dict[str, _Change]) -> None:
    for what, of in (("linear maps", lambda c: {s.path for s in c.factors}), ("parameters in place", lambda c: set(c.differences))):
        one, two = of(changes[first]), of(changes[other])
        if one != two:
            raise Incompatible(
                f"adapters {first!r} and {other!r} change different {what}: {one_of(sorted(one ^ two)[:3])} is changed by one of them alone; "
                "combine adapters with the same targets"
            )


def _refuse_other_backbone(model: nn.Module, tuned: nn.Module) -> None:
    if surgery.state(tuned).adapters:
        raise Incompatible(f"extract: the checkpoint has adapters on it, {all_of(surgery.state(tuned).adapters)}; merge them first")
    ours = {n: tuple(p.shape) for n, p in model.named_parameters() if CHILD not in n.split(".")}
    theirs = {n: tuple(p.shape) for n, p in tuned.named_parameters()}
    other = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if other:
        said = [f"{n} ({ours.get(n, 'absent')} and {theirs.get(n, 'absent')})" for n in other[:3]]
        raise Incompatible(f"extract: the checkpoint is of another backbone, {len(other)} parameters differ in shape: {all_of(said)}")
