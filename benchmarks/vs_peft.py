"""The same work in paretune and in peft with transformers' Trainer: LoRA r=8 on query and value, equal batch and epochs.

    python -m benchmarks.vs_peft [--examples 600] [--rounds 3] [--task stdlib-topics] [--json benchmarks/results/vs_peft.json]

Contestants, run in turn (A B C D, D C B A, ...) in fresh processes of one call, each after the others' machine state:
    paretune             as `pt.adapt` and `pt.fit` do it by default
    paretune again       the same once more: the A/A control
    peft                 peft and transformers' Trainer as their documentation shows it
    peft, same dtype     given the number format, attention kernel and length grouping that paretune chose

Reported per contestant: examples/s of wall time, CPU seconds, peak memory over the process before the model was loaded,
score on the test split; medians with the range over rounds, and each round's ratio to paretune. Written as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TARGETS = "query value"
CONTESTANTS = ("paretune", "paretune again", "peft", "peft, same dtype")
RATE, BATCH = 3e-3, 32
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def main() -> None:
    """Runs every contestant in turn and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task", default="stdlib-topics")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "vs_peft.json")
    parser.add_argument("--table", action="store_true", help="only write docs/benchmarks.md from the file")
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--pace", default="{}", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(_ONE[asked.one.split(",")[0].split(" ")[0]](asked, json.loads(asked.pace), like_ours="same" in asked.one)))
        return
    if not asked.table:
        _fill(asked)
    PAGE.write_text(page(json.loads(asked.json.read_text())))


def _fill(asked: argparse.Namespace) -> None:
    rounds: list[dict[str, Any]] = []
    pace: dict[str, str] = {}
    for i in range(asked.rounds):
        order = CONTESTANTS if i % 2 == 0 else CONTESTANTS[::-1]
        found: dict[str, Any] = {}
        for name in order if pace else CONTESTANTS:
            found[name] = _child(name, asked, pace)
            pace = pace or {k: found["paretune"][k] for k in ("dtype", "attention")}
            print(f"round {i + 1}: {name}: {found[name]['examples_per_s']:.1f} examples/s, score {found[name]['score']:.3f}", flush=True)
        rounds.append(found)
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        about = _about(asked) | {"rounds": len(rounds)}
        asked.json.write_text(json.dumps({"asked": about, "pace": pace, "rounds": rounds}, indent=2) + "\n")


def page(found: dict[str, Any]) -> str:
    """docs/benchmarks.md, from the figures alone."""
    asked, figures = found["asked"], summary(found["rounds"])
    machine, versions = asked["machine"], ", ".join(f"{k} {v}" for k, v in asked["versions"].items())
    return f"""# The same work in paretune and in peft

LoRA r=8 on query and value of MiniLM, {asked["task"]} with {asked["examples"]} training texts, epochs: {asked["epochs"]}, batch {asked["batch"]}, learning
rate {asked["lr"]:g}; loading and tokenizing included, validation left out. Rounds: {asked["rounds"]}, contestants in turn, each in a process of its own.
The same parameters learn in all: peft is told to train BERT's pooler (`modules_to_save`), which paretune counts to the head.
paretune chose {found["pace"]["dtype"]} and {found["pace"]["attention"]} attention. Medians, with the range over rounds; "paretune again" is the A/A control.

{table(figures)}

Machine: {machine.get("cpu", "unknown")}, {machine.get("cores", "?")} cores, shared with others. Versions: {versions}. Commit {asked["commit"]}.
Made by `python -m benchmarks.vs_peft`; `--table` makes this page again from `benchmarks/results/vs_peft.json`.
"""


def summary(rounds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per contestant: the median of every figure over the rounds, and of its examples/s relative to peft's in the same round."""
    out: dict[str, dict[str, Any]] = {}
    for name in CONTESTANTS:
        figures = {k: statistics.median(r[name][k] for r in rounds) for k in ("examples_per_s", "cpu_s", "peak_mb", "score")}
        for peer in ("peft", "peft, same dtype"):
            ratios = sorted(r[name]["examples_per_s"] / r[peer]["examples_per_s"] for r in rounds)
            figures[f"times {peer}"] = [statistics.median(ratios), ratios[0], ratios[-1]]
            cpu = sorted(r[peer]["cpu_s"] / r[name]["cpu_s"] for r in rounds)
            figures[f"CPU times {peer}"] = [statistics.median(cpu), cpu[0], cpu[-1]]
        out[name] = figures
    return out


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    lines = ["| | examples/s | × peft (range) | × peft, same dtype (range) | CPU s | peak MB | score |", "|---|---|---|---|---|---|---|"]
    for name, f in figures.items():
        one, two = ("{:.2f} ({:.2f}-{:.2f})".format(*f[f"times {peer}"]) for peer in ("peft", "peft, same dtype"))
        lines.append(f"| {name} | {f['examples_per_s']:.0f} | {one} | {two} | {f['cpu_s']:.1f} | {f['peak_mb']:.0f} | {f['score']:.3f} |")
    return "\n".join(lines)


def _about(asked: argparse.Namespace) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    from paretune.meters import system

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"examples": asked.examples, "epochs": asked.epochs, "rounds": asked.rounds, "task": asked.task, "batch": BATCH, "lr": RATE,
            "machine": system.describe(), "python": platform.python_version(), "commit": commit,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}}  # fmt: skip


