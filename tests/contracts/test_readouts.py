"""The promises of every readout, over the whole registry and all tiny families."""

from __future__ import annotations

import copy

import pytest
import steps
import tiny
import torch
import work

import paretune
from paretune import anatomy, flow, inference, phases, processors, registry, runs, seams, surgery, training
from paretune.errors import Incompatible
from paretune.methods.adapters.lora import LoRA
from paretune.methods.readouts.choices import Choices
from paretune.readouts.heads import ClassVectors
from paretune.recipe import parse
from paretune.roles import Readout
from paretune.seams import CHILD

READOUTS = [method for name in registry.names("readout") for method in (registry.get(name)(),)]
ALL = [(method, family) for method in READOUTS for family in tiny.FAMILIES]


def reason(method: Readout, family: str) -> str:
    try:
        work.read_out(method, family)
    except Incompatible as error:
        return str(error)
    return ""


REFUSED = [case for case in ALL if reason(*case)]
every_case = pytest.mark.parametrize("method, family", [pytest.param(m, f, id=f"{m}-{f}") for m, f in ALL if (m, f) not in REFUSED])


def answers(model, family):
    return torch.tensor(training.predict(model, work.task(family), rows=work.task(family).test))


@pytest.mark.parametrize("method, family", REFUSED, ids=[f"{m}-{f}" for m, f in REFUSED])
def test_a_refusal_gives_its_reason_and_changes_nothing(method, family):
    model = work.to_read(method, family)
    before = steps.tensors(model)
    with pytest.raises(Incompatible) as error:
        phases.shrink(model, work.short(method), work.task(family))
    assert len(str(error.value).split()) > 5
    assert steps.same(before, steps.tensors(model)) and not list(surgery.seams_of(model))


@every_case
def test_forward_passes_alone_fit_it(method, family):
    plain, model = work.to_read(method, family), work.read_out(method, family)
    head = tuple(f"{path}." for path in anatomy.head(plain))
    before, after = (
        {n: t for n, t in steps.tensors(m).items() if CHILD not in n.split(".") and not (head and n.startswith(head))} for m in (plain, model)
    )
    assert steps.same(before, after) and type(model) is not type(None) and isinstance(model, type(plain))
    assert all(p.grad is None for p in model.parameters())
    found = answers(model, family)
    assert found.shape == (6, 3) and found.isfinite().all()
    torch.testing.assert_close(found.sum(-1), torch.ones(6))


@every_case
def test_saved_and_loaded_it_gives_the_same(method, family, tmp_path):
    model = work.read_out(method, family)
    phases.save_model(model, tmp_path)
    loaded = copy.deepcopy(inference.open_model(tmp_path, work.task(family)))  # a file's tensors lie at any address, by which some kernels round otherwise
    assert torch.equal(answers(loaded, family), answers(model, family))
    assert steps.same(steps.tensors(loaded), steps.tensors(model)) and seams.readout(loaded) == seams.readout(model)
    assert torch.equal(answers(copy.deepcopy(model), family), answers(model, family))


@every_case
def test_fitted_again_it_is_the_same(method, family):
    model = work.read_out(method, family)
    wanted, before = answers(model, family), steps.tensors(model)
    phases.shrink(model, work.short(method), work.task(family))
    assert torch.equal(answers(model, family), wanted) and steps.same(steps.tensors(model), before)


@every_case
def test_adapters_come_and_go_under_it(method, family):
    model = work.read_out(method, family)
    wanted = answers(model, family)
    torch.manual_seed(0)
    surgery.attach(model, [LoRA(r=2)], name="later", head=False)
    steps.disturb(model)
    assert not torch.equal(answers(model, family), wanted)
    surgery.switch(model)
    assert torch.equal(answers(model, family), wanted)
    surgery.remove(model, "later")
    assert torch.equal(answers(model, family), wanted)
    surgery.attach(model, [LoRA(r=2)], name="learned", on_top=True)
    start = answers(model, family)
    fit = work.fitted(model, work.task(family), epochs=1.0, warmup=0.0)
    assert fit.steps == 6 and not torch.equal(answers(model, family), start)


@pytest.mark.parametrize("method", [m for m in READOUTS if not m.speaks], ids=str)
def test_it_reads_what_an_earlier_phase_learned(method):
    model = work.ready("bert")
    surgery.attach(model, [LoRA(r=2)])
    steps.disturb(model, std=0.5)
    surgery.freeze(model)
    surgery.settle(model)
    phases.shrink(model, method, work.text_task())
    assert not torch.allclose(answers(model, "bert"), answers(work.read_out(method, "bert"), "bert"))
    assert surgery.state(model).active == ("default",)


