from __future__ import annotations

import math

import pytest
import steps
import torch
import work

from paretune import anatomy, phases
from paretune.errors import Incompatible, RecipeError
from paretune.methods.transforms.wanda import Wanda
from paretune.recipe import parse
from paretune.roles import Examples
from paretune.weights import calibration


def oracle(weight, x, *, sparsity):
    """The paper's metric on one map: weight (O, I), all its inputs x (N, I) stacked; the pruned weight."""
    metric = weight.abs() * x.norm(dim=0)  # |W_ij| · ‖X_j‖₂
    weight = weight.clone()
    for row, scores in zip(weight, metric, strict=True):
        row[scores.argsort()[: int(weight.shape[1] * sparsity)]] = 0
    return weight


def inputs_of(model, path, task):
    """Every input vector of a map, example by example, so that nothing is padded."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    processor = phases.processors.get(model)
    for row in task.encode(task.train, processor, config=model.config):
        with torch.no_grad():
            model(**task.kind.inputs(task.kind.collate([row], processor)))
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "vit"])
def test_each_map_is_the_papers_given_the_layers_pruned_before_it(family):
    model, task = work.ready(family), work.image_task() if family == "vit" else work.text_task(train=6)
    before = {s: anatomy.weight(model.get_submodule(s.path)).detach().clone() for s in anatomy.resolve(model, "linear", kind="linear")}
    after = phases.shrink(work.ready(family), Wanda(sparsity=0.4), task)
    for key in dict.fromkeys((s.stack, s.layer) for s in before):
        here = [s for s in before if (s.stack, s.layer) == key]
        wanted = {s: oracle(before[s], inputs_of(model, s.path, task), sparsity=0.4) for s in here}
        for site, weight in wanted.items():
            found = anatomy.weight(after.get_submodule(site.path)).detach()
            assert torch.equal(found, weight), site
            assert ((found == 0).sum(1) == math.floor(0.4 * weight.shape[1])).all()
            with torch.no_grad():
                anatomy.weight(model.get_submodule(site.path)).copy_(weight)


def test_a_maps_lowest_scores_wherever_they_stand():
    model, task = work.ready("llama"), work.text_task(train=6)
    path = "model.layers.0.self_attn.q_proj"  # of the first layer, whose inputs no zero has changed
    scores = model.get_submodule(path).weight.detach().abs() * inputs_of(model, path, task).norm(dim=0)
    phases.shrink(model, Wanda(sparsity=0.4, scope="layer"), task)
    zero = model.get_submodule(path).weight == 0
    lowest = scores.flatten().argsort()[: int(0.4 * scores.numel())]
    assert torch.equal(zero.flatten().nonzero().flatten(), lowest.sort().values)
    assert len(set(zero.sum(1).tolist())) > 1
    with pytest.raises(RecipeError, match="a pattern says itself"):
        Wanda(pattern="2:4", scope="layer")


def test_padding_is_not_counted():
    model, task = work.ready("bert"), work.task("bert")
    path = "bert.encoder.layer.1.intermediate.dense"
    batches = calibration.unpadded(model, Examples(task, phases.processors.get(model)), count=len(task.train))
    assert all(bool((b["attention_mask"] == 1).all()) for b in batches) and max(len(b["input_ids"]) for b in batches) > 1
    x = inputs_of(model, path, task)
    found = calibration.second_moments(model, [path], batches=batches, kind=task.kind)[path]
    torch.testing.assert_close(found, x.T @ x / len(x))
    squares = calibration.second_moments(model, [path], batches=batches, kind=task.kind, diagonal=True)[path]
    torch.testing.assert_close(squares, found.diagonal())


def test_n_of_m_stay_by_the_same_metric():
    model, task = work.ready("llama"), work.task("llama")
    path = "model.layers.0.mlp.up_proj"
    scores = model.get_submodule(path).weight.detach().abs() * inputs_of(model, path, task).norm(dim=0)
    phases.shrink(model, Wanda(pattern="2:4"), task)
    kept = model.get_submodule(path).weight.view(len(scores), -1, 4) != 0
    groups = scores.view(len(scores), -1, 4)
    assert (kept.sum(-1) == 2).all()
    assert (torch.where(kept, groups, torch.inf).amin(-1) >= torch.where(kept, 0.0, groups).amax(-1)).all()


def test_a_few_examples_do_and_none_do_not():
    model, task = work.ready("bert"), work.task("bert")
    batches = calibration.unpadded(model, Examples(task, phases.processors.get(model)), count=5)
    assert sum(len(b["input_ids"]) for b in batches) == 5
    with pytest.raises(Incompatible, match="give the task"):
        phases.shrink(model, Wanda())
    phases.shrink(model, Wanda(samples=3), task)
    assert steps.logits(model, "bert").isfinite().all()


def test_the_designs_recipe_composes():
    parse("full | wanda(sparsity=0.5) | bitfit").check()
    with pytest.raises(Incompatible, match="put it before int8"):
        parse("full | int8 | wanda").check()
