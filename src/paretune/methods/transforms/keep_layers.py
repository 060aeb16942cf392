"""Layer dropping: some layers of each stack stay, the others go.

    h_{j+1} = f_{k_j}(h_j),   k_0 < k_1 < ... the layers kept
    I_k = E_x |∂L(x)/∂ξ_k| at ξ = 1 = E_x |Σ_t (f_k(h) − h)_t · ∂L/∂f_k(h)_t|,   layer k giving h + ξ_k (f_k(h) − h)

The second line is the score by which "taylor" keeps the highest: to close the gate is to drop the layer. Sanh et al. 2019,
arXiv:1910.01108 (DistilBERT starts from every second layer); Sajjad et al. 2020, arXiv:2004.03844; the score is that of
Molchanov et al. 2019, arXiv:1906.10771, equation 8, with a gate per layer.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from paretune import anatomy, hub, surgery
from paretune.anatomy import LayerList
from paretune.card import Card, knob
from paretune.errors import Incompatible, RecipeError, one_of
from paretune.roles import Examples, Trail, Transform
from paretune.weights import calibration
from paretune.weights.narrowing import check_keep, follow_keep, highest, number

TAYLOR = "taylor"


@dataclasses.dataclass(frozen=True, repr=False)
class KeepLayers(Transform):
    """Keeps the named layers of each stack, or those that the task's loss depends on most."""

    card = Card(
        title="Layer dropping",
        paper="Sajjad et al. 2020, On the Effect of Dropping Layers of Pre-trained Transformer Models",
        arxiv="2004.03844",
        equation="h_(j+1) = f_(k_j)(h_j)",
        lowers="E",
        why="Time and size fall with the number of layers; accuracy falls, too, and a phase of training after it brings much of that back.",
        note="Which layers count is the model's: the paper finds dropping the top ones best in most tasks, DistilBERT takes every second. "
        'With layers="taylor" they are those that the trained task\'s loss depends on most, stack by stack: put it behind a training phase.',
    )

    layers: str | tuple[int, ...] = knob("even", 'their numbers from 0, as in "0,2,4", "even" for every second one, or "taylor" for the most important')
    keep: int | float = knob(0.5, "taylor: how many layers of a stack stay, a share up to 1.0, or a number")
    samples: int = knob(128, "taylor: training examples that importance is measured on", low=1)
    stack: str = knob("all", "of which stacks", choices=("all", "encoder", "decoder"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self, self.keep)
        if self.layers != TAYLOR:
            self._numbers(count=None)
            if self.keep != 0.5:
                raise RecipeError(f'{self!r}: keep is for the score; give layers="taylor" with it, or leave keep out')

    @property
    def needs_examples(self) -> bool:  # type: ignore[override]
        return self.layers == TAYLOR

    def follow(self, trail: Trail) -> Trail:
        deep = next((m for m in trail.attached if m.knobs(defaults=True).get("features", "last") != "last"), None)
        if deep is not None:
            raise Incompatible(f"{self!r}: {deep!r} reads several layers by their place; put keep_layers before it")
        return follow_keep(self, trail, keep=self.keep) if self.layers == TAYLOR else trail

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        lists = [found for found in anatomy.layer_lists(model) if self.stack in ("all", found.stack)]
        if not lists:
            raise Incompatible(f"{self!r}: {type(model).__name__} has no {self.stack}, only {one_of(s.stack for s in anatomy.layer_lists(model))}")
        scores = self.importance(model, lists, examples=examples) if self.layers == TAYLOR else {}
        plan = [(found, self._chosen(model, found, scores=scores)) for found in lists]
        surgery.settle(model)
        for found, chosen in plan:
            _keep(model, found, chosen)
        hub.refresh(model)
        return model

    def importance(self, model: nn.Module, lists: list[LayerList], *, examples: Examples | None) -> dict[str, Tensor]:
        """I_k (layers) of each list, by its path."""
        assert examples is not None
        batches = calibration.unpadded(model, examples, count=self.samples)
        paths = {found.path: [f"{found.path}.{k}" for k in range(len(model.get_submodule(found.path)))] for found in lists}  # type: ignore[arg-type]
        gradients = calibration.layer_gradients(model, [p for own in paths.values() for p in own], batches=batches, kind=examples.task.kind)
        return {path: torch.stack([gradients[p].abs().mean() for p in own]) for path, own in paths.items()}

    def _chosen(self, model: nn.Module, found: LayerList, *, scores: dict[str, Tensor]) -> list[int]:
        count = len(model.get_submodule(found.path))  # type: ignore[arg-type]
        if found.path in scores:
            return highest(scores[found.path], number(self.keep, count)).tolist()
        chosen = self._numbers(count)
        if chosen[-1] >= count:
            where = f"the {found.stack} of this {model.config.model_type}"
            raise Incompatible(f"{self!r}: {where} has {count} layers, numbered 0 to {count - 1}, and no layer {chosen[-1]}")
        return chosen

    def _numbers(self, count: int | None) -> list[int]:
        if self.layers == "even":
            return list(range(0, count or 1, 2))
        words = self.layers.replace(",", " ").split() if isinstance(self.layers, str) else self.layers
        numbers = [int(w) for w in words if isinstance(w, int) or w.isdecimal()]
        if not numbers or len(numbers) < len(words) or numbers != sorted(set(numbers)) or numbers[0] < 0:
            raise RecipeError(f'{self!r}: layers are rising numbers from 0, as in "0,2,4", "even" or "taylor"')
        return numbers


def _keep(model: nn.Module, found: LayerList, chosen: list[int]) -> None:
    layers = model.get_submodule(found.path)
    kept = [layers[k] for k in chosen]  # type: ignore[index]
    _pass_on_bias(layers[0], kept[0])  # type: ignore[index]
    surgery.moved(model, {f"{found.path}.{k}.": f"{found.path}.{i}." for i, k in enumerate(chosen)})
    parent, _, name = found.path.rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder, name, nn.ModuleList(kept).train(layers.training))
    for i, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = i  # the place of its keys and values in a generation cache
    _count(model, holder, found, chosen)


def _count(model: nn.Module, holder: nn.Module, found: LayerList, chosen: list[int]) -> None:
    setattr(model.config, found.counter, len(chosen))
    own = getattr(holder, "config", model.config)
    if own is not model.config:  # T5 gives each stack a config of its own
        own.num_hidden_layers = len(chosen)
    for config in (model.config, *([own] if own is not model.config else [])):
        for field in found.per_layer:
            if len(getattr(config, field)) > len(chosen):
                setattr(config, field, [getattr(config, field)[k] for k in chosen])


def _pass_on_bias(first: nn.Module, new: nn.Module) -> None:
    """T5 keeps the biases of relative positions in a stack's first layer, and all layers read them there."""
    for (_, old), (_, heir) in zip(first.named_modules(), new.named_modules(), strict=False):
        if old is not heir and getattr(old, "has_relative_attention_bias", False) is True:
            heir.relative_attention_bias, heir.has_relative_attention_bias = old.relative_attention_bias, True
