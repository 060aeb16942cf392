from __future__ import annotations

import dataclasses
import types

import pytest
import steps
import torch
import work
from torch.nn import functional as F

from paretune import episodes, phases, surgery, training
from paretune.errors import RecipeError
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.lora import LoRA
from paretune.methods.modifiers.maml import MAML
from paretune.step.probe import Pace
from paretune.tasks.kinds.classification import Classification


def handler(knobs):
    """MAML's handler as the loop has it, but for what it reads off the task."""
    cls = type(knobs.events(looped()))
    made = cls.__new__(cls)
    made.size = episodes.Size(knobs.ways, knobs.shots, knobs.queries, knobs.inner_steps, knobs.inner_lr)
    made.through, made.query = knobs.order == 2, {}
    return made


def looped(model=None):
    model = model or work.ready("bert")
    loop = training.Loop(model, work.text_task(), work.Schedule(lr=1e-3, batch=4), training.Settings())
    loop.pace = Pace()
    return loop


def quadratic(start):
    """A loop whose loss is ½ |w − c|², summed over the batch's centers c."""
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    model.forward = lambda: model.w
    kind = types.SimpleNamespace(inputs=lambda batch: {}, loss=lambda w, batch: (0.5 * (w - batch["labels"]).square().sum(), len(batch["labels"])))
    return types.SimpleNamespace(model=model, parameters={"w": model.w}, task=types.SimpleNamespace(kind=kind), pace=None)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_the_gradient_on_a_quadratic(order, count):
    """w' = c_s + (1 − α)^k (w − c_s); ∇ of ½ |w' − c_q|² is (w' − c_q), times (1 − α)^k at order 2."""
    loop, lr = quadratic([1.0, -2.0]), 0.3
    support, query = torch.tensor([[0.5, 0.5]], dtype=torch.float64), torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    maml = handler(MAML(order=order, inner_steps=count, inner_lr=lr))
    maml.query = {"labels": query}
    batch = {"labels": support}
    loss = maml.loss(loop, batch, outputs=None, loss=episodes.mean_loss(loop, batch, weights=loop.parameters))
    loss.backward()
    w, shrink = torch.tensor([1.0, -2.0], dtype=torch.float64), (1 - lr) ** count
    adapted = support[0] + shrink * (w - support[0])
    torch.testing.assert_close(loss.detach(), 0.5 * (adapted - query[0]).square().sum())
    torch.testing.assert_close(loop.model.w.grad, (adapted - query[0]) * (shrink if order == 2 else 1.0))


class Exact(Classification):
    """The loss in the numbers that the model computes in."""

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs.logits, batch["labels"], reduction="sum"), len(batch["labels"])


def meta_loss(loop, maml, batch):
    support = maml.inputs(loop, batch)
    total, count = loop.task.kind.loss(episodes.answer(loop, support, weights=loop.parameters), support)
    return maml.loss(loop, support, outputs=None, loss=total) / count


def test_the_second_order_gradient_of_a_transformer_is_that_of_finite_differences():
    model = work.ready("bert").double()
    surgery.attach(model, [Full()])
    model.set_attn_implementation("eager")
    model.eval()
    loop = looped(model)
    loop.task = dataclasses.replace(loop.task, kind=Exact())
    found = {}
    for order in (1, 2):
        maml = MAML(order=order, inner_lr=0.5, inner_steps=2, ways=2, shots=2, queries=2).events(loop)
        (episode,) = maml.plan(loop, range(24), steps=1)
        batch = loop.collate([loop.encodings[i] for i in episode])
        model.zero_grad()
        meta_loss(loop, maml, batch).backward()
        found[order] = {n: p.grad.clone() for n, p in loop.parameters.items()}
    length = float(torch.stack([g.norm() for g in found[2].values()]).norm())
    direction = {n: g / length for n, g in found[2].items()}
    slopes = {order: float(sum((g * direction[n]).sum() for n, g in gradients.items())) for order, gradients in found.items()}
    values = []
    for way in (1e-4, -2e-4):  # to w + h d, and from there to w − h d
        with torch.no_grad():
            for n, p in loop.parameters.items():
                p += way * direction[n]
        values.append(float(meta_loss(loop, maml, batch).detach()))
    wanted = (values[0] - values[1]) / 2e-4
    assert slopes[2] == pytest.approx(wanted, rel=1e-5)
    assert abs(slopes[1] - wanted) > 1e-2 * abs(wanted), "order 1 leaves something out"


@pytest.mark.parametrize("method", [Full(), LoRA(r=2)], ids=str)
@pytest.mark.parametrize("order", [1, 2])
def test_it_learns_in_the_loop(method, order):
    model = work.ready("bert")
    torch.manual_seed(3)
    surgery.attach(model, [method])
    before = steps.parameters(model)
    fit = work.fitted(model, work.text_task(), MAML(order=order, ways=2, shots=2, queries=2))
    learned = {n for n, p in steps.parameters(model).items() if not torch.equal(p, before[n])}
    assert learned and learned <= steps.learning(model).keys() and fit.attention == ("eager" if order == 2 else "")
    assert model.config._attn_implementation == work.ready("bert").config._attn_implementation


@pytest.mark.parametrize("attention", ["based", "blockwise", "linformer", "longformer", "perceiver", "reformer"])
def test_attention_by_other_means_has_a_second_derivative(attention):
    model = phases.shrink(work.ready("bert"), work.biting(attention), None)
    surgery.attach(model, [LoRA(r=2, targets="query")])  # in the first layer nothing but queries learns
    before = steps.parameters(model)
    work.fitted(model, work.text_task(), MAML(order=2, ways=2, shots=2, queries=2))
    learned = {n for n, p in steps.parameters(model).items() if not torch.equal(p, before[n])}
    assert any("query" in n for n in learned) and all(p.isfinite().all() for p in model.parameters())


def test_a_start_learned_over_episodes_is_adapted_in_a_step():
    """A quadratic family with centers on a line: after meta-training, one step from w lands nearer than from where it began."""
    torch.manual_seed(0)
    loop, maml = quadratic([5.0, 5.0]), handler(MAML(order=2, inner_lr=0.5))
    optimizer = torch.optim.SGD([loop.model.w], lr=0.2)
    for _ in range(200):
        center = torch.tensor([[float(torch.randn(())), 1.0]], dtype=torch.float64)
        batch = maml.query = {"labels": center}
        optimizer.zero_grad()
        maml.loss(loop, batch, outputs=None, loss=episodes.mean_loss(loop, batch, weights=loop.parameters)).backward()
        optimizer.step()
    assert abs(float(loop.model.w.detach()[1]) - 1.0) < 1e-3, "what all tasks share is learned"
    assert abs(float(loop.model.w.detach()[0])) < 1.0, "what differs is left in the middle"


def test_knobs():
    with pytest.raises(RecipeError, match="order is 1 or 2"):
        MAML(order=3)
    assert type(MAML(inner_steps=0).events(looped())) is training.Events
