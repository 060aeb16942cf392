from __future__ import annotations

import pytest
import steps
import torch
import work
from test_prototypes import logits, pooled
from torch.nn import functional as F

import paretune
from paretune import inference, phases, surgery, training
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.head import Head
from paretune.methods.adapters.lora import LoRA
from paretune.methods.readouts.imprint import Imprint
from paretune.methods.readouts.prototypes import Prototypes
from paretune.readouts import heads


def fitted(**knobs):
    model, task = work.ready("bert"), work.text_task()
    phases.shrink(model, Imprint(**knobs), task)
    return model, task


@pytest.mark.parametrize("scale", [10.0, 2.0])
def test_scores_are_scaled_cosines_to_the_mean_directions(scale):
    model, task = fitted(scale=scale)
    z, x = (F.normalize(pooled("bert", task, rows), dim=-1) for rows in (task.train, task.test))
    labels = [row["label"] for row in task.train]
    w = torch.stack([F.normalize(z[[y == label for y in labels]].mean(0), dim=0) for label in task.labels])
    torch.testing.assert_close(logits(model, task, task.test), scale * x @ w.T, rtol=1e-4, atol=1e-4)


def test_an_added_class_leaves_the_others_alone():
    model, task = fitted()
    before, texts = logits(model, task, task.test), [row["text"] for row in task.train[:3]]
    paretune.add_class(model, "odd", texts=texts)
    w = F.normalize(F.normalize(pooled("bert", task, task.train[:3]), dim=-1).mean(0), dim=0)
    x = F.normalize(pooled("bert", task, task.test), dim=-1)
    after = logits(model, task, task.test)
    torch.testing.assert_close(after, torch.cat([before, (10 * x @ w)[:, None]], 1), rtol=1e-4, atol=1e-4)


def test_after_tuning_an_added_class_keeps_the_others_bias():
    model, task = fitted()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    before = logits(model, task, task.test)
    paretune.add_class(model, "odd", texts=["a dull plot"])
    torch.testing.assert_close(logits(model, task, task.test)[:, :3], before)
    assert model.classifier.bias.tolist() == [1.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize("method", [Full(), Head(), LoRA(r=2)], ids=str)
def test_the_class_vectors_may_be_tuned(method):
    """Training starts from the imprinted scores, and the vectors move with the rest; the pooler, which they go around, does not."""
    model, task = fitted()
    start = logits(model, task, task.test)
    vectors = model.classifier.weight.detach().clone()
    surgery.attach(model, [method], name="phase_2", on_top=True)
    torch.testing.assert_close(logits(model, task, task.test), start)
    assert not any("pooler" in n for n in steps.learning(model))
    fit = work.fitted(model, task, epochs=1.0, warmup=0.0)
    assert fit.epochs and not torch.equal(model.classifier.weight, vectors)
    surgery.switch(model)
    torch.testing.assert_close(logits(model, task, task.test), start)  # the backbone, read as before


TRAINED = {
    "imprint | full": (Imprint(), Full()),
    "imprint | lora": (Imprint(), LoRA(r=2)),
    "imprint | head": (Imprint(), Head()),
    "lora | prototypes": (LoRA(r=2), Prototypes()),
}


@pytest.mark.parametrize("ended", [False, True], ids=["just trained", "phase ended"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("recipe", TRAINED)
def test_after_training_an_added_class_leaves_the_others_scores_as_they_are(recipe, family, ended, tmp_path):
    model, task = work.ready(family), work.text_task()
    for k, method in enumerate(TRAINED[recipe]):
        if method.role == "readout":
            phases.shrink(model, method, task)
            continue
        surgery.attach(model, [method], name=f"phase_{k}", on_top=True)
        assert work.fitted(model, task, epochs=2.0, lr=2e-2, warmup=0.0).steps == 12
        if ended:
            surgery.freeze(model)
            surgery.settle(model)
    before, values, embeddings = logits(model, task, task.test), steps.tensors(model), embedded(model, task)
    untrained = phases.shrink(work.ready(family), next(m for m in TRAINED[recipe] if m.role == "readout"), task)
    assert not torch.allclose(before, logits(untrained, task, task.test), atol=1e-3), "the training moved the scores"
    paretune.add_class(model, "odd", texts=[row["text"] for row in task.train[:3]])
    for name, value in steps.tensors(model).items():
        assert torch.equal(value[: len(values[name])] if value.dim() else value, values[name]), name
    assert torch.equal(embedded(model, task), embeddings)
    after = logits(model, task, task.test)
    same = {"rtol": 1e-6, "atol": 1e-6}  # of equal factors; a wider product may round otherwise
    torch.testing.assert_close(after[:, :3], before, **same)
    phases.save_model(model, tmp_path)
    opened = inference.open_model(tmp_path, task)
    assert list(opened.config.id2label) == [0, 1, 2, 3] and opened.config.id2label[3] == "odd" and torch.equal(logits(opened, task, task.test), after)
    paretune.add_class(opened, "second", texts=["the plot"])
    torch.testing.assert_close(logits(opened, task, task.test)[:, :4], after, **same)
    if recipe.startswith("imprint") and not ended:  # what it was before the training is kept beside it, and learned the class, too
        paretune.add_class(untrained, "odd", texts=[row["text"] for row in task.train[:3]])
        for each in (model, opened):
            surgery.switch(each)
            torch.testing.assert_close(logits(each, task, task.test)[:, :4], logits(untrained, task, task.test), **same)
            surgery.switch(each, "phase_1")
            torch.testing.assert_close(logits(each, task, task.test)[:, :4], after, **same)


def embedded(model, task):
    """What the head's last map reads."""
    with surgery.seams.bypassed(model, heads.last_map(model)):
        return logits(model, task, task.test)


def test_it_stays_when_adapters_are_merged():
    model, task = fitted()
    surgery.attach(model, [LoRA(r=2)], name="phase_2", on_top=True)
    steps.disturb(model)
    wanted = logits(model, task, task.test)
    surgery.merge(model)
    torch.testing.assert_close(logits(model, task, task.test), wanted, rtol=1e-4, atol=1e-4)
    assert surgery.seams.readout(model) == Imprint() and not surgery.state(model).active
    surgery.unmerge(model)
    assert torch.equal(logits(model, task, task.test), wanted)


def test_one_adapter_per_row_is_read_by_the_same_readout():
    model, task = fitted()
    for name in ("a", "b"):
        surgery.attach(model, [LoRA(r=2)], name=name, head=False)
        steps.disturb(model, seed=ord(name))
    batch = task.kind.inputs(task.kind.collate(training.encode(task, task.test[:3], model=model), surgery.state(model).processor))
    alone = {}
    for name in ("a", "b"):
        surgery.switch(model, name)
        with torch.no_grad():
            alone[name] = model(**batch).logits
    with surgery.rows(model, ["b", "a", "b"]), torch.no_grad():
        together = model(**batch).logits
    torch.testing.assert_close(together, torch.stack([alone[n][i] for i, n in enumerate("bab")]), rtol=1e-5, atol=1e-5)
