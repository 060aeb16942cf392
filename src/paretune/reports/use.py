"""The lines of Python on a model card that open an exported folder and ask it once; they run as they stand, in the folder."""

from __future__ import annotations

from typing import Any

from paretune.pareto.records import Record

RUN = '''import paretune as pt

run = pt.read_run(".")  # the path of this folder
print(run.predict(["a new text"]))'''

_CLASSES = "print(dict(zip(model.config.id2label.values(), logits.{}.tolist())))"
_LOGITS = "logits = model(**inputs).logits[0]"


def hub(record: Record, auto: str) -> str:
    """For a folder that `from_pretrained` opens, with paretune where the run's `loads_with` asks for it.

    Args:
        auto: the class that opens it, as "AutoModelForSequenceClassification".
    """
    ours = ["import paretune  # which opens it in transformers"] if record["loads_with"].endswith("paretune") else []
    reader, name = _processor(record)
    opened = ['folder = "."  # the path of this folder', f"model = transformers.{auto}.from_pretrained(folder)", f"{name} = {reader}.from_pretrained(folder)"]
    return "\n".join([*ours, "import transformers", "", *opened, *_ask(record)])


def adapter(record: Record, auto: str, *, config: dict[str, Any], base: str, revision: str | None, head: dict[str, Any]) -> str:
    """For an adapter's folder, which goes on the unchanged backbone.

    Args:
        config: of the adapter; it says whether PEFT knows its kind.
        base: where the backbone is: a hub id or a folder.
        head: what `from_pretrained` needs to make the task's head, as `num_labels`.
    """
    theirs = config["peft_type"] != "PARETUNE"
    reader, name = _processor(record)
    at = f", revision={revision!r}" if revision else ""
    made = "".join(f", {key}={value!r}" for key, value in head.items())
    put = 'model = peft.PeftModel.from_pretrained(model, ".")' if theirs else 'model = pt.read_peft(model, ".")'
    imports = ["import peft" if theirs else "import paretune as pt", "import transformers"]
    opened = [f"base = {base!r}", f"model = transformers.{auto}.from_pretrained(base{at}{made})", f"{put}  # the path of this folder",
              f"{name} = {reader}.from_pretrained(base{at})"]  # fmt: skip
    return "\n".join([*imports, "", *opened, *_ask(record)])


def _kind(record: Record) -> str:
    return record.get("task_definition", {}).get("kind", "classification")


def _processor(record: Record) -> tuple[str, str]:
    """The class that opens what reads the inputs, and the variable that holds it."""
    readers = {"image": ("transformers.AutoImageProcessor", "processor"), "audio": ("transformers.AutoFeatureExtractor", "processor")}
    return readers.get(_kind(record), ("transformers.AutoTokenizer", "tokenizer"))


def _ask(record: Record) -> list[str]:
    """One question to `model`, in the form of the run's kind of task."""
    kind, columns = _kind(record), record.get("task_definition", {}).get("columns", {})
    scale = record.get("label_scale") or {"label_std": 1.0, "label_mean": 0.0}
    pair = ', "and what it is paired with"' if "pair" in columns else ""
    text = f'inputs = tokenizer("a new text"{pair}, return_tensors="pt")'
    asks = {
        "regression": [text, _LOGITS, f"print(logits.item() * {scale['label_std']!r} + {scale['label_mean']!r})"],
        "multilabel": [text, _LOGITS, _CLASSES.format("sigmoid()")],
        "tokens": [text, _LOGITS, "print([model.config.id2label[i] for i in logits.argmax(-1).tolist()])  # one for each token"],
        "choice": ['inputs = tokenizer(["a question"] * 2, ["an answer", "another"], padding=True, return_tensors="pt")',
                   "print(model(**{name: tensor[None] for name, tensor in inputs.items()}).logits.argmax(-1).item())  # which answer"],
        "image": ["import PIL.Image", "", 'inputs = processor(PIL.Image.new("RGB", (64, 64)), return_tensors="pt")  # or PIL.Image.open("photo.png")',
                  _LOGITS, _CLASSES.format("softmax(-1)")],
        "audio": ["inputs = processor([0.0] * processor.sampling_rate, sampling_rate=processor.sampling_rate, return_tensors=\"pt\")  # a second of sound",
                  _LOGITS, _CLASSES.format("softmax(-1)")],
    }  # fmt: skip
    writes = [text, "print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))"]
    asks |= {"generation": writes, "language": writes}
    return asks.get(kind, [text, _LOGITS, _CLASSES.format("softmax(-1)")])
