"""An adapter belongs to the tokenizer that it was trained with: its file tells which, and another one is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import steps
import tiny
import torch
import work
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import paretune as pt
from paretune import backbones, peft_format, phases, processors, surgery
from paretune.errors import StoreError
from paretune.methods.adapters.adapter import Adapter
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms.max_length import MaxLength
from paretune.methods.transforms.vocabulary import Vocabulary

TASK = work.text_task()
METHODS = {"LORA": LoRA(r=2), "PARETUNE": Adapter(bottleneck=4)}  # a file of PEFT's kind, and one of our own


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """The untrimmed backbone, whose head answers the task's labels."""
    model = work.ready("bert")
    model.config.id2label = TASK.kind.config(TASK)["id2label"]
    return model


@pytest.fixture(scope="module")
def trimmed(plain: nn.Module) -> nn.Module:
    """The same backbone with the pieces of the training texts alone."""
    return phases.shrink(copy.deepcopy(plain), Vocabulary(), TASK)


def adapted(model: nn.Module, method: object) -> nn.Module:
    """A copy with a trained adapter."""
    model = copy.deepcopy(model)
    surgery.attach(model, [method])  # type: ignore[list-item]
    steps.disturb(model)
    return model


def answer(model: nn.Module) -> torch.Tensor:
    batch = processors.get(model)(TASK.texts("train")[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def opened(folder: Path) -> nn.Module:
    return backbones.load(backbones.find(str(folder)), TASK)


@pytest.mark.parametrize("kind", METHODS)
def test_an_adapter_file_is_taken_on_its_own_tokenizer_alone(kind: str, plain: nn.Module, trimmed: nn.Module, tmp_path: Path) -> None:
    for own, other in ((plain, trimmed), (trimmed, plain)):
        model, folder = adapted(own, METHODS[kind]), tmp_path / str(len(processors.get(own)))
        folder.mkdir()
        assert peft_format.save(model, folder, base="somewhere") == kind
        with pytest.raises(StoreError, match=f"{len(processors.get(own)):,} pieces.*{len(processors.get(other)):,} pieces.*load somewhere") as refused:
            pt.read_peft(copy.deepcopy(other), folder)
        for m in (own, other):
            assert processors.fingerprint(processors.get(m))[:12] in str(refused.value)
        again = pt.read_peft(copy.deepcopy(own), folder)
        assert torch.equal(answer(again), answer(model))


def test_a_file_or_a_model_that_does_not_tell_is_taken(plain: nn.Module, tmp_path: Path) -> None:
    peft_format.save(adapted(plain, LoRA(r=2)), tmp_path, base="somewhere")
    file, bare = tmp_path / peft_format.WEIGHTS, copy.deepcopy(plain)
    processors.put(bare, None)
    pt.read_peft(bare, tmp_path)

    save_file(load_file(file), file, metadata={"format": "pt"})  # as others write it
    model = copy.deepcopy(plain)
    processors.put(model, tiny.bpe_tokenizer())
    pt.read_peft(model, tmp_path)

    silent = adapted(tiny.model("bert"), LoRA(r=2))
    peft_format.save(silent, tmp_path, base="somewhere")
    with safe_open(file, framework="pt") as stream:
        assert "tokenizer" not in stream.metadata()
    assert "tokenizer" not in silent.config.quantization_config


@pytest.mark.parametrize("recipe", ["lora", "vocabulary | lora", "lora | vocabulary", "lora | max_length(n=12)", "max_length(n=12) | lora"])
def test_a_folder_opens_with_its_own_tokenizer_alone(recipe: str, plain: nn.Module, trimmed: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(plain)
    for step in recipe.split(" | "):
        model = adapted(model, LoRA(r=2)) if step == "lora" else phases.shrink(model, Vocabulary() if step == "vocabulary" else MaxLength(n=12), TASK)
    phases.save_model(model, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["tokenizer"]
    assert told["sha256"] == processors.fingerprint(processors.get(model))
    again = opened(tmp_path)
    assert torch.equal(answer(again), answer(model))

    saved = tmp_path / "again"
    phases.save_model(again, saved)  # what was opened tells the same
    assert json.loads((saved / "config.json").read_text())["quantization_config"]["tokenizer"] == told
    processors.save(plain if "vocabulary" in recipe else trimmed, tmp_path)
    with pytest.raises(StoreError, match="the adapter was trained with a .* pieces .*, and the model has a .* pieces .*; bring back"):
        opened(tmp_path)


def test_a_folder_opened_without_its_tokenizer_still_tells_of_it(plain: nn.Module, tmp_path: Path) -> None:
    model = adapted(plain, LoRA(r=2))
    phases.save_model(model, tmp_path)
    bare = type(model).from_pretrained(tmp_path)
    bare.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["tokenizer"] == processors.told(model)


def test_an_older_folder_opens_with_any(plain: nn.Module, trimmed: nn.Module, tmp_path: Path) -> None:
    phases.save_model(adapted(plain, LoRA(r=2)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["tokenizer"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    processors.save(trimmed, tmp_path)
    assert processors.told(opened(tmp_path)) == processors.told(trimmed)
