"""Weights that are zero and stay zero: masks with exact counts, and a linear map that stores and trains only what is kept.

On disk a sparse map (O, I) is its kept values and one bit per weight; in memory it is dense, so it computes as fast as
before and no faster. Only kept weights get a gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune import anatomy, surgery
from paretune.anatomy import Site
from paretune.errors import Incompatible, RecipeError
from paretune.roles import Trail, Transform
from paretune.weights.maps import mark, require_floats
from paretune.weights.numerics import pack_bits, unpack_bits

PATTERNS = ("", "2:4", "4:8")  # n of m weights that follow each other stay


class Pruner(Transform):
    """What methods that set weights to zero share: a method says which ones."""

    sparsity: float
    pattern: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern and self.sparsity != 0.5:
            raise RecipeError(f'{self!r}: the pattern {self.pattern} leaves one half; give sparsity=0.5 with it, or pattern=""')

    def follow(self, trail: Trail) -> Trail:
        require_floats(self, trail)
        return trail.replace(fixed=self.spelling())

    def empty(self, module: nn.Module) -> nn.Module:
        made = SparseLinear(module, kept=module.__dict__["resized"]["kept"])
        made.packed_by = self.spell()
        return made

    def prune(self, model: nn.Module, keeps: dict[Site, Tensor]) -> None:
        """Leaves the weights at True of the masks (O, I) of these places, and what was zero before; the rest is zero from here on."""

        def sparse(path: str) -> SparseLinear:
            module = model.get_submodule(path)
            weight = anatomy.weight(module).detach()
            keep = module.keep() if isinstance(module, SparseLinear) else torch.ones_like(weight, dtype=torch.bool)
            for site, part in keeps.items():
                if site.path == path:
                    rows = slice(None) if site.rows is None else list(site.rows)
                    keep[rows] &= part
            made = SparseLinear(module, kept=int(keep.sum()))
            made.take(module, keep)
            made.packed_by = self.spell()
            return made

        surgery.replace(model, ((path, sparse(path)) for path in dict.fromkeys(site.path for site in keeps)))


def require_pattern(method: Pruner, sites: list[Site]) -> None:
    """Refuses a map whose rows the pattern's groups do not fill."""
    size = int(method.pattern.partition(":")[2] or 1)
    short = next((s for s in sites if s.in_features % size), None)
    if short is not None:
        raise Incompatible(f"{method!r}: {short.path} has {short.in_features} inputs, which groups of {size} do not fill; leave pattern out")


def part(module: nn.Module, site: Site) -> Tensor:
    """The weight (O, I) of a place, fp32."""
    weight = anatomy.weight(module).detach().float()
    return weight if site.rows is None else weight[list(site.rows)]


def keep_largest(scores: Tensor, *, sparsity: float, pattern: str = "", per_row: bool = False) -> Tensor:
    """True at all but the ⌊sparsity · n⌋ lowest of n scores: of the whole tensor (O, I), of each row, or n of each m by a pattern."""
    if pattern:
        n, m = map(int, pattern.split(":"))
        return _keep(scores.reshape(-1, m), zeros=m - n).view(scores.shape)
    groups = scores if per_row else scores.reshape(1, -1)
    return _keep(groups, zeros=math.floor(round(sparsity * groups.shape[1], 6))).view(scores.shape)


def _keep(groups: Tensor, *, zeros: int) -> Tensor:
    lowest = groups.argsort(dim=1, stable=True)[:, :zeros]  # of equal scores the first go
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, lowest, False)


class SparseLinear(nn.Module):
    """y = x Wᵀ + b; a state dict holds the kept values of W in order, and the bits that say where they stand."""

    paretune_linear = True
    paretune_fixed = True  # no merge
    paretune_sparse = True  # its weight is a plain one of floats, with zeros in it
    packed_by: str
    bits: Tensor  # (⌈O I / 8⌉,) uint8
    values: nn.Parameter  # (kept,); there only until they are loaded

    def __init__(self, module: Any, *, kept: int) -> None:
        super().__init__()
        stored, bias = anatomy.weight(module), module.bias
        self.out_features, self.in_features = stored.shape
        mark(self, {"kept": kept})
        self.weight = nn.Parameter(torch.empty_like(stored, memory_format=torch.contiguous_format))
        self.values = nn.Parameter(stored.new_empty(kept))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.register_buffer("bits", torch.zeros(math.ceil(stored.numel() / 8), dtype=torch.uint8, device=stored.device))

    def take(self, module: nn.Module, keep: Tensor) -> None:
        """Has the values of a float map at True of `keep` (O, I)."""
        weight = anatomy.weight(module)
        self.bits = pack_bits(keep)
        self.values = nn.Parameter(weight.detach()[keep], requires_grad=weight.requires_grad)
        self.loaded()

    def loaded(self) -> None:
        """Called once the values are there: from here on the weight is dense in memory."""
        learns = self.values.requires_grad
        self.weight = nn.Parameter(self._dense(self.values.detach(), self.bits), requires_grad=learns)
        del self.values

    def keep(self) -> Tensor:
        """(O, I), True where a weight is kept."""
        return self._mask(self.bits)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight.requires_grad and torch.is_grad_enabled():
            weight = weight * self.keep()  # ∂L/∂w = 0 where w is zero, so that no step moves it
        return F.linear(x, weight, self.bias)

    def _mask(self, bits: Tensor) -> Tensor:
        return unpack_bits(bits, self.out_features * self.in_features).view(self.out_features, self.in_features)

    def _dense(self, values: Tensor, bits: Tensor) -> Tensor:
        return values.new_zeros(self.out_features, self.in_features).masked_scatter_(self._mask(bits), values)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.pop(f"{prefix}weight")
        if "values" not in self._parameters:
            destination[f"{prefix}values"] = weight.detach()[self.keep()]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        values, bits = state_dict.pop(f"{prefix}values", None), state_dict.get(f"{prefix}bits", self.bits)
        if values is not None:
            state_dict[f"{prefix}weight"] = self._dense(values, bits)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, kept={self.resized['kept']}"
