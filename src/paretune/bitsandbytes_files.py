"""A run in NF4 as a folder that transformers opens with bitsandbytes, and checked (`parity`) against the run's model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from paretune import anatomy, backbones, hub, processors, store, surgery
from paretune.errors import Incompatible, one_of
from paretune.methods.transforms.nf4 import NF4
from paretune.parity import Answers, Parity, require_rows
from paretune.tasks import Task
from paretune.weights import bitsandbytes_format
from paretune.weights.packed import Packed

NEEDED = ("bitsandbytes", "accelerate")
BF16 = "support_avx512bf16_for_cpu"  # bitsandbytes' switch, on each of its maps
NOTES = ("compared in fp32; on a processor with AVX512-BF16 bitsandbytes multiplies in bf16, for which a map's outputs must be a multiple of 32",)


def write(model: nn.Module, task: Task, *, folder: Path, auto: str, name: str) -> Parity:
    """Writes config, tensors and processor, and compares what transformers opens there with the model on the task's test rows.

    Args:
        model: opened from its folder, in evaluation mode; its config is changed.
        auto: the class that opens it, as "AutoModelForSequenceClassification".
        name: how an error calls it.

    Raises:
        Incompatible: without bitsandbytes, for a run that is not NF4 alone, or where the folder answers otherwise.
        StoreError: for too little disk.
    """
    method = _method(model, task, name=name)
    tensors = bitsandbytes_format.write(model)
    store.require_space(folder, 1.1e-6 * sum(t.numel() * t.element_size() for t in tensors.values()))
    answers = Answers.of(model, task)
    model.config.__dict__.pop("attn_implementation", None)
    packed = {path for path, module in model.named_modules() if isinstance(module, Packed)}
    about = _config(method, float_maps=[path for path, m in model.named_modules() if path not in packed and anatomy.is_linear(m)])
    model.save_pretrained(folder, state_dict=tensors)
    config = store.read_json(folder / "config.json")
    store.write_json(folder / "config.json", {k: v for k, v in config.items() if k != "attn_implementation"} | {"quantization_config": about})
    processors.save(model, folder)
    with backbones.quiet():
        theirs = getattr(transformers, auto).from_pretrained(folder, device_map="cpu")
    backbones.travel(theirs, surgery.state(model).processor)
    for module in theirs.modules():
        if hasattr(module, BF16):
            setattr(module, BF16, False)  # the numbers in the file are compared, in fp32
    parity = answers.beside(Answers.of(theirs.eval(), task), task, form="nf4", notes=NOTES)
    parity.check(name)
    return parity


def _method(model: nn.Module, task: Task, *, name: str) -> NF4:
    """The one NF4 that packed all that is packed."""
    absent = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if absent:
        raise Incompatible(f"export to bitsandbytes is checked with {one_of(absent)}, which is not installed; pip install bitsandbytes accelerate")
    require_rows(task, name=name)
    methods = {m.packed_by: m.method for m in model.modules() if isinstance(m, Packed)}
    if len(methods) != 1 or not isinstance(method := next(iter(methods.values())), NF4):
        what = f"this run has {one_of(sorted(methods))}" if methods else "this run has float weights"
        raise Incompatible(f"{name}: a folder for bitsandbytes has maps in NF4, and {what}; end the recipe with nf4, or export with --to hf")
    record = hub.record(model) or {}
    other = next((what for what in ("patches", "selected", "resized", "shared") if record.get(what)), None)
    if other is not None:
        raise Incompatible(f"{name}: transformers opens no {_WORDS[other]} without paretune; end the recipe with merge | nf4, or export with --to hf")
    odd = next(((path, m.shape[1]) for path, m in model.named_modules() if isinstance(m, Packed) and m.shape[1] % method.block), None)
    if odd is not None:
        raise Incompatible(f"{name}: on a processor bitsandbytes reads blocks of {method.block} that lie in two rows wrongly, and {odd[0]} has {odd[1]} inputs; "
                           "take an nf4(block=...) that divides them, or export with --to hf")  # fmt: skip
    return method


_WORDS = {"patches": "adapters", "selected": "adapters", "resized": "maps of other shapes", "shared": "shared layers"}


def _config(method: NF4, *, float_maps: list[str]) -> dict[str, Any]:
    """What transformers hands to bitsandbytes."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=method.double_quant, bnb_4bit_compute_dtype="float32",
        llm_int8_skip_modules=float_maps,
    ).to_dict()  # fmt: skip
