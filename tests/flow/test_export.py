"""Exports: the model of a run for transformers and for PEFT, and what each refuses."""

from __future__ import annotations

import copy
import csv
import filecmp
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from paretune import backbones, exports, flow, inference, options, peft_format, runs, store, tasks
from paretune.errors import Incompatible, StoreError

ONCE = options.Options(training=options.Training(epochs=1, batch=8))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two backbones, `bert` and `gpt2`, and a task of 60 short texts."""
    folder = tmp_path_factory.mktemp("place")
    for family in ("bert", "gpt2"):
        tiny.model(family, "base").save_pretrained(folder / family)
        tiny.tokenizer().save_pretrained(folder / family)
    with (folder / "films.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["text", "label"])
        rows.writerows([f"the {noun} was {word} {n}", label] for n, noun in enumerate(["film", "book", "plot", "scene", "actor"] * 6)
                       for word, label in (("good", "up"), ("bad", "down")))  # fmt: skip
    return folder


def finished(place: Path, recipe: str, family: str = "bert") -> store.Run:
    """A run that trained, and measured nothing; the same for the same recipe."""
    task = tasks.task(str(place / "films.csv"), text="text", label="label")
    plan = flow._plan(flow.as_recipe(recipe), task, str(place / family), place / "out", 0, ONCE)
    return runs.make(plan, recipe)


def test_hf_is_the_runs_model_and_a_card(place: Path, tmp_path: Path) -> None:
    run = finished(place, "lora(r=2)")
    made = flow.export(run.folder, tmp_path / "export")
    names = [p.name for p in (run.folder / "model").iterdir()]
    assert filecmp.cmpfiles(run.folder / "model", made, names, shallow=False) == (names, [], [])
    assert {p.name for p in made.iterdir()} - set(names) == {"README.md"}
    assert "lora(r=2)" in (made / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks transformers 5.23 by the old name
@pytest.mark.parametrize("family, recipe", [
    ("bert", "lora(r=2)"), ("bert", 'head(pooling="model") | ia3'),
    ("gpt2", 'lora(r=2, targets="query value") | lora(r=3, rank_stabilized=True)'), ("gpt2", "ia3"),
    ("bert", "lora(r=2) | bitfit"), ("bert", 'prompt(length=3, place="before")'), ("gpt2", 'prefix(length=3, positions="shifted")'),
])  # fmt: skip
def test_peft_answers_as_the_run_does(family: str, recipe: str, place: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run = finished(place, recipe, family)
    made = exports.write(run, tmp_path / "export", to="peft")
    assert {p.name for p in made.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    with backbones.quiet():
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(place / family, num_labels=2, pad_token_id=tiny.PAD)
    theirs = peft.PeftModel.from_pretrained(plain, made).eval()
    assert theirs.peft_config["default"].base_model_name_or_path == str(place / family)
    copies = ("original_module", "modules_to_save")  # with bias="all" PEFT repeats the head's biases
    expected = {n for n in peft.get_peft_model_state_dict(theirs) if not set(copies) & set(n.split("."))}
    assert expected == set(load_file(made / "adapter_model.safetensors"))
    ours = inference.open_model(run.folder / "model", inference.task_of(run))
    with torch.no_grad():
        batch = tiny.inputs(family, batch=1)
        assert torch.allclose(theirs(**batch).logits, ours(**batch).logits, rtol=0, atol=6e-6)


@pytest.mark.parametrize("recipe, word", [
    ("lora(r=2) | merge", "merge is no adapter"), ("full | cast", "cast.* is no adapter"),
])  # fmt: skip
def test_peft_refuses_by_name(recipe: str, word: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match=f"{word}.*--to hf"):
        exports.write(finished(place, recipe), tmp_path / "export", to="peft")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["lora(r=2) | ia3", "full", "head", "adapter(bottleneck=4)", "prompt(length=3)"])
def test_what_peft_has_not_is_read_by_us(recipe: str, place: Path, tmp_path: Path) -> None:
    run = finished(place, recipe)
    made = exports.write(run, tmp_path / "export", to="peft")
    task = inference.task_of(run)
    plain = backbones.load(backbones.find(str(place / "bert")), task, seed=0)
    models = inference.open_model(run.folder / "model", task), peft_format.read_peft(copy.deepcopy(plain), made), plain
    with torch.no_grad():
        wanted, read, before = (m.eval()(**tiny.inputs("bert")).logits for m in models)
    assert torch.equal(read, wanted) and not torch.equal(before, wanted)


def test_peft_needs_the_backbone_unchanged(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(place, "lora(r=2)")
    copied = tmp_path / "run"
    store.share(run.folder / "model", copied / "model")
    name = "bert.embeddings.word_embeddings.weight"
    tensors: dict[str, Any] = load_file(copied / "model" / "model.safetensors")
    tensors[name] = tensors[name] + 1e-3
    (copied / "model" / "model.safetensors").unlink()
    save_file(tensors, copied / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Incompatible, match=f"changed the backbone's own {name}"):
        exports.write(store.Run(copied, run.record), tmp_path / "export", to="peft")
    with pytest.raises(StoreError, match="its weights are not those"):
        exports.write(store.Run(run.folder, {**run.record, "weights_sha256": "0"}), tmp_path / "export", to="peft")


def test_a_packaged_backbone_is_named_as_on_the_hub() -> None:
    packaged = backbones.Backbone("minilm", "somewhere/in/a/package", "packaged", "sha")
    assert exports._origin(packaged) == {"base": "sentence-transformers/all-MiniLM-L6-v2"}
    assert exports._origin(backbones.Backbone("who/what", "cache", "abc", "sha")) == {"base": "who/what", "revision": "abc"}


def test_nothing_is_overwritten(place: Path, tmp_path: Path) -> None:
    run = finished(place, "lora(r=2)")
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(StoreError, match="holds something already"):
        exports.write(run, tmp_path)
    with pytest.raises(StoreError, match="holds something already"):
        exports.write(run, tmp_path / "mine.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_formats_are_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match=r"'pefd' is not known \(did you mean peft\?\); there are hf, peft and onnx"):
        exports.write(finished(place, "lora(r=2)"), tmp_path / "export", to="pefd")
    with pytest.raises(StoreError, match="holds no model"):
        exports.write(store.Run(tmp_path, {}), tmp_path / "export")
