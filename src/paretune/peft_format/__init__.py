"""The adapter folder of Hugging Face PEFT, written and read: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module>.lora_A.weight (r, I), .lora_B.weight (O, r)      W ← W + (lora_alpha / r) B A
    base_model.model.<module>.ia3_l         (1, I) rescales the input of a feed-forward map, (O, 1) the output of any other
    base_model.model.<module>.<parameter>   of the modules_to_save, such as the task's head: the trained values, whole
    prompt_embeddings                       virtual tokens (P, D); keys and values of a prefix (P, layers · 2 · N · D)

After the source of huggingface/peft 0.21 (utils/save_and_load.py, tuners, peft_model.py). PEFT warns or says nothing where
a tensor is missing, left over or without effect; here each of these is an error. What PEFT has no tensors for is written in
the same two files under a type of our own, PARETUNE, which PEFT refuses by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from paretune import anatomy, processors, store, surgery
from paretune.errors import Incompatible, StoreError, all_of, did_you_mean, one_of
from paretune.peft_format import bare, files, linear, own, prompts
from paretune.peft_format.files import CONFIG, OLD_WEIGHTS, PREFIX, WEIGHTS, Piece

__all__ = ["CONFIG", "OLD_WEIGHTS", "PREFIX", "WEIGHTS", "read_peft", "save"]

_WRITERS = {  # by the patches that all must be of
    linear.OF_LORA: linear.write_lora, linear.OF_DORA: linear.write_dora, linear.OF_IA3: linear.write_ia3,
    prompts.OF_PROMPT: prompts.write_prompt, prompts.OF_PREFIX: prompts.write_prefix,
}  # fmt: skip
_READERS = {
    "LORA": linear.read_lora, "IA3": linear.read_ia3, "PROMPT_TUNING": prompts.read_prompt, "P_TUNING": prompts.read_prompt,
    "PREFIX_TUNING": prompts.read_prefix,
}  # fmt: skip


def save(model: nn.Module, folder: Path, *, base: str, revision: str | None = None, trained: tuple[str, ...] = ()) -> str:
    """Writes the active adapters of a model, and its head, as one adapter folder.

    Args:
        folder: exists.
        base: hub id or folder of the backbone, for PEFT to find it.
        revision: of the backbone on the hub.
        trained: names of the backbone's own parameters that are not as they were, beside those that an attached adapter tells of.

    Returns:
        The type of adapter that the file says it holds: one of PEFT's, or "PARETUNE".

    Raises:
        Incompatible: for a model with nothing on it to write.
        StoreError: for an adapter whose values are not in this process.
    """
    found = files.found(model, trained)
    hollow = next((f"{path}.{n}" for path, patch in found.patches for n, p in patch.named_parameters() if not p.numel()), None)
    if hollow is not None:
        raise StoreError(f"{folder}: the adapter's {hollow} is empty, as its values are spread over several processes; gather them in this one and save again")
    try:
        config, tensors = _as_peft(model, found)
    except Incompatible as reason:
        config, tensors = own.write(model, found, reason=str(reason))
    config |= {"base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    metadata = {"format": "pt", files.FINGERPRINT: files.fingerprint(model, without=found.trained)}
    tokenizer = processors.told(model)
    metadata |= {files.TOKENIZER: json.dumps(tokenizer)} if tokenizer else {}
    save_file({n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}, folder / WEIGHTS, metadata=metadata)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return str(config["peft_type"])


def _as_peft(model: nn.Module, found: files.Found) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """As the first of PEFT's types that says the same; else Incompatible, with the reason."""
    kinds = [write for types, write in _WRITERS.items() if all(type(patch) in types for _, patch in found.patches)]
    if not found.patches or not kinds:
        names = one_of(dict.fromkeys(repr(patch.method) for _, patch in found.patches)) if found.patches else "the model's own parameters"
        raise Incompatible(f"a file of PEFT's holds one of its own kinds of adapter, and not {names}")
    head = anatomy.head(model)
    inside = next((path for path, _ in found.patches if f"{path}.".startswith(tuple(f"{h}." for h in head))), None)
    if inside is not None:
        raise Incompatible(f"a file of PEFT's holds the task's head whole, and {inside}, a part of it, is adapted")
    config, tensors = kinds[0](model, found)
    prefix = files.head_prefix(config["peft_type"])
    tensors |= {prefix + n: t for n, t in files.head_tensors(model).items()}
    task = files.task_type(model)
    if task is None and prefix != PREFIX:
        raise Incompatible(f"PEFT has no kind of task for {type(model).__name__}, without which it enters no virtual tokens")
    about = None if task else {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return config | {"task_type": task, "modules_to_save": head or None, "auto_mapping": about}, tensors


def read_peft(model: nn.Module, source: str | Path, *, name: str = "default", alpha: float | None = None, same_backbone: bool = True) -> nn.Module:
    """Puts an adapter that was saved in PEFT's format on its backbone, active and ready to train; the model stays the same object.

    Args:
        model: the backbone, of the class that the adapter was made on.
        source: a folder with adapter_config.json and adapter_model.safetensors (or .bin, which is read without running code from it); or
            one file of bare tensors, as loralib and T-Few publish them.
        name: to switch, remove or route rows by.
        alpha: of loralib's file, which does not say it.
        same_backbone: refuse a backbone with other values, or another tokenizer, than `export` found below the adapter, where the file tells.

    Raises:
        Incompatible: for another kind of adapter, a setting that paretune lacks, or a target that the model has not.
        StoreError: for a damaged folder, a tensor that is missing, left over or of the wrong shape, another backbone or tokenizer,
            or a file that changes nothing.
    """
    source = Path(source)
    config, tensors = bare.load(source, alpha) if source.is_file() else (store.read_json(source / CONFIG), files.load(source))
    kind = str(config.get("peft_type"))
    if same_backbone:
        files.check_backbone(source, model)
    if kind == own.TYPE:
        return own.read(model, source, config=config, tensors=tensors, name=name)
    if kind not in _READERS:
        raise Incompatible(f"{source} holds {kind}, which cannot be read{did_you_mean(kind, _READERS)}; {all_of([*_READERS, own.TYPE])} can")
    prefix, heads = files.head_prefix(kind), files.saved(config, model)
    pieces, biases = _READERS[kind](config, model, source=source)
    whole = heads | {n: model.get_parameter(n) for n in biases.values()}
    names = {prefix + n: n for n in heads} | biases  # in the file -> in the model
    shapes = {s.name: s.shape for p in pieces for s in p.slots.values()} | {n: tuple(whole[own_name].shape) for n, own_name in names.items()}
    files.check(source, model, shapes=shapes, tensors={n: t for n, t in tensors.items() if not linear.duplicate(n, config, heads=heads)})
    moved = any(not torch.equal(whole[n], tensors[f].view_as(whole[n]).to(whole[n])) for f, n in names.items())
    if not moved and not any(p.changes(tensors) for p in pieces):
        raise StoreError(files.IDLE.format(source))
    _attach(model, name, pieces, heads=list(heads), biases=list(biases.values()))
    with torch.no_grad():
        for parameter, value in [pair for p in pieces for pair in p.pairs(model, name, tensors=tensors)] + [(whole[n], tensors[f]) for f, n in names.items()]:
            parameter.copy_(value.view_as(parameter))
    return model


def _attach(model: nn.Module, name: str, pieces: list[Piece], *, heads: list[str], biases: list[str]) -> None:
    surgery.attach(model, [], name=name, head=False)
    for piece in pieces:
        surgery.install(model, name, method=piece.spelled, site=piece.site)
    methods = dict.fromkeys(p.method for p in pieces)
    if biases:
        methods[linear.selection(biases)] = None
        surgery.select(model, name, key="bitfit", parameters=biases)
    surgery.select(model, name, key=surgery.HEAD, parameters=heads)
    surgery.state(model).adapters[name] = tuple(methods)
    surgery.switch(model, name)