def _child(name: str, asked: argparse.Namespace, pace: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.vs_peft", "--one", name, "--examples", str(asked.examples), "--epochs", str(asked.epochs),
               "--task", asked.task, "--pace", json.dumps(pace)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _task(asked: argparse.Namespace) -> Any:
    import paretune as pt

    return pt.task(asked.task).subset(asked.examples)


def _timed(work: Any, examples: int) -> dict[str, Any]:
    from paretune.meters.memory import Peak

    with Peak() as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        extra = work() or {}
        seconds = time.perf_counter() - wall
    return {"examples_per_s": examples / seconds, "wall_s": seconds, "cpu_s": time.process_time() - cpu,
            "peak_mb": peak.reading.value - peak.before_mb, **extra}  # fmt: skip


def _paretune(asked: argparse.Namespace, pace: dict[str, str], *, like_ours: bool) -> dict[str, Any]:
    import torch

    import paretune as pt
    from paretune import tasks, training
    from paretune.methods.modifiers.schedule import Schedule

    task = _task(asked)
    torch.manual_seed(0)
    model: Any = None

    def work() -> dict[str, Any]:
        nonlocal model
        model = pt.load("minilm", task)
        pt.adapt(model, pt.LoRA(r=8, alpha=16.0, targets=TARGETS))
        without_validation = __import__("dataclasses").replace(task, validation=tasks.Rows())
        fitted = pt.fit(model, without_validation, Schedule(lr=RATE, epochs=float(asked.epochs), batch=BATCH))
        return {"dtype": fitted.dtype, "attention": fitted.attention}

    figures = _timed(work, len(task.train) * asked.epochs)
    return {**figures, "score": tasks.score(task, training.predict(model, task, rows=task.test), rows=task.test)}


def _peft(asked: argparse.Namespace, pace: dict[str, str], *, like_ours: bool) -> dict[str, Any]:
    import numpy as np
    import torch
    from datasets import Dataset
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    from paretune import backbones

    task = _task(asked)
    source = backbones.find("minilm").source
    rows = lambda split: {"text": task.texts(split), "label": [task.labels.index(r[task.columns["label"]]) for r in task.rows(split)]}  # noqa: E731
    trainer: Any = None

    def work() -> None:
        nonlocal trainer
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(source)
        more = {"attn_implementation": pace["attention"]} if like_ours and pace.get("attention") else {}
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(task.labels), **more)
        lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=TARGETS.split(), lora_dropout=0.0,
                          modules_to_save=["classifier", "pooler"])  # fmt: skip
        model = get_peft_model(model, lora)
        data = Dataset.from_dict(rows("train")).map(
            lambda b: tokenizer(b["text"], truncation=True, max_length=256), batched=True, remove_columns=["text"]
        )
        arguments = TrainingArguments(
            output_dir="out/peft", per_device_train_batch_size=BATCH, num_train_epochs=asked.epochs, learning_rate=RATE, report_to=[],
            save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True, warmup_steps=0.06, weight_decay=0.01,
            **({"train_sampling_strategy": "group_by_length", "bf16": pace.get("dtype") == "bf16"} if like_ours else {}),
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer), processing_class=tokenizer
        )
        trainer.train()

    figures = _timed(work, len(task.train) * asked.epochs)
    found = rows("test")
    test = Dataset.from_dict(found).map(
        lambda b: trainer.processing_class(b["text"], truncation=True, max_length=256), batched=True, remove_columns=["text"]
    )
    answers = trainer.predict(test)  # Trainer groups these by length, too: its own labels are in the order of its predictions
    return {**figures, "score": float(np.mean(answers.predictions.argmax(-1) == answers.label_ids))}


_ONE = {"paretune": _paretune, "peft": _peft}

if __name__ == "__main__":
    main()
