"""Teachers in recipes: `@k` is the model after phase k, a folder decides with its weights, and a teacher without an answer is refused."""

from __future__ import annotations

import csv
import shutil

import pytest
import steps
import tiny

from paretune import flow, inference, options, phases, runs, tasks, teachers
from paretune.errors import BackboneError, Incompatible
from paretune.recipe import parse
from paretune.roles import After

ONCE = options.Options(training=options.Training(epochs=1, batch=8))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a backbone of four layers, another with two, a language model, and texts."""
    folder = tmp_path_factory.mktemp("place")
    for name, family, kind, more in (("bert", "bert", "base", {"num_hidden_layers": 4}), ("gpt2", "gpt2", "causal", {"vocab_size": 320})):
        tiny.model(family, kind, config=more).save_pretrained(folder / name)
        (tiny.bpe_tokenizer() if family == "gpt2" else tiny.tokenizer()).save_pretrained(folder / name)
    with (folder / "films.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["text", "label"])
        rows.writerows([f"the {noun} was {word} {n}", label] for n, noun in enumerate(["film", "book", "plot"] * 5)
                       for word, label in (("good", "up"), ("bad", "down")))  # fmt: skip
    return folder


def planned(place, recipe, *, backbone="bert", out="out", labels=None):
    text = {"text": "text"} | ({"label": "label"} if (backbone == "bert" if labels is None else labels) else {})
    return flow._plan(flow.as_recipe(recipe), tasks.task(str(place / "films.csv"), **text), str(place / backbone), place / out, 0, ONCE)


@pytest.mark.parametrize("name, backbone, layers", [
    ('full | keep_layers("0,2") | full + distill(teacher=@1) | int8', "bert", 2), ("distilbert", "bert", 2), ("tinybert", "bert", 2), ("thin", "bert", 4),
    ("minilm_distill", "bert", 2), ("distilgpt2", "gpt2", 1),
])  # fmt: skip
def test_recipes_that_distill_run_to_the_end(name, backbone, layers, place):
    plan = planned(place, name, backbone=backbone)
    run = runs.make(plan, name)
    model = inference.open_model(run.folder / "model", inference.task_of(run))
    assert model.config.num_hidden_layers == layers
    assert not list((place / "out" / "phases").glob("*.work")), "the teacher's outputs go with the phase"


def test_a_numbered_teacher_is_the_model_after_that_phase(place, monkeypatch):
    seen = {}
    opened = teachers.opened
    monkeypatch.setattr(teachers, "opened", lambda source, loop: seen.setdefault(source, opened(source, loop)))
    plan = planned(place, "full | keep_layers | full + distill(teacher=@1) | full + distill(teacher=@0, logits=0.0, hidden=1.0)", out="numbered")
    runs.make(plan, "numbered")
    after = inference.open_model(plan.folder(1) / "model", plan.task)
    assert steps.same(steps.tensors(seen[After(1)]), steps.tensors(after))
    assert steps.same(steps.tensors(seen[After(0)]), steps.tensors(phases.first_model(plan)))


@pytest.mark.parametrize("teacher, named", [("@0", "@1"), ("@1", "@2")])
def test_a_number_stays_with_its_phase_where_choices_is_put_in_front(teacher, named, place, monkeypatch):
    seen = {}
    opened = teachers.opened
    monkeypatch.setattr(teachers, "opened", lambda source, loop: seen.setdefault(source, opened(source, loop)))
    plan = planned(place, f"full | full + distill(teacher={teacher}) + unlikelihood", backbone="gpt2", out=f"ranked{named}", labels=True)
    assert str(plan.recipe).startswith("choices | full + ") and f"distill(teacher={named})" in str(plan.recipe)
    runs.make(plan, "ranked")
    (model,) = seen.values()
    assert steps.same(steps.tensors(model), steps.tensors(inference.open_model(plan.folder(int(named[1:])) / "model", plan.task)))


def test_a_folder_teaches_and_its_weights_are_a_part_of_the_name(place, tmp_path):
    teacher = runs.make(planned(place, "full"), "full")
    copied = tmp_path / "teacher"
    shutil.copytree(teacher.folder, copied)
    recipe = f'full + distill(teacher="{copied}")'
    plan = planned(place, recipe, out="folder")
    before, plain = plan.id, planned(place, "full", out="folder").id
    assert runs.make(plan, recipe).id == before
    other = tiny.model("bert", labels=2, seed=5)
    other.config.id2label = {0: "down", 1: "up"}
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", copied / "model" / "model.safetensors")
    teachers.backbones.find.cache_clear()
    assert plan.id != before and planned(place, "full", out="folder").id == plain


def test_a_teacher_without_an_answer_is_refused_before_anything_runs(place):
    for recipe in ("full + distill", "keep_layers | full + distill(teacher=@1)", f'full + distill(teacher="{place / "bert"}")'):
        with pytest.raises(Incompatible, match="no trained head.*its logits say nothing"):
            planned(place, recipe)
    with pytest.raises(BackboneError, match="nowhere"):
        planned(place, 'full + distill(teacher="nowhere")')
    with pytest.raises(Incompatible, match="can name @0 to @0, not @1"):
        parse("full + distill(teacher=@1)")
    assert planned(place, "full + distill(logits=0.0, hidden=1.0)")
