"""Sharing across depth: the layers of a group have one set of parameters.

    h_{j+1} = f(h_j; θ_g(j)),    g(j) = ⌊j · groups / L⌋,    θ_g = the mean of the group's layers, or its first layer's

Lan et al. 2019, arXiv:1909.11942, section 3.1 (cross-layer parameter sharing); there the shared model is trained from
the start, here a pretrained one is tied, so a training phase has to follow.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from paretune import anatomy, hub, surgery
from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.roles import Examples, Trail, Transform
from paretune.seams import CHILD
from paretune.weights.maps import require_floats
from paretune.weights.sharing import tie


@dataclasses.dataclass(frozen=True, repr=False)
class ShareLayers(Transform):
    """Ties the parameters of layers that follow each other."""

    card = Card(
        title="Sharing layers",
        paper="Lan et al. 2019, ALBERT: A Lite BERT for Self-supervised Learning of Language Representations",
        arxiv="1909.11942",
        equation="θ_j = θ_g(j)",
        lowers="E",
        why="A group of layers is stored, and trained, once; an inference takes as long as before, for all layers are computed.",
        note="Lossy until it is trained: layers of a pretrained model differ. Its layers cannot be packed: use cast. Opens with transformers and paretune.",
    )

    groups: int = knob(1, "how many groups of layers that follow each other a stack has", low=1, search="1..6")
    values: str = knob("mean", "what a group starts from: the mean of its layers, or its first", choices=("mean", "first"))

    def follow(self, trail: Trail) -> Trail:
        require_floats(self, trail)
        return trail.replace(fixed=self.spelling(), shared=self.spelling())

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        groups = [group for found in anatomy.layer_lists(model) for group in self._grouped(model.get_submodule(found.path)) if len(group) > 1]
        for group in groups:
            self._check(group)
        surgery.settle(model)
        for group in groups:
            if self.values == "mean":
                _average(group)
            for follower in group[1:]:
                tie(group[0], follower)
        hub.refresh(model)
        return model

    def _grouped(self, layers: nn.Module) -> list[list[nn.Module]]:
        groups: dict[int, list[nn.Module]] = {}
        for j, layer in enumerate(layers):  # type: ignore[arg-type]
            groups.setdefault(j * self.groups // len(layers), []).append(layer)  # type: ignore[arg-type]
        return list(groups.values())

    def _check(self, group: list[nn.Module]) -> None:
        packed = next((m.packed_by for layer in group for m in layer.modules() if hasattr(m, "packed_by")), None)
        if packed is not None:
            raise Incompatible(f"{self!r}: {packed} has changed the form of weights in the layers; put {self.spelling()} before it")
        first, *others = ({n: p.shape for n, p in layer.named_parameters() if CHILD not in n.split(".")} for layer in group)
        if any(first.get(n) != shape for other in others for n, shape in other.items()):
            raise Incompatible(f"{self!r}: layers of one group have different shapes, which one set of parameters cannot fill; raise groups")


@torch.no_grad()
def _average(group: list[nn.Module]) -> None:
    for name, parameter in group[0].named_parameters():
        owner, _, leaf = name.rpartition(".")
        modules = [m for layer in group if (m := dict(layer.named_modules()).get(owner)) is not None]
        if CHILD not in name.split("."):
            parameter.copy_(torch.stack([getattr(m, leaf).float() for m in modules]).mean(0))
