"""The same work in other libraries, and in a loop of one's own: one job after another, by the interpreter that has the library.

    python benchmarks/peers.py < jobs        a job is a line of JSON; its answer is a line of JSON

A job holds `library` ("peft", "adapters", "transformers": its Trainer alone, or "plain": a loop without any), `config` (the name of the
library's configuration class, or what learns: "full", "head", "bitfit", "top_layers") and `arguments` of it, `source` (folder of the
backbone), `outputs` (number of classes; 1 is regression; null is a causal model), `train` and `test` (encodings with their labels),
`lr`, `epochs`, `batch`, `seed`. With `like_ours` it gets the number format, the attention kernel and the length grouping named there,
without it runs as its documentation shows. It imports nothing of paretune, since `adapters` needs an older transformers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HEAD_OF_BERT = ["classifier", "pooler"]  # what paretune, too, trains as the head of a BERT classifier
BOTTLENECK, POOL = 24, 32


class Worker:
    """A process that does jobs, one after another, with its libraries loaded."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """A job's answer.

        Raises:
            SystemExit: with the library's own message, where it fails.
        """
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline() or '{"error": "its process ended"}')
        if "error" in found:
            raise SystemExit(f"{job['library']} {job['config']} failed:\n{found['error']}")
        return found

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()


@functools.cache
def standing(*command: str) -> Worker:
    """A worker that lives as long as this process, the same one for the same command."""
    return Worker(*command)


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Does the jobs on standard input; what libraries print does not come between the answers."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            try:
                found = work(json.loads(line))
            except Exception:  # told to the asker, who ends
                found = {"error": traceback.format_exc()[-2000:]}
            print(json.dumps(found), file=answers, flush=True)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Trains and predicts; the answers are classes' logits, numbers, or the mean loss of a causal model."""
    import torch
    import transformers

    library = importlib.import_module({"plain": "peft"}.get(job["library"], job["library"]))
    transformers.set_seed(job["seed"])
    with Window() as spent:
        model = _model(job, library)
        padding = job["outputs"] and transformers.DataCollatorWithPadding(transformers.AutoTokenizer.from_pretrained(job["source"]))
        collate = padding or transformers.default_data_collator  # a decoder's blocks have one length
        begun = spent.so_far()
        (_loop if job["library"] == "plain" else _trained)(model, job, collate)
    learns = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    head = sum(size for n, size in learns.items() if any(word in n for word in ("classifier", "pooler", "heads.")))
    return {
        "predictions": _answers(model, job, collate), **spent.figures, "train_s": spent.figures["whole_s"] - begun[0],
        "train_cpu_s": spent.figures["whole_cpu_s"] - begun[1], "head_parameters": head, "trainable_parameters": sum(learns.values()) - head,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, library)},
    }  # fmt: skip


class Window:
    """Time and peak memory of a block: what it adds to what the process held before. Linux has both."""

    def __enter__(self) -> Window:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier jobs freed is no part of this one
        Path("/proc/self/clear_refs").write_text("5")
        self.before_mb = _memory_mb("VmRSS")
        self.began = time.perf_counter(), time.process_time()
        return self

    def so_far(self) -> tuple[float, float]:
        """Seconds of wall and of CPU time."""
        return time.perf_counter() - self.began[0], time.process_time() - self.began[1]

    def __exit__(self, *error: object) -> None:
        seconds, cpu = self.so_far()
        peak = _memory_mb("VmHWM")
        self.figures = {"whole_s": seconds, "whole_cpu_s": cpu, "train_peak_mb": peak, "added_mb": peak - self.before_mb}


def _memory_mb(line: str) -> float:
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(line)).split()[1]) * 1024 / 1e6


def _model(job: dict[str, Any], library: Any) -> Any:
    import transformers

    like_ours = job.get("like_ours") or {}
    more = {"attn_implementation": like_ours["attention"]} if like_ours.get("attention") else {}
    if job["outputs"]:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(job["source"], num_labels=job["outputs"], **more)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(job["source"], **more)
    if job["config"] in LEARNING:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(LEARNING[job["config"]](name) or any(word in name for word in HEAD_OF_BERT))
        return model
    return {"peft": _peft, "adapters": _adapters, "plain": _by_hand}[job["library"]](job, library, model)


LEARNING: dict[str, Callable[[str], bool]] = {  # what learns -> is this parameter of it, beside the head?
    "full": lambda name: True, "head": lambda name: False, "bitfit": lambda name: name.endswith("bias"),
    "top_layers": lambda name: ".layer.4." in name or ".layer.5." in name,
}  # fmt: skip


