from __future__ import annotations

import copy
import json

import pytest
import steps
import tiny
import torch
import work
from torch.nn import functional as F

import paretune  # noqa: F401
from paretune import anatomy, inference, phases, processors, surgery, training
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms.ffn import FFN
from paretune.recipe import parse
from paretune.roles import Examples


def losses(model, task):
    """Each training example's loss, alone."""
    processor = processors.get(model)
    found = []
    for row in task.encode(task.train, processor, config=model.config):
        batch = task.kind.collate([row], processor)
        with torch.no_grad():
            found.append(F.cross_entropy(model(**task.kind.inputs(batch)).logits.double(), batch["labels"]))
    return torch.stack(found)


def importance_by_differences(model, path, columns, task):
    """E |∂L/∂ξ| of a gate on these input features of a map, by a central difference in its columns."""
    weight = anatomy.weight(model.get_submodule(path)).data
    before, step = weight[:, columns].clone(), 0.01
    above, below = [], []
    for sign, kept in ((1, above), (-1, below)):
        weight[:, columns] = before * (1 + sign * step)
        kept.append(losses(model, task))
        weight[:, columns] = before
    return float(((above[0] - below[0]) / (2 * step)).abs().mean())


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_importance_is_the_derivative_of_each_examples_loss_in_the_gate(family):
    model, task = work.ready(family), work.image_task() if family == "vit" else work.text_task(train=5)
    path = anatomy.feed_forwards(model)[1].down.path
    method = FFN(samples=5 if family != "vit" else 24)
    found = method.importance(model, [path], examples=Examples(task, processors.get(model)))[path]
    for j in (0, 7, 31):
        wanted = importance_by_differences(model, path, [j], task)
        assert float(found[j]) == pytest.approx(wanted, rel=0.02, abs=2e-5)


def masked(before, after):
    """The model before with the columns of `down` at zero whose neurons the model after lacks; and how many are left."""
    model, left = copy.deepcopy(before), set()
    for block in anatomy.feed_forwards(before):
        site = block.into[0]
        rows = anatomy.weight(before.get_submodule(site.path)).detach()
        rows = rows if site.rows is None else rows[list(site.rows)]
        small = next(b.into[0] for b in anatomy.feed_forwards(after) if b.down.path == block.down.path)
        kept = anatomy.weight(after.get_submodule(small.path)).detach()
        kept = kept if small.rows is None else kept[list(small.rows)]
        stays = (rows[:, None] == kept[None]).all(-1).any(1)
        left.add(int(stays.sum()))
        with torch.no_grad():
            anatomy.weight(model.get_submodule(block.down.path))[:, ~stays] = 0
    return model, left


@pytest.mark.parametrize("family", [f for f in tiny.ALL if f not in tiny.AUDIO])
def test_the_small_model_is_the_masked_one_and_a_plain_one_of_its_family(family, tmp_path):
    before = work.ready(family)
    after = phases.shrink(copy.deepcopy(before), FFN(keep=0.4, samples=8), work.task(family))
    whole, left = masked(before, after)
    assert left == {12}  # ⌊0.4 · 32⌋
    torch.testing.assert_close(steps.logits(after, family), steps.logits(whole, family), rtol=1e-4, atol=1e-5)
    phases.save_model(after, tmp_path)
    assert phases.loads_with(tmp_path) == "transformers" and "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(steps.logits(type(after).from_pretrained(tmp_path).eval(), family), steps.logits(after, family))
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in (("before", before), ("after", after))}
    per_neuron = sum(s.in_features + (getattr(before.get_submodule(s.path), "bias", None) is not None) for b in anatomy.feed_forwards(before) for s in b.into)
    per_neuron += sum(b.down.out_features for b in anatomy.feed_forwards(before))
    assert sizes["before"] - sizes["after"] == 20 * per_neuron


def test_the_highest_stay():
    model, task = work.ready("bert"), work.task("bert")
    block = anatomy.feed_forwards(model)[0]
    scores = FFN().importance(model, [block.down.path], examples=Examples(task, processors.get(model)))[block.down.path]
    rows = model.get_submodule(block.into[0].path).weight.detach().clone()
    phases.shrink(model, FFN(keep=3), task)
    assert torch.equal(model.get_submodule(block.into[0].path).weight, rows[scores.topk(3).indices.sort().values])


def test_it_composes_with_other_cuts(tmp_path):
    model, task = work.ready("bert"), work.task("bert")
    for text in ("ffn(keep=8)", "keep_layers", "vocabulary", "magnitude", "int8"):
        phases.shrink(model, parse(text).phases[0][0], task)
    phases.save_model(model, tmp_path)
    found, again = (training.predict(m, task, rows=task.test) for m in (model, inference.open_model(tmp_path, task)))
    assert found == again


def test_mistakes_are_refused():
    for wrong in (0.0, 1.5, 0):
        with pytest.raises(RecipeError, match="keep is a share"):
            FFN(keep=wrong)
    with pytest.raises(Incompatible, match="say how many stay"):
        parse("ffn | full | ffn(keep=0.25)").check()
    parse("ffn | full | ffn(keep=8)").check()
    model = work.ready("bert")
    surgery.attach(model, [LoRA(targets="ffn")])
    with pytest.raises(Incompatible, match="merge it first"):
        phases.shrink(model, FFN(), work.task("bert"))
