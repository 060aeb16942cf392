"""Bottleneck adapters: a small two-layer network beside each block, started at the identity.

    sequential   y ← y + s · U σ(D y)            houlsby: after attention and feed-forward; pfeiffer: after feed-forward
    parallel     y ← y + s · U σ(D x)            beside the feed-forward, x its input
    lin          y ← y + s · U σ(D LN(y))        after a whole layer, with a layer norm of its own

D (m, d) and U (d, m) have biases; U starts at zero and D uniform in ±1/√d, as in LoRA. Houlsby et al. 2019, arXiv:1902.00751;
Pfeiffer et al. 2020, arXiv:2005.00247; parallel: He et al. 2021, arXiv:2110.04366, equations 4 and 8; lin: Lin et al. 2020,
arXiv:2004.03829.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune import anatomy
from paretune.anatomy import Site
from paretune.card import Card, knob
from paretune.patches import Patch, fitting, openness
from paretune.roles import Adapter as AdapterRole

PLACES = {"houlsby": "attention_block ffn_block", "pfeiffer": "ffn_block", "parallel": "ffn_block"}  # lin: each layer
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclasses.dataclass(frozen=True, repr=False)
class Adapter(AdapterRole):
    """Trains a bottleneck per block, and the layer norms."""

    card = Card(
        title="Bottleneck adapters",
        paper="Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP",
        arxiv="1902.00751",
        equation="y = y + s · (U σ(D y + b_D) + b_U)",
        lowers="E",
        why="No weight gradient of the backbone; a few per cent more work in every later inference, since it cannot be merged.",
        lr=2e-3,
        exact_at_start=True,
        note="pfeiffer is Houlsby's bottleneck after the feed-forward only, before the residual x is added: LN(x + y + U σ(D y)). "
        "Pfeiffer et al.'s own also reads the layer norm that follows: LN(x + y + U σ(D LN(x + y))). "
        "The rate is for m up to 64 and s up to 1; beyond, it falls with both.",
    )
    foldable = False
    additive = True

    bottleneck: int = knob(64, "width m of the bottleneck", low=1, search="8..128 log")
    form: str = knob("houlsby", "where the bottlenecks sit", choices=("houlsby", "pfeiffer", "parallel", "lin"))
    activation: str = knob("gelu", "σ", choices=("relu", "gelu", "silu"))
    scale: float = knob(1.0, "s", low=0.0)
    norms: bool = knob(True, "train the layer norms too, as Houlsby et al. do")
    gate: bool = knob(False, "a trained gate σ(w·x + b) for each bottleneck and token, as UniPELT has it")
    layers: str = knob("all", 'in which layers, as in "0,2,5"')

    @property
    def lr(self) -> float:
        """The card's rate for m to 64 and s to 1: a step moves the sum over m by as much as m and s are large, and beyond that the rate falls with both."""
        assert self.card.lr is not None
        return self.card.lr / (max(1.0, self.bottleneck / 64) * max(1.0, self.scale))

    def sites(self, model: nn.Module) -> list[Site]:
        return anatomy.in_layers(self._everywhere(model), self.layers, asked_by=repr(self))

    def _everywhere(self, model: nn.Module) -> list[Site]:
        if self.form == "lin":
            width = model.config.hidden_size
            return [Site("layer", ref.path, ref.index, ref.stack, in_features=width, out_features=width) for ref in anatomy.layers(model)]
        sites = anatomy.resolve(model, PLACES[self.form])
        return sites if self.form == "parallel" else [dataclasses.replace(site, source=None) for site in sites]

    def patch(self, site: Site) -> Patch:
        return Bottleneck(site, self)

    def selection(self, model: nn.Module) -> list[str]:
        paths = tuple(f"{path}." for path in anatomy.norms(model)) if self.norms else ()
        return [name for name, _ in model.named_parameters() if name.startswith(paths)] if paths else []


class Bottleneck(Patch):
    """s · U σ(D x) of width m at one block of width d."""

    def __init__(self, site: Site, knobs: Adapter) -> None:
        super().__init__(site)
        self.scale, self.sigma, self.parallel = knobs.scale, ACTIVATIONS[knobs.activation], knobs.form == "parallel"
        self.down = nn.Linear(site.in_features, knobs.bottleneck)
        self.up = nn.Linear(knobs.bottleneck, site.out_features)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        if knobs.form == "lin":
            self.norm = nn.LayerNorm(site.in_features)
        if knobs.gate:
            self.gate = nn.Parameter(torch.zeros(site.in_features + 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        source = fitting(x if self.parallel else y, self.down.weight)
        if "norm" in self._modules:
            source = self.norm(source)
        update: Tensor = self.up(self.sigma(self.down(source)))  # (B, T, d) -> (B, T, m) -> (B, T, d)
        if "gate" in self._parameters:
            update = openness(source, self.gate) * update
        return y + self.scale * update.to(y.dtype)