@pytest.mark.parametrize("method", [m for m in READOUTS if isinstance(m, ClassVectors)], ids=str)
def test_a_class_is_added_without_touching_the_others(method):
    model = work.read_out(method, "roberta")
    before = steps.tensors(model)
    paretune.add_class(model, "odd", texts=["a dull scene", "the plot"])
    for name, tensor in steps.tensors(model).items():
        assert torch.equal(tensor[: len(before[name])] if tensor.dim() else tensor, before[name]), name
    assert list(model.config.id2label) == [0, 1, 2, 3] and model.config.id2label[3] == "odd"


@pytest.mark.parametrize("method", READOUTS, ids=str)
@pytest.mark.parametrize("later", ["int8", "cast", "keep_layers"])
def test_transforms_follow_it(method, later, tmp_path):
    family = "llama"
    model = phases.shrink(work.read_out(method, family), registry.get(later)(), work.task(family))
    found = answers(model, family)
    phases.save_model(model, tmp_path)
    again = copy.deepcopy(inference.open_model(tmp_path, work.task(family)))  # a file's tensors lie where they lie in it, and some processors then sum otherwise
    assert found.isfinite().all() and torch.equal(answers(again, family), found)


@pytest.mark.parametrize("method", READOUTS, ids=str)
def test_a_run_counts_it_as_training_and_answers_new_rows(method, tmp_path):
    backbone, data = tmp_path / "backbone", tmp_path / "rows.csv"
    made = tiny.model("gpt2", "causal")
    processors.put(made, tiny.tokenizer())
    phases.save_model(made, backbone)
    data.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in work.text_task(train=60).train))
    given = paretune.task(data)
    plan = flow.plan_frontier(given, backbone=str(backbone), recipes=[str(work.short(method))], out=tmp_path / "out")[0][1]
    run = runs.make(plan, str(work.short(method)))
    (phase,) = run.record["phases"]
    assert phase["role"] == "readout" and phase["examples"] == getattr(work.short(method), "shots", 0 if method.speaks else len(given.train))
    assert phase["train_s"] > 0 and run.cost.train_s == phase["train_s"] and run.cost.trainable_parameters == 0
    assert (phase["train_flops"] > 0) == (phase["examples"] > 0)
    (answer,) = run.predict(["the film was good"])
    assert answer["label"] in given.labels and run.record["loads_with"] == "transformers+paretune"
    exported = flow.export(run, tmp_path / "exported")
    assert (exported / "config.json").is_file()
    with pytest.raises(Incompatible, match="export with --to hf"):
        flow.export(run, tmp_path / "peft", to="peft")


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("name", registry.names("adapter"))
def test_every_adapter_is_ranked_as_it_speaks(name, family):
    """A prompt's keys and values, kept and repeated for its answers, give what one plain call per answer gives: with every adapter at work."""
    method = Choices(words=("so bad", "fine", "a good film"), template="the film and the book and the story: {text}\n{label}")
    model = phases.shrink(work.to_read(method, family), method, work.text_task())
    torch.manual_seed(0)
    try:
        surgery.attach(model, [registry.get(name)()], name="later")
    except Incompatible:
        return
    steps.disturb(model)
    model.eval()
    task, readout = work.text_task(), seams.readout(model).ranked(model)
    encodings = training.encode(task, task.test[:2], model=model)  # of different lengths
    prompt = [*readout.before.tolist(), *encodings[0]["input_ids"], *readout.after.tolist()]
    with torch.no_grad():
        found = model(**task.kind.inputs(task.kind.collate(encodings, processors.get(model))))
        for k, answer in enumerate(readout.answers.tolist()):
            answer = [i for i in answer if i >= 0]
            if family == "t5":
                given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[*readout.start.tolist(), *answer[:-1]]])}
            else:
                given = {"input_ids": torch.tensor([prompt + answer[:-1]]), "use_cache": False}
            log_p = model(**given).logits[0, -len(answer) :].log_softmax(-1)
            torch.testing.assert_close(found.log_probs[0, k, : len(answer)], log_p[range(len(answer)), answer], rtol=1e-4, atol=1e-4)


def test_a_recipe_has_at_most_one():
    with pytest.raises(Incompatible, match="at most one readout"):
        parse("imprint | full | prototypes")
    with pytest.raises(Incompatible, match="stands alone"):
        parse("imprint + full")