def _peft(job: dict[str, Any], peft: Any, model: Any) -> Any:
    more = {"task_type": "SEQ_CLS", "modules_to_save": HEAD_OF_BERT} if job["outputs"] else {"task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, getattr(peft, job["config"])(**more, **job["arguments"]))


def _adapters(job: dict[str, Any], adapters: Any, model: Any) -> Any:
    adapters.init(model)
    model.add_adapter("task", config=getattr(adapters, job["config"])(**job["arguments"]))
    model.train_adapter("task")
    for name, parameter in model.named_parameters():
        if any(word in name for word in HEAD_OF_BERT):
            parameter.requires_grad_(True)
        if "lm_head" in name:  # which the library leaves to learn
            parameter.requires_grad_(False)
    return model


def _by_hand(job: dict[str, Any], peft: Any, model: Any) -> Any:
    """A plain loop's model: peft's, or, for a bottleneck adapter, which peft has not, a few lines."""
    if job["config"] != "bottleneck":
        return _peft(job, peft, model)
    import torch

    class Bottleneck(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner
            self.down, self.up = torch.nn.Linear(inner.out_features, BOTTLENECK), torch.nn.Linear(BOTTLENECK, inner.out_features)
            torch.nn.init.zeros_(self.up.weight)

        def forward(self, x: Any) -> Any:
            y = self.inner(x)
            return y + self.up(torch.relu(self.down(y)))

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in HEAD_OF_BERT))
    for layer in model.base_model.encoder.layer:
        layer.output.dense = Bottleneck(layer.output.dense)
    return model


def _trained(model: Any, job: dict[str, Any], collate: Any) -> None:
    """By the library's Trainer."""
    from transformers import Trainer, TrainingArguments

    if job["library"] == "adapters":
        from adapters import AdapterTrainer as Trainer  # noqa: N813
    like_ours = job.get("like_ours") or {}
    more = {"bf16": like_ours["dtype"] == "bf16", **_grouping(TrainingArguments)} if like_ours else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=job["batch"], num_train_epochs=job["epochs"], learning_rate=job["lr"], report_to=[],
            save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True, weight_decay=0.01, seed=job["seed"], **more,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=job["train"], data_collator=collate).train()


def _grouping(arguments: type) -> dict[str, Any]:
    """The argument that groups training texts by length, as this version of transformers calls it."""
    return {"group_by_length": True} if "group_by_length" in arguments.__dataclass_fields__ else {"train_sampling_strategy": "group_by_length"}


def _loop(model: Any, job: dict[str, Any], collate: Any) -> None:
    """As one writes it by hand: batches of like length, autocast, what learns given to AdamW, linear decay."""
    import torch

    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=job["lr"], weight_decay=0.01, fused=True)
    plan = [batch for epoch in range(job["epochs"]) for batch in _batches(job, epoch)]
    model.train()
    for step, batch in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = job["lr"] * (1 - step / len(plan))
        with _autocast(job):
            loss = model(**collate(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _batches(job: dict[str, Any], epoch: int) -> Iterator[list[dict[str, Any]]]:
    rows, batch = list(job["train"]), job["batch"]
    chance = random.Random(job["seed"] * 1000 + epoch)
    chance.shuffle(rows)
    rows = [row for at in range(0, len(rows), POOL * batch) for row in sorted(rows[at : at + POOL * batch], key=lambda r: len(r["input_ids"]))]
    cut = [rows[at : at + batch] for at in range(0, len(rows), batch)]
    chance.shuffle(cut)
    yield from cut


def _autocast(job: dict[str, Any]) -> Any:
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=(job.get("like_ours") or {}).get("dtype") == "bf16")


def _answers(model: Any, job: dict[str, Any], collate: Any) -> list[Any]:
    """What the model says of the test rows, in their order."""
    import torch

    model.eval()
    rows = [{k: v for k, v in row.items() if k != "labels" or not job["outputs"]} for row in job["test"]]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # little padding here, too
    answers: dict[int, Any] = {}
    with torch.inference_mode(), _autocast(job):
        for at in range(0, len(order), 64 if job["outputs"] else 1):
            part = order[at : at + (64 if job["outputs"] else 1)]
            out = model(**collate([rows[i] for i in part]))
            answers |= dict(zip(part, out.logits.float().tolist() if job["outputs"] else [float(out.loss)], strict=True))
    return [answers[i] for i in range(len(rows))]


if __name__ == "__main__":
    serve(work)
