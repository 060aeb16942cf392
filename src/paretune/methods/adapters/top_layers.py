"""Fine-tune the last k layers; or, the other way round, freeze the first ones.

The layers nearest to the input keep their general features. Lee, Tang & Lin 2019, arXiv:1911.03090.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from paretune import anatomy
from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.roles import Adapter
from paretune.seams import is_adapters


@dataclasses.dataclass(frozen=True, repr=False)
class TopLayers(Adapter):
    """Trains the last k layers of every stack in place."""

    card = Card(
        title="Fine-tuning the top layers",
        paper="Lee, Tang & Lin 2019, What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning",
        arxiv="1911.03090",
        equation="∇θ_l = 0 for l ≤ L − k",
        lowers="E",
        why="The backward pass ends at the lowest trained layer: a third of the layers, about a third of the gradient work.",
        lr=1e-4,
        lr_falls_with_size=True,
        exact_at_start=True,
    )
    selects = True

    k: int | None = knob(None, "layers that learn, counted from the output; None is 2, unless freeze is given", low=1, search="1..6")
    freeze: int | None = knob(None, "instead of k: layers that stay frozen, counted from the input", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is not None and self.freeze is not None:
            raise Incompatible(f"{self!r}: give k (layers that learn) or freeze (layers that do not), not both")

    def selection(self, model: nn.Module) -> list[str]:
        chosen = []
        for stack, layers in _stacks(model).items():
            wanted = len(layers) - self.freeze if self.freeze is not None else self.k or 2
            if not 0 < wanted <= len(layers):
                raise Incompatible(f"{self!r}: the {stack} of this {model.config.model_type} has {len(layers)} layers, so k is 1 to {len(layers)}")
            chosen += [f"{path}." for path in layers[-wanted:]]
        return [n for n, _ in model.named_parameters() if n.startswith(tuple(chosen)) and not is_adapters(n)]


def _stacks(model: nn.Module) -> dict[str, list[str]]:
    stacks: dict[str, list[str]] = {}
    for layer in anatomy.layers(model):
        stacks.setdefault(layer.stack, []).append(layer.path)
    return stacks
