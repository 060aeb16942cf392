"""Exports: the model of a run for transformers and for PEFT, and what each refuses."""

from __future__ import annotations

import copy
import csv
import filecmp
import re
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
import young
from safetensors.torch import load_file, save_file

from paretune import backbones, bitsandbytes_files, exports, flow, inference, options, parity, peft_format, runs, store, tasks
from paretune.errors import DataError, Incompatible, StoreError

ONCE = options.Options(training=options.Training(epochs=1, batch=8))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two backbones, `bert` and `gpt2`, and a task of 60 short texts."""
    folder = tmp_path_factory.mktemp("place")
    for family in ("bert", "gpt2"):
        tiny.model(family, "base").save_pretrained(folder / family)
        tiny.tokenizer().save_pretrained(folder / family)
    for family, sizes in (("bert", {"hidden_size": 64, "intermediate_size": 128}), ("gpt2", {"n_embd": 64, "n_inner": 128})):
        tiny.model(family, "base", config=sizes).save_pretrained(folder / f"{family}-64")  # as wide as bitsandbytes' kernel in bf16 asks
        tiny.tokenizer().save_pretrained(folder / f"{family}-64")
    with (folder / "films.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["text", "label", "score"])
        rows.writerows([f"the {noun} was {word} {n}", label, n / 7] for n, noun in enumerate(["film", "book", "plot", "scene", "actor"] * 6)
                       for word, label in (("good", "up"), ("bad", "down")))  # fmt: skip
    return folder


def finished(place: Path, recipe: str, family: str = "bert") -> store.Run:
    """A run that trained, and measured nothing; the same for the same recipe."""
    task = tasks.task(str(place / "films.csv"), text="text", label="label")
    plan = flow._plan(flow.as_recipe(recipe), task, str(place / family), place / "out", 0, ONCE)
    return runs.make(plan, recipe)


@pytest.mark.parametrize("recipe, keep", [("lora(r=2)", True), ("full", False), ("lora(r=2) | merge", False)])
def test_hf_is_the_runs_model_and_a_card(recipe: str, keep: bool, place: Path, tmp_path: Path) -> None:
    run = finished(place, recipe)
    made = flow.export(run.folder, tmp_path / "export", keep_adapters=keep)
    names = [p.name for p in (run.folder / "model").iterdir()]
    assert filecmp.cmpfiles(run.folder / "model", made, names, shallow=False) == (names, [], [])
    assert {p.name for p in made.iterdir()} - set(names) == {"README.md"}
    assert f"`{recipe}`" in (made / "README.md").read_text()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family, recipe", [("bert", "lora(r=2)"), ("bert", "lora(r=2) | ia3 + bitfit"), ("gpt2", 'lora(r=2, targets="query value") | lora(r=3)'),
                                            ("bert", "dora(r=2)"), ("bert", "lora(r=2) | prototypes")])  # fmt: skip
def test_hf_merges_what_can_be_merged(family: str, recipe: str, place: Path, tmp_path: Path) -> None:
    run, said = finished(place, recipe, family), []
    before = tree(run.folder)
    made = flow.export(run, tmp_path / "export", told=said.append)
    assert tree(run.folder) == before
    tensors = load_file(made / "model.safetensors")
    assert not any("lora" in name or "ia3" in name for name in tensors) and len(said) == 1 and "merged into the weights" in said[0]
    task = inference.task_of(run)
    apart, merged = inference.open_model(run.model, task), inference.open_model(made, task)
    batch = tiny.inputs(family)
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, apart(**batch).logits, rtol=1e-4, atol=1e-5)
    text = (made / "README.md").read_text()
    assert "A folder with merged adapters. On " in text and "merged into the weights" in text
    assert ("loads with: `transformers`\n" in text) == ("prototypes" not in recipe)


def test_memory_to_merge_in_is_asked_for_first(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(place, "lora(r=2)")
    monkeypatch.setattr(store.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1e3))
    with pytest.raises(StoreError, match="MB of memory are needed"):
        exports.write(run, tmp_path / "export")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("recipe, why", [
    ("prefix(length=3)", "prefix.length=3.: left apart.*cannot be folded"), ("lora(r=2) + prefix(length=3)", "prefix.*lora.*left apart.*cannot be folded"),
    ("nf4 | lora(r=2)", "holds codes"), ("lora(r=2) | int8", "holds codes"), ("lora(r=2) | cast", "is in bfloat16, to which a sum would be rounded"),
    ("wanda(sparsity=0.5) | lora(r=2)", "wanda.* has fixed the form"), ("share_layers | lora(r=2)", "is tied to"),
])  # fmt: skip
def test_hf_leaves_apart_what_cannot_be_merged_and_says_why(recipe: str, why: str, place: Path, tmp_path: Path) -> None:
    run, said = finished(place, recipe), []
    made = flow.export(run, tmp_path / "export", told=said.append)
    names = [p.name for p in (run.folder / "model").iterdir()]
    assert filecmp.cmpfiles(run.folder / "model", made, names, shallow=False) == (names, [], [])
    assert len(said) == 1 and re.search(why, said[0]) and "left apart" in (made / "README.md").read_text()


def test_a_merge_that_drifts_or_cannot_be_compared_is_not_given_out(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = finished(place, "lora(r=2)"), []
    with monkeypatch.context() as patch:
        patch.setitem(parity.DRIFT, "merged", -1.0)
        with pytest.raises(Incompatible, match=r"folder with merged adapters answers otherwise.*off by.*export with --keep-adapters"):
            flow.export(run, tmp_path / "export")
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(inference, "compared", lambda run: (_ for _ in ()).throw(DataError("films.csv is gone")))
    made = flow.export(run, tmp_path / "export", told=said.append)
    assert said == ["adapters are left apart, for a merge is compared on test rows: films.csv is gone"]
    assert (made / "model.safetensors").read_bytes() == (run.folder / "model" / "model.safetensors").read_bytes()


def test_hf_asks_for_room_and_compares_the_copy(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(place, "lora(r=2)")
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1e3))
        with pytest.raises(StoreError, match="MB are needed and 0 MB are free"):
            exports.write(run, tmp_path / "export", keep_adapters=True)
        with pytest.raises(StoreError, match="MB are needed and 0 MB are free"):
            exports.write(run, tmp_path / "export")
    copytree = shutil.copytree

    def spoiled(source: Path, target: Path, **how: Any) -> None:
        copytree(source, target, **how)
        path = Path(target) / "model.safetensors"
        held = bytearray(path.read_bytes())
        held[-1] ^= 1
        path.write_bytes(held)

    monkeypatch.setattr(exports.shutil, "copytree", spoiled)
    with pytest.raises(StoreError, match=r"1 of \d+ files are not what .*model holds, model.safetensors first"):
        exports.write(run, tmp_path / "export", keep_adapters=True)
    assert not any(tmp_path.iterdir())


def used(folder: Path) -> str:
    """What the card's Python prints, run as it stands in a process of its own, in the folder."""
    code = re.search(r"## Use\n\n```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)[1]  # type: ignore[index]
    done = young.run(code, folder)
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("recipe, to", [
    ("full", "hf"), ("lora(r=2)", "hf"), ("full | int8", "hf"), ("lora(r=2)", "peft"), ("adapter(bottleneck=4)", "peft"), ("full | nf4", "bitsandbytes"),
])  # fmt: skip
def test_the_cards_lines_run_as_they_stand(recipe: str, to: str, place: Path, tmp_path: Path) -> None:
    run = finished(place, recipe, "bert-64" if to == "bitsandbytes" else "bert")
    made = exports.write(run, tmp_path / "export", to=to)
    answer = eval(used(made))
    assert answer == pytest.approx({name.removeprefix("p_"): p for name, p in run.predict(["a new text"])[0].items() if name.startswith("p_")},
                                   abs=1e-2 if to == "bitsandbytes" else 1e-4)  # which may multiply in bf16
    assert ("paretune" in (made / "README.md").read_text().split("```python")[1].split("```")[0]) == (recipe in ("full | int8", "adapter(bottleneck=4)"))


@pytest.mark.parametrize("recipe", ["full", "full | int8"])
def test_a_graphs_card_runs_as_it_stands(recipe: str, place: Path, tmp_path: Path) -> None:
    run = finished(place, recipe)
    (answer,), (wanted,) = eval(used(exports.write(run, tmp_path / "export", to="onnx"))), run.predict(["a new text"])
    assert answer["label"] == wanted["label"] and answer["p_up"] == pytest.approx(wanted["p_up"], abs=0.02)


@pytest.mark.parametrize("family, columns, to", [
    ("bert", {"text": "text", "label": "score"}, "hf"), ("bert", {"text": "text", "label": "label", "kind": "multilabel"}, "hf"),
    ("gpt2", {"text": "text"}, "hf"), ("gpt2", {"text": "text,label", "label": "score"}, "peft"),
    ("gpt2", {"text": "text", "label": "label", "kind": "generation"}, "peft"), ("gpt2", {"text": "text", "label": "label", "kind": "generation"}, "hf"),
])  # fmt: skip
def test_every_kind_of_task_is_asked(family: str, columns: dict[str, str], to: str, place: Path, tmp_path: Path) -> None:
    task = tasks.task(str(place / "films.csv"), **columns)
    run = runs.make(flow._plan(flow.as_recipe("lora(r=2)"), task, str(place / family), place / "out", 0, ONCE), "lora(r=2)")
    assert used(exports.write(run, tmp_path / "export", to=to)).strip()


@pytest.mark.parametrize("family, recipe", [("bert", "full | nf4"), ("bert", "lora(r=2) | merge | nf4(double_quant=False, block=32)"), ("gpt2", "full | nf4")])
def test_transformers_opens_nf4_with_bitsandbytes(family: str, recipe: str, place: Path, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    run = finished(place, recipe, f"{family}-64")
    made = exports.write(run, tmp_path / "export", to="bitsandbytes")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(made, device_map="cpu").eval()
    ours = inference.open_model(run.folder / "model", inference.task_of(run))
    maps = {path for path, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert maps == {path for path, m in ours.named_modules() if isinstance(m, bitsandbytes_files.Packed)}
    with torch.no_grad():
        batch = tiny.inputs(family, batch=1)
        torch.testing.assert_close(theirs(**batch).logits, ours(**batch).logits, rtol=0.02, atol=0.02)  # which may multiply in bf16
    text = (made / "README.md").read_text()
    assert "folder in NF4 for bitsandbytes" in text and "in fp32" in text and "transformers+bitsandbytes" in text


def test_a_measured_run_says_what_its_packed_maps_cost_in_time(place: Path, tmp_path: Path) -> None:
    run = finished(place, "full | nf4")
    (measured,) = runs.measure([run], inference.tested(run), options=ONCE, peaks=False)
    (found,) = measured.record["slowdowns"]
    assert found["format"] == "nf4" and found["shape"] == [16, 16] and found["environment"]["cpu"] == measured.record["environment"]["cpu"]
    assert [t["tokens"] for t in found["times"]] == [1, 8, 32, 128, 512] and all(t["fp32"] > 0 and t["bf16"] > 0 for t in found["times"])
    for folder in (run.folder, exports.write(measured, tmp_path / "export")):
        assert f"| 128 | {found['times'][3]['fp32']:.2g} | {found['times'][3]['bf16']:.2g} |" in (folder / "README.md").read_text()


def test_bitsandbytes_takes_nf4_alone(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe, word in (("full", "float weights"), ("full | int8", "int8"), ("nf4 | lora(r=2)", "adapters")):
        with pytest.raises(Incompatible, match=f"{word}.*nf4, or export with --to hf"):
            exports.write(finished(place, recipe), tmp_path / "export", to="bitsandbytes")
    with pytest.raises(Incompatible, match=r"blocks of 64.*has 16 inputs; take an nf4\(block=...\)"):
        exports.write(finished(place, "full | nf4"), tmp_path / "export", to="bitsandbytes")
    monkeypatch.setitem(parity.DRIFT, "nf4", -1.0)
    with pytest.raises(Incompatible, match=r"folder in NF4 for bitsandbytes answers otherwise.*off by"):
        exports.write(finished(place, "full | nf4", "bert-64"), tmp_path / "export", to="bitsandbytes")
    monkeypatch.setattr(bitsandbytes_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Incompatible, match="pip install bitsandbytes"):
        exports.write(finished(place, "full | nf4", "bert-64"), tmp_path / "export", to="bitsandbytes")
    assert not any(tmp_path.iterdir())


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
    with pytest.raises(Incompatible, match=r"'pefd' is not known \(did you mean peft\?\); there are hf, peft, onnx and bitsandbytes"):
        exports.write(finished(place, "lora(r=2)"), tmp_path / "export", to="pefd")
    with pytest.raises(StoreError, match="holds no model"):
        exports.write(store.Run(tmp_path, {}), tmp_path / "export")
