"""A process of its own opens every shrunk model by what its `loads_with` names, runs it in `transformers.pipeline`, and answers as before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import work

from paretune import exports, flow, inference, options, phases, processors, registry, runs, tasks
from paretune.errors import Incompatible
from paretune.recipe import parse

TEXTS = ("the film was good", "a very dull story , and so bad", "fine")
LANGUAGE = "llama"
MORE = ('magnitude(pattern="2:4")', "vocabulary | share_layers | cast", "attention_heads | ffn | low_rank", "keep_layers | vocabulary | int8", "cast | int8")

_OPENED = """
import json, sys
import torch, transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

def answered(folder, language, texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = transformers.AutoModelForCausalLM if language else transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits.float().flatten().tolist() for text in texts]
    if language:
        pipe = transformers.pipeline("text-generation", model=folder, return_full_text=False)
        said = [pipe(text, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"] for text in texts]
    else:
        pipe = transformers.pipeline("text-classification", model=folder, top_k=None)
        said = [[found["score"] for found in sorted(pipe([text])[0], key=lambda found: found["label"])] for text in texts]
    return {"class": type(model).__name__, "logits": logits, "said": said}

jobs = json.load(open(sys.argv[1]))
found = {j["folder"]: answered(**j) for j in jobs["transformers"]}
assert "paretune" not in sys.modules
import paretune
found |= {j["folder"]: answered(**j) for j in jobs["transformers+paretune"]}
json.dump(found, open(sys.argv[2], "w"))
"""


def answered(model: Any, language: bool) -> dict[str, Any]:
    """What the process shall find, from the model in memory, without a pipeline."""
    tokenizer, logits, said = processors.get(model), [], []
    for text in TEXTS:
        given = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            found = model.eval()(**given).logits.float()
            ids = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, given["input_ids"].shape[1] :] if language else None
        logits.append(found.flatten().tolist())
        said.append(tokenizer.decode(ids, skip_special_tokens=True) if language else found.softmax(-1)[0].tolist())
    return {"class": type(model).__name__, "logits": logits, "said": said}


def shrunk(text: str, family: str) -> Any:
    """The family's model behind these transforms, or None where it has no place for them."""
    model, task = work.ready(family, "causal" if family == LANGUAGE else "classification"), work.generation_task() if family == LANGUAGE else work.text_task()
    try:
        return phases.shrink(model, text, task)
    except Incompatible:
        return None


def exported(place: Path) -> tuple[Path, Any]:
    """The folder that `paretune export --to hf` writes of a run, and the run's model."""
    tiny.model("bert", "base").save_pretrained(place / "bert")
    tiny.tokenizer().save_pretrained(place / "bert")
    with (place / "films.csv").open("w") as stream:
        stream.writelines(["text,label\n", *(f"{row['text']},{row['label']}\n" for row in work.text_task(train=60).train)])
    task = tasks.task(str(place / "films.csv"), text="text", label="label")
    recipe, once = parse("full | keep_layers | vocabulary | int8"), options.Options(training=options.Training(epochs=1, batch=8))
    run = runs.make(flow._plan(recipe, task, str(place / "bert"), place / "out", 0, once), str(recipe))
    return exports.write(run, place / "export", to="hf"), inference.open_model(run.folder / "model", task)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """By folder: what the models in memory answer, and what a fresh process does, which reads all of them."""
    place, models = tmp_path_factory.mktemp("saved"), {}
    for family in ("bert", LANGUAGE):
        for text in (*registry.names("transform"), *MORE):
            model = shrunk(text, family)
            if model is not None:
                phases.save_model(model, place / family / text)
                models[place / family / text] = model
    folder, model = exported(place)
    models[folder] = model
    jobs: dict[str, list[dict[str, Any]]] = {"transformers": [], "transformers+paretune": []}
    for folder in models:
        jobs[phases.loads_with(folder)].append({"folder": str(folder), "language": folder.parent.name == LANGUAGE, "texts": TEXTS})
    assert all(jobs.values())
    (place / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-c", _OPENED, str(place / "jobs.json"), str(place / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "found.json").read_text())
    name = {folder: str(folder.relative_to(place)) for folder in models}
    return {name[f]: answered(m, f.parent.name == LANGUAGE) for f, m in models.items()}, {name[f]: found[str(f)] for f in models}


def test_a_fresh_process_opens_every_shrunk_model_by_its_own_class(opened):
    wanted, found = opened
    assert {"bert/keep_layers", "bert/wanda", "bert/share_layers", "bert/ffn", "bert/low_rank", "bert/vocabulary", "bert/nf4", "export"} < set(wanted)
    for name, here in wanted.items():
        assert found[name]["class"] == here["class"], name
        for before, after in zip(here["logits"], found[name]["logits"], strict=True):
            torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_a_pipeline_in_a_fresh_process_says_the_same(opened):
    wanted, found = opened
    for name, here in wanted.items():
        for before, after in zip(here["said"], found[name]["said"], strict=True):
            assert after == (before if isinstance(before, str) else pytest.approx(before, rel=1e-4)), name
