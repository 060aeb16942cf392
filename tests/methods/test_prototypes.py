from __future__ import annotations

import dataclasses

import pytest
import steps
import tiny
import torch
import work

import paretune
from paretune import phases, seams, surgery, training
from paretune.errors import DataError, Incompatible
from paretune.methods.adapters.head import Head
from paretune.methods.readouts.prototypes import Prototypes
from paretune.readouts import heads
from paretune.tasks import Rows
from paretune.tasks.kinds.regression import Regression


def fitted(family="bert", **knobs):
    model, task = work.ready(family), work.task(family)
    phases.shrink(model, Prototypes(**knobs), task)
    return model, task


def logits(model, task, rows):
    return torch.stack(training.read(model, task, rows=rows, answers=lambda _, outputs: list(outputs.logits)))


def pooled(family, task, rows):
    """Mean of the plain model's last hidden states over the real tokens, (N, D): one row at a time, by hand."""
    model, found = work.ready(family), []
    for encoding in training.encode(task, rows, model=model):
        batch = {k: v for k, v in task.kind.collate([encoding], surgery.state(model).processor).items() if k != "labels"}
        with torch.no_grad():
            found.append(model.base_model(**batch).last_hidden_state[0].mean(0))
    return torch.stack(found)


def test_the_nearest_class_mean_answers():
    model, task = fitted()
    z, x = pooled("bert", task, task.train), pooled("bert", task, task.test)
    labels = [row["label"] for row in task.train]
    c = torch.stack([z[[y == label for y in labels]].mean(0) for label in task.labels])  # (C, D)
    wanted = (-torch.cdist(x, c).square()).softmax(-1)
    found = torch.tensor(training.predict(model, task, rows=task.test))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_distances_hold_in_every_family(family):
    """Up to what all classes share, logits are −|z − c|²: differences between the means' own logits are distances between the means."""
    task = work.task(family)
    one_each = dataclasses.replace(task, train=Rows([next(r for r in task.train if r["label"] == label) for label in task.labels]))
    model = phases.shrink(work.ready(family), Prototypes(), one_each)
    found = logits(model, one_each, one_each.train)  # row k is the prototype of class k itself
    squared = found.diagonal()[:, None] - found  # |c_j − c_k|²
    assert (squared >= -1e-4).all()
    torch.testing.assert_close(squared, squared.T, rtol=1e-3, atol=1e-4)
    assert surgery.seams.readout(model) is not None or family in ("t5", "vit")  # their own head holds it all


def test_zero_shot_from_names_and_descriptions():
    model, task = fitted(source="labels")
    names = pooled("bert", task, [{"text": label} for label in task.labels])
    x = pooled("bert", task, task.test)
    c = torch.nn.functional.normalize(names, dim=-1)
    torch.testing.assert_close(logits(model, task, task.test), 2 * x @ c.T - 1, rtol=1e-4, atol=1e-4)
    described, _ = fitted(source="labels", descriptions=("bad", "a fine film", "good"))
    found = logits(described, task, task.test)
    torch.testing.assert_close(found[:, [0, 2]], logits(model, task, task.test)[:, [0, 2]])
    assert not torch.allclose(found[:, 1], logits(model, task, task.test)[:, 1])


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_an_added_class_leaves_the_others_alone(family, tmp_path):
    model, task = fitted(family)
    before = logits(model, task, task.test)
    texts, path = [row["text"] for row in task.train[:3]], heads.last_map(model)
    vectors = model.get_submodule(path).weight.detach().clone()
    with seams.bypassed(model, path):
        c, x = logits(model, task, task.train[:3]).mean(0), logits(model, task, task.test)
    readout = Prototypes() if family == "t5" else None  # a plain model does not say how its vectors are made
    assert paretune.add_class(model, "odd", texts=texts, readout=readout) is model
    after = logits(model, task, task.test)
    assert torch.equal(model.get_submodule(path).weight[:3], vectors)  # bit for bit; a wider product may round otherwise
    torch.testing.assert_close(after, torch.cat([before, (2 * x @ c - c @ c)[:, None]], 1), rtol=1e-4, atol=1e-4)
    assert model.config.id2label[3] == "odd" and model.config.num_labels == 4
    phases.save_model(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    batch = tiny.inputs(family)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    with pytest.raises(DataError, match="'odd' already"):
        paretune.add_class(model, "odd", texts=texts, readout=readout)
    with pytest.raises(DataError, match="a list of one or more texts"):
        paretune.add_class(model, "new", texts="one text", readout=readout)


def test_what_it_refuses():
    task = work.text_task()
    with pytest.raises(Incompatible, match="no task head"):
        phases.shrink(steps.model("gpt2", "causal"), Prototypes(), task)
    with pytest.raises(Incompatible, match="regression task"):
        phases.shrink(work.ready("bert"), Prototypes(), dataclasses.replace(task, kind=Regression()))
    with pytest.raises(Incompatible, match="descriptions go with"):
        fitted(descriptions=("bad",))
    with pytest.raises(Incompatible, match="not one text each"):
        fitted("vit", source="labels")
    with pytest.raises(DataError, match="'fine' has no training row"):
        phases.shrink(work.ready("bert"), Prototypes(), dataclasses.replace(task, train=Rows(r for r in task.train if r["label"] != "fine")))
    model = work.ready("bert")
    surgery.attach(model, [Head(features="concat_last_four")])
    with pytest.raises(Incompatible, match="wider features"):
        phases.shrink(model, Prototypes(), task)
    with pytest.raises(Incompatible, match="no readout with class vectors"):
        paretune.add_class(work.ready("bert"), "odd", texts=["a"])
