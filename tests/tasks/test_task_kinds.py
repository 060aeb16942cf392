"""Every kind, from file to loss, prediction and score, against a direct computation with a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import paretune as pt
from paretune import tasks, training
from paretune.errors import BackboneError, DataError
from paretune.tasks import Task
from paretune.tasks.kinds import KINDS

WORDS = ["good", "bad", "great", "poor", "fine", "dull", "bright", "so", "too", "never"]
functional = torch.nn.functional


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentence(i: int, words: int = 0) -> str:
    return " ".join(WORDS[(i * 7 + j * (i + 3)) % 10] for j in range(words or 2 + i % 5)) + f" {i}"


def build(tmp_path: Path, make: Any, **arguments: Any) -> Task:
    """A task of 40 rows."""
    return pt.task(save(tmp_path / "data.jsonl", [make(i) for i in range(40)]), **arguments)


def load(task: Task, family: str, **config: Any) -> Any:
    """A tiny model with the head the kind asks for."""
    base = tiny.model(family, "base").config.to_dict()
    settings = transformers.AutoConfig.for_model(base.pop("model_type"), **{**base, **task.kind.config(task), **config})
    torch.manual_seed(0)
    return getattr(transformers, task.kind.auto_class_for(settings)).from_config(settings).eval()


def run(task: Task, model: Any, processor: Any, rows: Any, max_length: int | None = None) -> tuple[Any, ...]:
    """(encodings, batch, outputs, loss sum, count, predictions)."""
    encodings = task.encode(rows, processor, max_length=max_length, config=model.config)
    batch = task.kind.collate(encodings, processor)
    with torch.no_grad():
        outputs = model(**task.kind.inputs(batch))
        total, count = task.kind.loss(outputs, batch)
        predictions = task.kind.predict(model, batch, outputs=outputs, processor=processor)
    assert total.dtype == torch.float32 and total.ndim == 0
    return encodings, batch, outputs, total, count, predictions


CLASSES = {"one text": "text", "two texts": "text,more"}


@pytest.mark.parametrize("text", CLASSES.values(), ids=list(CLASSES))
def test_classification(text: str, tmp_path: Path) -> None:
    task = build(tmp_path, lambda i: {"text": sentence(i), "more": sentence(i + 9), "label": "xyz"[i % 3]}, text=text, label="label")
    assert (task.kind.name, task.labels, task.metric) == ("classification", ("x", "y", "z"), "accuracy")
    model, tokenizer = load(task, "bert"), tiny.tokenizer()
    _, batch, _, total, count, predictions = run(task, model, tokenizer, task.test)
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}

    expected, right = 0.0, []
    for row, prediction in zip(task.test, predictions, strict=True):  # each row alone, by transformers' own loss
        own = tokenizer(*[row[c] for c in text.split(",")], return_tensors="pt")
        label = torch.tensor(["xyz".index(row["label"])])
        with torch.no_grad():
            alone = model(**own, labels=label)
        expected += float(alone.loss)
        assert prediction == pytest.approx(alone.logits.softmax(-1)[0].tolist(), abs=1e-5)
        right.append(float(alone.logits.argmax() == label))
    assert (count, float(total)) == (len(task.test), pytest.approx(expected, rel=1e-5))
    assert tasks.per_example(task, predictions, rows=task.test) == right
    assert tasks.score(task, predictions, rows=task.test) == pytest.approx(sum(right) / len(right))
    assert set(batch) == {*own, "labels"}


def test_labels_are_optional_in_what_is_predicted(tmp_path: Path) -> None:
    task = build(tmp_path, lambda i: {"text": sentence(i), "label": i % 2}, text="text", label="label")
    batch = task.kind.collate(task.encode([{"text": "good film"}, {"text": "bad"}], tiny.tokenizer()), tiny.tokenizer())
    assert "labels" not in batch and batch["input_ids"].shape == (2, 4)


def test_truncation(tmp_path: Path) -> None:
    task = build(tmp_path, lambda i: {"text": sentence(i, 50), "label": i % 2}, text="text", label="label")
    assert {task.kind.length(e) for e in task.encode(task.test, tiny.tokenizer(), max_length=9)} == {9}


def test_regression(tmp_path: Path) -> None:
    task = build(tmp_path, lambda i: {"text": sentence(i), "label": i / 8}, text="text", label="label")
    assert (task.kind.name, task.metric, task.labels) == ("regression", "pearson", ())
    assert "40 different numbers" in task.notes[0]
    model = loaded(task, tmp_path)
    _, batch, outputs, total, count, predictions = run(task, model, tiny.tokenizer(), task.test)
    truth, known = torch.tensor(task.test.column("label")), torch.tensor(task.train.column("label"), dtype=torch.float64)
    mean, std = float(known.mean()), float(known.std(correction=0))
    assert (model.config.label_mean, model.config.label_std) == pytest.approx((mean, std))
    assert count == len(task.test)
    assert float(total) == pytest.approx(float(((outputs.logits[:, 0] - (truth - mean) / std) ** 2).sum()), rel=1e-5)
    assert predictions == pytest.approx((std * outputs.logits[:, 0] + mean).tolist())
    together = torch.stack([truth.double(), torch.tensor(predictions, dtype=torch.float64)])
    assert tasks.score(task, predictions, rows=task.test) == pytest.approx(float(torch.corrcoef(together)[0, 1]), abs=1e-5)
    assert tasks.per_example(task, predictions, rows=task.test) is None


def loaded(task: Task, folder: Path) -> Any:
    """A tiny backbone, loaded for the task as a user would."""
    tiny.model("bert", "base").save_pretrained(folder / "bert")
    tiny.tokenizer().save_pretrained(folder / "bert")
    return pt.load(str(folder / "bert"), task)


def test_the_scale_of_labels_is_learned_before_the_first_step(tmp_path: Path) -> None:
    """Prices are as easy as stars: the same training, of which every answer is stretched and shifted as the labels are."""
    found = []
    for stretch, shift in ((1.0, 0.0), (60_000.0, 150_000.0)):
        task = build(tmp_path, lambda i, stretch=stretch, shift=shift: {"text": sentence(i), "label": stretch * i / 8 + shift}, text="text", label="label")
        model = loaded(task, tmp_path)
        pt.adapt(model, "bitfit")
        pt.fit(model, task, pt.Schedule(lr=1e-2, epochs=2, batch=8, dtype="fp32", dropout=False))
        found.append(torch.tensor(training.predict(model, task, rows=task.test), dtype=torch.float64))
    torch.testing.assert_close(found[1], 60_000 * found[0] + 150_000, rtol=1e-4, atol=60)


def test_a_model_of_its_own_units_keeps_them(tmp_path: Path) -> None:
    task = build(tmp_path, lambda i: {"text": sentence(i), "label": 100.0 + i}, text="text", label="label")
    model = loaded(task, tmp_path)
    del model.config.label_mean, model.config.label_std
    (encoding,) = training.encode(task, task.test[:1], model=model)
    assert encoding["labels"] == task.test[0]["label"]


def tagged(i: int) -> dict[str, Any]:
    words = sentence(i, 3 + i % 4).split() + ["unbelievable"]
    return {"tokens": words, "tags": ["B-X" if len(w) > 4 else "I-X" if w == "so" else "O" for w in words]}


@pytest.mark.parametrize("processor", [tiny.tokenizer, tiny.bpe_tokenizer], ids=["wordpiece", "bpe"])
def test_tokens(processor: Any, tmp_path: Path) -> None:
    task = build(tmp_path, tagged, text="tokens", label="tags")
    assert (task.kind.name, task.labels, task.metric) == ("tokens", ("B-X", "I-X", "O")[: len(task.labels)], "f1_spans")
    tokenizer = processor()
    model = load(task, "bert", vocab_size=max(tiny.SIZE, len(tokenizer)))
    encodings, batch, outputs, total, count, predictions = run(task, model, tokenizer, task.test)
    words = [len(row["tokens"]) for row in task.test]
    assert [sum(label != -100 for label in e["labels"]) for e in encodings] == words == [len(p) for p in predictions]
    assert count == sum(words)
    expected = functional.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    for row, encoding in zip(task.test, encodings, strict=True):  # the marked tokens begin the words
        marked = [tokenizer.decode([t]).strip() for t, label in zip(encoding["input_ids"], encoding["labels"], strict=True) if label != -100]
        assert all(start == "[UNK]" or word.startswith(start) for word, start in zip(row["tokens"], marked, strict=True))
    assert tasks.score(task, task.test.column("tags"), rows=task.test) == 1.0


def test_tokens_with_tags_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 8, column 'tags'.*2 tags for"):
        build(tmp_path, lambda i: tagged(i) | ({"tags": ["O", "O"]} if i == 7 else {}), text="tokens", label="tags")


def test_multilabel_from_lists_and_from_columns(tmp_path: Path) -> None:
    lists = build(tmp_path, lambda i: {"text": sentence(i), "label": [n for n in "abc" if (i + ord(n)) % 3]}, text="text", label="label")
    columns = build(tmp_path, lambda i: {"text": sentence(i)} | {n: int(bool((i + ord(n)) % 3)) for n in "abc"}, text="text", label="a,b,c")
    cells = build(tmp_path, lambda i: {"text": sentence(i), "label": "|".join(n for n in "abc" if (i + ord(n)) % 3)}, text="text", label="label",
                  kind="multilabel")  # fmt: skip
    assert lists.kind == columns.kind == cells.kind == KINDS["multilabel"]()
    assert lists.labels == columns.labels == cells.labels == ("a", "b", "c")
    assert lists.train.column("label") == columns.train.column("a,b,c") == cells.train.column("label")
    _, batch, outputs, total, count, predictions = run(columns, load(columns, "bert"), tiny.tokenizer(), columns.test)
    truth = torch.tensor([[float(n in row["a,b,c"]) for n in "abc"] for row in columns.test])
    assert torch.equal(batch["labels"], truth) and count == truth.numel()
    assert float(total) == pytest.approx(float(functional.binary_cross_entropy(outputs.logits.sigmoid(), truth, reduction="sum")), rel=1e-5)
    assert predictions[0] == pytest.approx(outputs.logits.sigmoid()[0].tolist())
    assert columns.kind.answer(columns, [0.9, 0.1, 0.6])["label"] == "a|c"
    assert tasks.score(columns, truth.tolist(), rows=columns.test) == 1.0


def question(i: int) -> dict[str, Any]:
    choices = [sentence(i + 1), sentence(i + 2)]
    return {"q": sentence(i), "c1": choices[0], "c2": choices[1], "list": choices, "n": i % 2, "letter": "AB"[i % 2]}


def test_choice(tmp_path: Path) -> None:
    task = build(tmp_path, question, text="q,c1,c2", label="n")
    assert task.kind.name == "choice"
    for text, label in (("q,list", "n"), ("q,list", "letter"), ("q,c1,c2", "letter")):
        other = build(tmp_path, question, text=text, label=label)
        assert other.kind == task.kind and list(map(str, other.test.column(label))) == list(map(str, task.test.column("n")))
    model, tokenizer = load(task, "bert"), tiny.tokenizer()
    _, batch, outputs, total, count, predictions = run(task, model, tokenizer, task.test)
    assert batch["input_ids"].shape[:2] == (len(task.test), 2)
    row = task.test[0]
    own = tokenizer([row["q"]] * 2, row["c1,c2"], return_tensors="pt", padding=True)
    with torch.no_grad():
        alone = model(**{k: v[None] for k, v in own.items()}).logits[0]
    assert predictions[0] == pytest.approx(alone.softmax(-1).tolist(), abs=1e-5)
    expected = functional.cross_entropy(outputs.logits, torch.tensor(task.test.column("n")), reduction="sum")
    assert (count, float(total)) == (len(task.test), pytest.approx(float(expected), rel=1e-5))
    assert tasks.score(task, [[1 - n, n] for n in task.test.column("n")], rows=task.test) == 1.0


def test_choice_with_a_wrong_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 4, column 'n', value 2: .*0 to 1, A to B"):
        build(tmp_path, lambda i: question(i) | {"n": 2 if i == 3 else 0}, text="q,list", label="n")


def prompted(i: int) -> dict[str, Any]:
    return {"prompt": sentence(i) + " :", "target": sentence(i + 5, 4)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_with_a_decoder(side: str, tmp_path: Path) -> None:
    task = build(tmp_path, prompted, text="prompt", label="target")
    assert (task.kind.name, task.metric) == ("generation", "exact_match")
    tokenizer = tiny.bpe_tokenizer()
    tokenizer.padding_side = side
    model = load(task, "gpt2", vocab_size=len(tokenizer))
    encodings, batch, _, total, count, predictions = run(task, model, tokenizer, task.test, 64)
    expected, tokens = 0.0, 0
    for row, prediction in zip(task.test, predictions, strict=True):
        prompt = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        target = tokenizer(" " + row["target"][0] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(torch.cat([prompt, target], 1)).logits[0, prompt.shape[1] - 1 : -1]
            alone = {"max_new_tokens": task.kind.new_tokens, "do_sample": False, "pad_token_id": 0}
            made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **alone)
        expected += float(functional.cross_entropy(logits, target[0], reduction="sum"))
        tokens += target.shape[1]
        assert prediction == tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    assert (count, float(total)) == (tokens, pytest.approx(expected, rel=1e-4))
    assert tasks.score(task, [" ".join(row["target"]) for row in task.test], rows=task.test) == 1.0
    long = task.encode(task.test, tokenizer, max_length=12)
    assert all(len(e["input_ids"]) <= 12 and any(label != -100 for label in e["labels"]) for e in long)


def test_generation_with_an_encoder_and_decoder(tmp_path: Path) -> None:
    task = build(tmp_path, prompted, text="prompt", label="target")
    model, tokenizer = load(task, "t5"), tiny.tokenizer()
    assert type(model).__name__ == "T5ForConditionalGeneration"
    _, batch, outputs, total, count, predictions = run(task, model, tokenizer, task.test)
    with torch.no_grad():
        own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])  # shifts by itself
    assert float(total) / count == pytest.approx(float(own.loss), rel=1e-5)
    assert len(predictions) == len(task.test) and all(isinstance(text, str) for text in predictions)


def test_references_are_all_learned_and_any_of_them_is_right(tmp_path: Path) -> None:
    many = build(tmp_path, lambda i: {"prompt": sentence(i), "target": [sentence(i + 5, 4), sentence(i + 6, 4)]}, text="prompt", label="target")
    assert many.kind.name == "generation"
    assert len(many.train) % 2 == 0 and all(len(row["target"]) == 1 for row in many.train)
    assert all(len(row["target"]) == 2 for row in many.test)
    assert tasks.score(many, [row["target"][1] for row in many.test], rows=many.test) == 1.0


def test_generation_scored_by_perplexity(tmp_path: Path) -> None:
    task = build(tmp_path, prompted, text="prompt", label="target", metric="perplexity")
    tokenizer = tiny.bpe_tokenizer()
    *_, total, count, predictions = run(task, load(task, "gpt2", vocab_size=len(tokenizer)), tokenizer, task.test)
    assert tasks.score(task, predictions, rows=task.test) == pytest.approx(math.exp(float(total) / count), rel=1e-5)
    assert task.better == "lower"


def test_language(tmp_path: Path) -> None:
    task = build(tmp_path, lambda i: {"text": sentence(i, 30)}, text="text")
    assert (task.kind.name, task.metric, task.better) == ("language", "perplexity", "lower")
    tokenizer = tiny.bpe_tokenizer()
    model = load(task, "gpt2", vocab_size=len(tokenizer))
    encodings, batch, outputs, total, count, predictions = run(task, model, tokenizer, task.test, 32)
    whole = [t for row in task.test for t in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
    assert count == len(whole) - 1  # every token but the first is predicted once
    joined = encodings[0]["input_ids"] + [t for e in encodings[1:] for t in e["input_ids"][1:]]
    assert joined == whole and {len(e["input_ids"]) for e in encodings[:-1]} == {32}
    expected = 0.0
    for encoding in encodings:
        ids = torch.tensor([encoding["input_ids"]])
        with torch.no_grad():
            expected += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert tasks.score(task, predictions, rows=task.test) == pytest.approx(math.exp(expected / count), rel=1e-4)


def test_language_needs_a_decoder(tmp_path: Path) -> None:
    task = build(tmp_path, lambda i: {"text": sentence(i)}, text="text")
    for family in ("bert", "roberta", "t5", "vit"):
        with pytest.raises(BackboneError, match="decoder-only"):
            task.kind.auto_class_for(tiny.model(family, "base").config)
    for family in ("gpt2", "llama", "opt"):
        assert task.kind.auto_class_for(tiny.model(family, "base").config) == "AutoModelForCausalLM"


def test_a_scikit_learn_scorer_by_name(tmp_path: Path) -> None:
    from sklearn.metrics import log_loss

    task = build(tmp_path, lambda i: {"text": sentence(i), "label": "xyz"[i % 3]}, text="text", label="label", metric="neg_log_loss")
    logits = torch.rand(len(task.test), 3, generator=torch.Generator().manual_seed(0))
    predictions = logits.softmax(-1).tolist()  # fp32: the rows sum to one only nearly
    truth = [task.labels.index(label) for label in task.test.column("label")]
    assert tasks.score(task, predictions, rows=task.test) == pytest.approx(-log_loss(truth, logits.double().softmax(-1).tolist()))
