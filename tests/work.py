"""Tiny tasks in memory, models ready for them, and fits that take a second."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy
import steps
import tiny
import torch
from torch import nn
from transformers import ViTImageProcessor

from paretune import phases, processors, registry, surgery, training
from paretune.errors import Incompatible
from paretune.methods.adapters.lora import LoRA
from paretune.methods.modifiers.schedule import Schedule
from paretune.methods.readouts.choices import Choices
from paretune.roles import Adapter, Examples, Method, Readout, Trail
from paretune.tasks import Rows, Task
from paretune.tasks.kinds.classification import Classification
from paretune.tasks.kinds.generation import Generation
from paretune.tasks.kinds.image import Image
from paretune.tasks.kinds.tokens import Tokens

LABELS = ("bad", "fine", "good")
_NOUNS = ("film", "book", "story", "actor", "plot", "scene")


def _texts(n: int, seed: int) -> list[tuple[str, str]]:
    """Texts of different lengths that hold their label's word."""
    pick = random.Random(seed)
    rows = []
    for i in range(n):
        label = LABELS[i % 3]
        words = [pick.choice(_NOUNS) for _ in range(pick.randint(1, 9))]
        words.insert(pick.randrange(len(words) + 1), label)
        rows.append((" ".join(words), label))
    return rows


def text_task(*, train: int = 24, validation: int = 6) -> Task:
    """Classification of short texts."""
    columns = {"text": "text", "label": "label"}
    splits = [Rows({"text": t, "label": y} for t, y in _texts(n, seed)) for seed, n in enumerate((train, validation, 6))]
    return Task("tiny", Classification(), columns, LABELS, "accuracy", *splits)


def token_task() -> Task:
    """A tag for each word: is it a noun?"""
    columns = {"text": "words", "label": "tags"}
    made = [Rows({"words": t.split(), "tags": ["N" if w in _NOUNS else "O" for w in t.split()]} for t, _ in _texts(n, s)) for s, n in enumerate((24, 6, 6))]
    return Task("tags", Tokens(), columns, ("N", "O"), "accuracy", *made)


def generation_task() -> Task:
    """A label's word, written."""
    columns = {"text": "text", "label": "label"}
    made = [Rows({"text": t, "label": [y]} for t, y in _texts(n, s)) for s, n in enumerate((24, 6, 6))]
    return Task("written", Generation(new_tokens=3), columns, (), "exact_match", *made)


def image_task() -> Task:
    """Noise of three brightnesses."""
    def rows(n: int, seed: int) -> Rows:
        noise = numpy.random.default_rng(seed)
        return Rows({"image": numpy.clip(noise.normal(60 + 60 * (i % 3), 20, (16, 16, 3)), 0, 255).astype("uint8"), "label": LABELS[i % 3]} for i in range(n))

    return Task("brightness", Image(), {"image": "image", "label": "label"}, LABELS, "accuracy", rows(24, 0), rows(6, 1), rows(6, 2))


def task(family: str) -> Task:
    """A classification task for this family."""
    return image_task() if family in tiny.IMAGES else text_task()


def processor(family: str) -> Any:
    """A processor for this family's tiny model."""
    if family in tiny.IMAGES:
        return ViTImageProcessor(size={"height": 16, "width": 16})
    return tiny.tokenizer()


BITING = {  # knobs by which a method whose defaults are for long inputs changes the tiny ones
    "longformer": {"window": 2, "dense_below": 0},
    "based": {"window": 2, "feature_dim": 2},
    "linformer": {"k": 2},
    "reformer": {"bucket_size": 2, "rounds": 2},
    "perceiver": {"latents": 3},
}


def biting(name: str) -> Method:
    """A transform with its defaults, or with knobs that leave nothing of a tiny model's attention as it was."""
    return registry.get(name)(**BITING.get(name, {}))


def ready(family: str, kind: str = "classification") -> nn.Module:
    """The tiny model of a family with its processor."""
    model = steps.model(family, kind)
    if kind == "tokens":
        model.config.id2label = dict(enumerate((*token_task().labels, "unused")))
    processors.put(model, processor(family))
    return model


def opened(family: str) -> nn.Module:
    """The tiny model of a family as `pt.load` opens it for the family's task: with its processor, and with names of the labels."""
    model = ready(family)
    model.config.id2label = dict(enumerate(LABELS))
    return model


def decided(method: Method, family: str) -> Method:
    """The method with what it leaves to the data decided on the family's task."""
    if not isinstance(method, Adapter) or type(method).chosen is Adapter.chosen:
        return method
    return method.chosen(ready(family), Examples(task(family), processor(family)))[0]


def ranked(family: str = "gpt2") -> nn.Module:
    """The tiny language model of a family, which ranks the labels of `text_task`."""
    return phases.shrink(ready(family, "seq2seq" if family in tiny.SEQ2SEQ else "causal"), Choices(), text_task())


def to_read(method: Readout, family: str) -> nn.Module:
    """The tiny model that a readout is for: with a head, or a language model where the family has one."""
    kind = "seq2seq" if family in tiny.SEQ2SEQ else "causal" if family in tiny.CAUSAL else "classification"
    return ready(family, kind if method.speaks else "classification")


def short(method: Readout) -> Readout:
    """A prompt that the tiny models' 64 positions can hold."""
    return dataclasses.replace(method, shots=2, template="{text}\n{label}") if hasattr(method, "shots") else method


def read_out(method: Readout, family: str) -> nn.Module:
    """A model with the readout, fitted to the family's task."""
    model = to_read(method, family)
    assert phases.shrink(model, short(method), task(family)) is model
    return model


def prepared(method: Method, family: str, kind: str = "classification") -> nn.Module:
    """A model in the state that a transform asks for: with a trained adapter, if it needs one."""
    model = ready(family, kind)
    try:
        method.follow(Trail())
    except Incompatible:
        surgery.attach(model, [LoRA(r=2)])
        steps.disturb(model)
        surgery.freeze(model)
    return model


def fitted(
    model: nn.Module, given: Task, *modifiers: Any, folder: Path | None = None, seed: int = 0, report: Any = None, every_s: float = 0.0, **knobs: Any
) -> training.Fitted:
    """`training.fit` in fp32 with small batches; knobs are the schedule's."""
    schedule = Schedule(**{"lr": 5e-3, "epochs": 2.0, "batch": 4, "dtype": "fp32", **knobs})
    settings = training.Settings(seed=seed, folder=folder, report=report, checkpoint_every_s=every_s, name="the test's recipe")
    torch.manual_seed(seed)
    return training.fit(model, given, schedule=schedule, modifiers=modifiers, settings=settings)
