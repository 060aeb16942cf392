from __future__ import annotations

import copy

import pytest
import steps
import tiny
import torch
import work
from torch.nn import functional as F

from paretune import anatomy, flow, phases, surgery
from paretune.cli import show
from paretune.errors import Incompatible
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.lora import LoRA
from paretune.methods.adapters.surgical import FACT, Surgical, blocks, ranking
from paretune.options import Options, Training
from paretune.reports import blocks as picture
from paretune.roles import Examples
from paretune.store import Run


def examples(family="bert"):
    return Examples(work.task(family), work.processor(family))


@pytest.mark.parametrize(
    "family, names",
    [("bert", ["embeddings", "0", "1"]), ("gpt2", ["embeddings", "0", "1", "rest"]), ("vit", ["embeddings", "0", "1", "rest"]),
     ("t5", ["embeddings", "encoder.0", "encoder.1", "rest", "decoder.0", "decoder.1"])],
)  # fmt: skip
def test_the_blocks_are_all_of_the_backbone_once(family, names):
    model = work.ready(family)
    there, in_head = blocks(model), surgery.in_head(model)
    assert set(there) == set(names)
    assert sorted(n for block in there.values() for n in block) == sorted(n for n, _ in model.named_parameters() if not in_head(n))


def test_named_blocks_learn_and_nothing_else():
    model = work.ready("bert")
    surgery.attach(model, [Surgical(blocks="embeddings, 1")], head=False)
    assert {n.split(".layer.0.")[0].split(".")[1] for n in steps.learning(model)} == {"embeddings", "encoder"}
    assert not [n for n in steps.learning(model) if ".layer.0." in n] and [n for n in steps.learning(model) if ".layer.1." in n]


def test_the_ranking_is_gradient_over_weight_norm():
    """By hand, over all 24 examples at once."""
    model, task = work.ready("bert"), work.task("bert")
    batch = task.kind.collate(task.encode(task.train, work.processor("bert"), config=model.config), work.processor("bert"))
    F.cross_entropy(model(**task.kind.inputs(batch)).logits, batch["labels"]).backward()
    found = ranking(model, examples(), count=64)
    assert list(found.values()) == sorted(found.values(), reverse=True) and set(found) == {"embeddings", "0", "1"}
    for block, names in blocks(model).items():
        gradient = torch.cat([model.get_parameter(n).grad.flatten() for n in names])
        weight = torch.cat([model.get_parameter(n).detach().flatten() for n in names])
        assert found[block] == pytest.approx(float(gradient.norm() / weight.norm()), rel=1e-4)


def test_ranking_leaves_the_model_as_it_was():
    model = work.ready("bert")
    surgery.attach(model, [LoRA(r=2)])
    model.train()
    before, learning = steps.tensors(model), list(steps.learning(model))
    ranking(model, examples(), count=8)
    assert steps.same(before, steps.tensors(model)) and list(steps.learning(model)) == learning and model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture(scope="module")
def trained():
    """A tiny BERT that has learned the task."""
    model = work.ready("bert")
    torch.manual_seed(0)
    surgery.attach(model, [Full()])
    fit = work.fitted(model, work.text_task(train=48), epochs=15.0, lr=5e-3, patience=15)
    assert fit.epochs[-1]["loss"] < 0.5 * fit.epochs[0]["loss"]
    surgery.settle(model)
    return model


@pytest.mark.parametrize("block", ["embeddings", "0", "1"])
def test_auto_finds_the_one_block_that_was_shrunk(block, trained):
    """Where one block's weights are a tenth of what they were, nearly the same gradients pull at a tenth of the weight."""
    model = copy.deepcopy(trained)
    with torch.no_grad():
        for name in blocks(model)[block]:
            model.get_parameter(name).mul_(0.1)
    chosen, facts = Surgical().chosen(model, examples())
    assert chosen == Surgical(blocks=block) and list(facts)[0] == FACT + block


def test_a_run_records_what_was_chosen_and_why(tmp_path):
    tiny.model("bert", "base").save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    plan = flow._plan(flow.as_recipe("surgical(count=2)"), work.text_task(), str(tmp_path / "bert"), tmp_path / "out", 0, Options(Training(epochs=1)))
    (record,) = phases.walk(plan)
    ranked = [name.removeprefix(FACT) for name in record["facts"]]
    assert record["spelling"].startswith("surgical(count=2) + ")
    assert record["decided"] == f'surgical(blocks="{ranked[0]} {ranked[1]}", count=2)' and record["trainable_parameters"] > 0
    plain = {name: value for name, value in record.items() if name not in ("decided", "facts")}
    (tmp_path / "ranked").mkdir()
    drawn = show._rankings([Run(tmp_path / "ranked", {"phases": [record]}), Run(tmp_path / "plain", {"phases": [plain]})])
    assert drawn == [tmp_path / "ranked" / "blocks.png"] and drawn[0].read_bytes().startswith(b"\x89PNG")


def test_what_the_data_decide_is_decided_before_attaching():
    model, task = work.ready("bert"), work.text_task()
    (adapter,), record = phases.decided(model, [Surgical()], task=task)
    assert record["decided"] == repr(adapter) and adapter.blocks in blocks(model)
    assert max(record["facts"], key=record["facts"].get) == FACT + adapter.blocks
    assert phases.decided(model, [adapter, LoRA()], task=task) == ([adapter, LoRA()], {})
    flow.adapt(model, "surgical(count=2)", task=task)
    ((attached,),) = surgery.state(model).adapters.values()
    assert len(attached.blocks.split()) == 2


def test_the_picture_has_a_bar_for_each_block(tmp_path):
    phase = {"spelling": "surgical", "decided": 'surgical(blocks="1")', "facts": {FACT + "1": 0.5, FACT + "rest": 0.1, FACT + "embeddings": 0.3, FACT + "10": 0.2}}
    (axes,) = picture.draw(phase).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embeddings", "1", "10", "rest"]
    assert [bar.get_width() for bar in axes.patches] == [0.3, 0.5, 0.2, 0.1]
    colors = [bar.get_facecolor() for bar in axes.patches]
    assert colors[1] != colors[0] == colors[2] == colors[3]
    run = Run(tmp_path, {"phases": [{"facts": {}}, phase]})
    assert picture.save(run, tmp_path / "blocks.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "method, words",
    [(Surgical(), "is decided on examples"), (Surgical(blocks="2"), "block '2' is not known"), (Surgical(blocks=" "), "there are embeddings, 0 and 1")],
)
def test_what_cannot_be_chosen(method, words):
    with pytest.raises(Incompatible, match=words):
        surgery.attach(work.ready("bert"), [method])


def test_more_blocks_than_there_are():
    with pytest.raises(Incompatible, match="count is 1 to 3"):
        Surgical(count=4).chosen(work.ready("bert"), examples())


def test_a_layer_is_what_the_anatomy_calls_one():
    model = work.ready("gpt2")
    for layer in anatomy.layers(model):
        assert blocks(model)[str(layer.index)] == [n for n, _ in model.named_parameters() if n.startswith(f"{layer.path}.")]
