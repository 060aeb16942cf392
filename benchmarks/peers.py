"""The same tasks in other libraries: their model, their configuration, transformers' Trainer, given the number format and the
length grouping that paretune takes by itself (what they need without, `benchmarks/vs_peft.py` measures).

    python benchmarks/peers.py < job.json        prints one line of JSON; run by the interpreter that has the library

A job holds `library` ("peft" or "adapters"), `config` (the name of its configuration class) and `arguments`, `source` (folder of the
backbone), `texts` ([first, second or null] per row and split), `labels` per split, `outputs` (number of classes; 1 is regression),
`lr`, `epochs`, `batch`, `seed`, `max_length`, `bf16`. It imports nothing of paretune, since `adapters` needs an older transformers.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HEAD_OF_BERT = ["classifier", "pooler"]  # what paretune, too, trains as the head of a BERT classifier


def ask(job: dict[str, Any], *, python: str | Path = sys.executable) -> dict[str, Any]:
    """Does a job in a fresh process of an interpreter that has the library.

    Raises:
        SystemExit: with the library's own message, where it fails.
    """
    done = subprocess.run([str(python), __file__], input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job['library']} {job['config']} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Trains and predicts; the answers are class probabilities' logits, or numbers."""
    import torch
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

    importlib.import_module(job["library"])
    set_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["source"])
    trainer_class: Any = Trainer
    if job["library"] == "adapters":
        from adapters import AdapterTrainer as trainer_class  # noqa: N813
    before = _memory_mb("VmRSS")
    model = _MODELS[job["library"]](job)
    rows = {split: _rows(tokenizer, job, split) for split in ("train", "test")}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=job["batch"], num_train_epochs=job["epochs"], learning_rate=job["lr"], report_to=[],
            save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True, weight_decay=0.01, seed=job["seed"], bf16=job["bf16"],
            per_device_eval_batch_size=64, **_grouping(TrainingArguments),
        )  # fmt: skip
        trainer = trainer_class(model=model, args=arguments, train_dataset=rows["train"], data_collator=DataCollatorWithPadding(tokenizer))
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu, peak = time.perf_counter() - wall, time.process_time() - cpu, _memory_mb("VmHWM")
        arguments = TrainingArguments(output_dir=folder, use_cpu=True, disable_tqdm=True, report_to=[], bf16=job["bf16"], per_device_eval_batch_size=64)
        order = sorted(range(len(rows["test"])), key=lambda i: len(rows["test"][i]["input_ids"]))  # little padding here, too
        trainer = trainer_class(model=model, args=arguments, data_collator=DataCollatorWithPadding(tokenizer))
        answers = trainer.predict([rows["test"][i] for i in order])
    learns = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    head = sum(size for n, size in learns.items() if any(word in n for word in ("classifier", "pooler", "heads.")))
    predictions = dict(zip(order, torch.as_tensor(answers.predictions).tolist(), strict=True))
    return {
        "predictions": [predictions[i] for i in range(len(order))], "train_s": seconds,
        "train_cpu_s": cpu, "train_peak_mb": peak, "added_mb": peak - before, "head_parameters": head,
        "trainable_parameters": sum(learns.values()) - head,
        "versions": {name: importlib.import_module(name).__version__ for name in ("torch", "transformers", job["library"])},
    }  # fmt: skip


def _memory_mb(line: str) -> float:
    """Of this process: its resident memory (VmRSS), or the highest so far (VmHWM); Linux has them."""
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(line)).split()[1]) * 1024 / 1e6


def _grouping(arguments: type) -> dict[str, Any]:
    """The argument that groups training texts by length, as this version of transformers calls it."""
    return {"group_by_length": True} if "group_by_length" in arguments.__dataclass_fields__ else {"train_sampling_strategy": "group_by_length"}


def _rows(tokenizer: Any, job: dict[str, Any], split: str) -> list[dict[str, Any]]:
    found = []
    for (first, second), label in zip(job["texts"][split], job["labels"][split], strict=True):
        encoded = tokenizer(first, second, truncation=True, max_length=job["max_length"])
        found.append({**encoded, "labels": label})
    return found


def _peft(job: dict[str, Any]) -> Any:
    import peft
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(job["source"], num_labels=job["outputs"])
    config = getattr(peft, job["config"])(task_type=peft.TaskType.SEQ_CLS, modules_to_save=HEAD_OF_BERT, **job["arguments"])
    return peft.get_peft_model(model, config)


def _adapters(job: dict[str, Any]) -> Any:
    import adapters
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(job["source"], num_labels=job["outputs"])
    adapters.init(model)
    model.add_adapter("task", config=getattr(adapters, job["config"])(**job["arguments"]))
    model.train_adapter("task")
    for name, parameter in model.named_parameters():
        if any(word in name for word in HEAD_OF_BERT):
            parameter.requires_grad_(True)
    return model


_MODELS = {"peft": _peft, "adapters": _adapters}

if __name__ == "__main__":
    print(json.dumps(work(json.load(sys.stdin))))
