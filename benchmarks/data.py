"""Tasks from the folder of real data sets ($PARETUNE_DATA, or `../shared/data` beside the repository), and one run on them."""

from __future__ import annotations

import dataclasses
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import paretune as pt
from paretune import flow, runs
from paretune.options import Options, Training
from paretune.store import Run
from paretune.tasks import Task

FOLDER = Path(os.environ.get("PARETUNE_DATA") or Path(__file__).parents[2] / "shared" / "data")
TASKS: dict[str, dict[str, Any]] = {  # the file to train on, and the arguments of `pt.task`
    "sst2": {"file": "train.jsonl.gz", "text": "text", "label": "label", "validation": "validation.jsonl", "test": "test.jsonl"},
    "cola": {"file": "train.jsonl.gz", "text": "text", "label": "label", "validation": "validation.jsonl", "test": "test.jsonl", "metric": "matthews"},
    "mrpc": {"file": "train.jsonl.gz", "text": "sentence1,sentence2", "label": "label", "test": "test.jsonl"},
    "rte": {"file": "train.jsonl.gz", "text": "sentence1,sentence2", "label": "label", "test": "validation.jsonl"},
    "stsb": {"file": "train.jsonl.gz", "text": "sentence1,sentence2", "label": "score", "validation": "validation.jsonl", "test": "test.jsonl"},
    "mpqa": {"file": "train.jsonl", "text": "text", "label": "label", "test": "test.jsonl"},
    "trec6": {"file": "train.jsonl", "text": "text", "label": "label", "test": "test.jsonl"},
    "banking77": {"file": "train.jsonl.gz", "text": "text", "label": "label", "test": "test.jsonl"},
    "books_doyle": {"file": "train.jsonl.gz", "text": "text", "test": "test.jsonl.gz"},
    "e2e_nlg": {"file": "train.jsonl.gz", "text": "mr", "label": "references", "test": "test.jsonl.gz"},
}
DECODER = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 12}


def task(name: str, *, train: int | None = None, validation: int | None = None, test: int | None = None, seed: int = 0) -> Task:
    """A data set, with at most so many rows per split; the training rows depend on the seed, the others are the same for all."""
    given = {k: FOLDER / name / v if k in ("validation", "test") else v for k, v in TASKS[name].items() if k != "file"}
    whole = pt.task(FOLDER / name / TASKS[name]["file"], **given)
    cut = whole if train is None else whole.subset(train, seed=seed)
    return dataclasses.replace(cut, validation=few(cut.validation, validation), test=few(cut.test, test))


def few(rows: Any, n: int | None) -> Any:
    """n of the rows, always the same ones."""
    kept = range(len(rows)) if n is None or n >= len(rows) else sorted(random.Random(0).sample(range(len(rows)), n))
    return type(rows)(rows[i] for i in kept)


def decoder(folder: Path, *, length: int) -> str:
    """A Llama-shaped decoder of 6 layers of width 768 that reads so many tokens, its weights random, saved in the folder."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER / "checkpoints" / "books-gpt2")
    tokenizer.model_max_length = length
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=length, eos_token_id=tokenizer.eos_token_id, **DECODER)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def books(*, tokens: int, test: int = 20_000) -> Task:
    """At least so many tokens of the books to train on (a token is some four characters), none to validate on, and so many characters to test on."""
    whole = task("books_doyle")
    column = whole.columns["text"]
    kept = {"train": 5 * tokens, "validation": 0, "test": test}
    cut = {split: "\n".join(row[column] for row in whole.rows(split))[:n] for split, n in kept.items()}
    return dataclasses.replace(whole, **{split: type(whole.train)([{column: text}] if text else []) for split, text in cut.items()})


def encoded(given: Task, split: str, *, source: str, longest: int) -> list[dict[str, Any]]:
    """What another library is given of a split: the texts as a backbone's tokenizer encodes them, with their labels; of a language model, whole blocks."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if "label" not in given.columns:
        blocks = [e["input_ids"] for e in given.encode(given.rows(split), tokenizer, max_length=longest)]
        return [{"input_ids": ids, "attention_mask": [1] * longest, "labels": ids} for ids in map(list, blocks) if len(ids) == longest]
    first, second, label = given.columns["text"], given.columns.get("pair"), given.columns["label"]
    found = []
    for row in given.rows(split):
        encoding = tokenizer(row[first], row[second] if second else None, truncation=True, max_length=longest)
        found.append({**encoding, "labels": given.labels.index(row[label]) if given.labels else float(row[label])})
    return found


def one_run(recipe: str, given: Task, *, seed: int = 0, backbone: str = "minilm", **training: Any) -> dict[str, Any]:
    """The figures of one recipe on one task, trained (`options.Training` has the words) and scored; inference is not measured."""
    with tempfile.TemporaryDirectory() as out:
        return figures(finished(recipe, given, out=out, seed=seed, backbone=backbone, **training), given)


def finished(recipe: str, given: Task, *, out: str, seed: int = 0, backbone: str = "minilm", **training: Any) -> Run:
    """The run itself, for as long as its folder stands."""
    plans = flow.plan_frontier(given, backbone=backbone, recipes=[recipe], seeds=seed + 1, out=out, options=Options(Training(**training)))
    text, plan = plans[-1]
    return runs.make(plan, text)


def figures(made: Run, given: Task) -> dict[str, Any]:
    """What a cell keeps of a run."""
    kept = ("recipe", "resolved", "seed", "metric", "score", "score_low", "score_high", "validation_score", "task", "task_fingerprint",
            "weights_sha256", "environment")  # fmt: skip
    costs = ("train_s", "train_cpu_s", "train_peak_mb", "trainable_parameters", "head_parameters", "stored_mb")
    return {k: made.record[k] for k in kept} | {k: made.record["cost"][k] for k in costs} | {
        "train": len(given.train), "test": len(given.test), "phases": made.record["phases"],
    }  # fmt: skip
