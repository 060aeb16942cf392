"""Surgical fine-tuning: one block of the model learns, chosen by how much the task pulls at it.

    RGN_b = ‖∇_{θ_b} L‖ / ‖θ_b‖,   the blocks with the largest learn

A block is the embeddings, a layer, or the rest (what stands behind the layers); the head learns with any of them. Which one
has to change depends on what has changed: the inputs, the features, or the labels. Lee et al. 2022, arXiv:2210.11466, section 4.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from paretune import anatomy, surgery, training
from paretune.card import Card, knob
from paretune.errors import Incompatible, one_of, unknown
from paretune.roles import Adapter, Examples
from paretune.seams import CHILD

FACT = "relative_gradient_norm_"  # a phase's record has one for each block, the largest first
BATCH = 16


@dataclasses.dataclass(frozen=True, repr=False)
class Surgical(Adapter):
    """Trains the blocks that the data, or you, choose."""

    card = Card(
        title="Surgical fine-tuning",
        paper="Lee et al. 2022, Surgical Fine-Tuning Improves Adaptation to Distribution Shifts",
        arxiv="2210.11466",
        equation="θ_b ← θ_b − lr ∇L for the b with the largest ‖∇_b L‖ / ‖θ_b‖",
        lowers="ED",
        why="One block has few parameters to overfit and needs few examples; choosing it costs one backward pass over some of them.",
        lr=1e-4,
        lr_falls_with_size=True,
        exact_at_start=True,
        note="The paper's Auto-RGN gives every layer a rate in proportion to its norm; here the first of the ranking learn and the others stay, as "
        "in its experiments with one block. The head is no candidate, as it learns in every training phase; where it is new, the gradients come through a random one.",
    )
    selects = True

    blocks: str = knob("auto", 'which blocks learn: "auto", or names such as "embeddings", "0 1", "encoder.3", "rest"')
    count: int = knob(1, "how many blocks auto takes", low=1, search="1..4")
    examples: int = knob(64, "training examples that auto ranks by", low=1)

    def chosen(self, model: nn.Module, examples: Examples | None) -> tuple[Adapter, dict[str, float]]:
        if self.blocks != "auto" or examples is None:
            return self, {}
        ranked = ranking(model, examples, count=self.examples)
        if self.count > len(ranked):
            raise Incompatible(f"{self!r}: this {model.config.model_type} has {len(ranked)} blocks, so count is 1 to {len(ranked)}")
        first = " ".join(list(ranked)[: self.count])
        return dataclasses.replace(self, blocks=first), {FACT + block: value for block, value in ranked.items()}

    def selection(self, model: nn.Module) -> list[str]:
        there = blocks(model)
        if self.blocks == "auto":
            raise Incompatible(f'{self!r}: blocks="auto" is decided on examples; give a task, as in adapt(model, ..., task=task), or name {one_of(there)}')
        words = self.blocks.replace(",", " ").split()
        wrong = [word for word in words if word not in there]
        if wrong or not words:
            raise Incompatible(f"{self!r}: {unknown('block', (wrong or [''])[0], allowed=there)}")
        return [name for block in dict.fromkeys(words) for name in there[block]]


def blocks(model: nn.Module) -> dict[str, list[str]]:
    """The model's blocks in its order, and the names of their parameters; a layer is called by its number, with its stack where there are two."""
    layers, in_head = anatomy.layers(model), surgery.in_head(model)
    several = len({layer.stack for layer in layers}) > 1
    paths = {f"{layer.stack}.{layer.index}" if several else str(layer.index): f"{layer.path}." for layer in layers}
    found: dict[str, list[str]] = {"embeddings": [], **{block: [] for block in paths}, "rest": []}
    behind = False
    for name, _ in model.named_parameters():
        if CHILD in name.split(".") or in_head(name):
            continue
        layer = next((block for block, path in paths.items() if name.startswith(path)), None)
        behind = behind or layer is not None
        found[layer or ("rest" if behind else "embeddings")].append(name)
    return {block: names for block, names in found.items() if names}


def ranking(model: nn.Module, examples: Examples, *, count: int) -> dict[str, float]:
    """‖∇L‖ / ‖θ‖ of each block over some training examples, the largest first; L is their mean loss, in evaluation mode."""
    there = blocks(model)
    weights = {name: model.get_parameter(name).detach().requires_grad_() for names in there.values() for name in names}  # the same storage
    gradients = _gradients(model, weights, examples, count)

    def norm(tensors: dict[str, Tensor], names: list[str]) -> float:
        return float(torch.stack([tensors[name].detach().float().norm() for name in names]).norm())

    ratios = {block: norm(gradients, names) / norm(weights, names) for block, names in there.items()}
    return dict(sorted(ratios.items(), key=lambda item: -item[1]))


def _gradients(model: nn.Module, weights: dict[str, Tensor], examples: Examples, count: int) -> dict[str, Tensor]:
    task, was_training = examples.task.subset(count, seed=0), model.training
    encodings = training.encode(task, task.train, model=model)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    targets = 0
    model.eval()
    for start in range(0, len(encodings), BATCH):
        batch = {k: v.to(model.device) for k, v in task.kind.collate(encodings[start : start + BATCH], examples.processor).items()}
        outputs = torch.func.functional_call(model, weights, args=(), kwargs=task.kind.inputs(batch))
        loss, n = task.kind.loss(outputs, batch)
        targets += n
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True):
            if gradient is not None:
                total[name] += gradient
    model.train(was_training)
    return {name: gradient / targets for name, gradient in total.items()}
