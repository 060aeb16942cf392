"""What all kinds of adapter files share: the two files themselves, heads, fingerprints, and what a file must hold."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from paretune import anatomy, processors, surgery
from paretune.anatomy import Site
from paretune.anatomy.structure import modules_of
from paretune.errors import Incompatible, StoreError
from paretune.roles import Adapter
from paretune.seams import CHILD, Patch, Selected, seam_of

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FINGERPRINT = "backbone"  # in the metadata of the tensors' file: one value of each parameter below the adapter
TOKENIZER = "tokenizer"  # in the same place: name and fingerprint of the one that the adapter was trained with
TASK_TYPES = {  # PEFT's name of a task -> transformers' table of the classes for it
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
CLASSIFIERS = ("classifier", "score")  # PEFT adds both to modules_to_save of these tasks, whether the model has them or not
IDLE = "{}: the adapter changes nothing, as it was never trained; was another file meant?"
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")  # PEFT wraps these one level less deep


@dataclasses.dataclass(frozen=True)
class Found:
    """What is on a model: active patches with their modules' paths, and the model's own parameters that were trained, but the head's."""

    patches: list[tuple[str, Patch]]
    trained: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a patch's tensor stands in a file: name and shape there, and what of that tensor it is; where all have their `idle` values nothing changes."""

    name: str
    shape: tuple[int, ...]
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor
    idle: float | Tensor | None = None  # None: a tensor that changes nothing by itself; a Tensor was computed, and is compared up to its rounding

    def moved(self, tensor: Tensor) -> bool:
        """Has the file's tensor another value than its idle one?"""
        if isinstance(self.idle, Tensor):
            return not torch.allclose(tensor.float(), self.idle.to(tensor.device), rtol=4 * torch.finfo(tensor.dtype).eps, atol=0.0)
        return bool((tensor != self.idle).any())


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a file must hold for one site."""

    site: Site
    method: Adapter
    slots: dict[str, Slot]  # by the patch's tensor

    @property
    def telling(self) -> list[Slot]:
        """The slots that tell whether the adapter changes something; of virtual tokens, which always do, none."""
        return [slot for slot in self.slots.values() if slot.idle is not None]

    @property
    def spelled(self) -> Adapter:
        """The method for this site alone: a config in which every patch names all sites grows as their square."""
        return dataclasses.replace(self.method, targets=self.site.path) if self.telling else self.method  # type: ignore[call-arg]

    def changes(self, tensors: dict[str, Tensor]) -> bool:
        """Does it change the backbone's output?"""
        return not self.telling or any(slot.moved(tensors[slot.name]) for slot in self.telling)

    def pairs(self, model: nn.Module, name: str, *, tensors: dict[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """The attached patch's parameters, each with its value."""
        seam = seam_of(model.get_submodule(self.site.path))
        assert seam is not None
        patch = next((p for _, _, p in seam.patches([name]) if not isinstance(p, Selected) and p.site == self.site), None)
        return [(getattr(patch, attribute), slot.take(tensors[slot.name])) for attribute, slot in self.slots.items()]


def found(model: nn.Module, trained: Iterable[str]) -> Found:
    """What is on the model.

    Raises:
        Incompatible: if nothing is.
    """
    head, patches, names = surgery.in_head(model), [], dict.fromkeys(n for n in trained)
    for path, _, seam in surgery.seams_of(model):
        for _, key, patch in seam.patches(surgery.state(model).active):
            if not isinstance(patch, Selected):
                patches.append((path, patch))
            elif key != surgery.HEAD:
                names |= dict.fromkeys(f"{path}.{n}".lstrip(".") for n in patch.names)
    kept = tuple(n for n in names if not head(n))
    if not patches and not kept and not surgery.head_parameters(model):
        raise Incompatible("an adapter's file holds what is on a model, and nothing is on this one; attach an adapter, or switch it on")
    return Found(patches, kept)


def head_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the task's head, by name."""
    inside = tuple(f"{path}." for path in anatomy.head(model))
    return {n: t for n, t in model.state_dict().items() if inside and n.startswith(inside) and CHILD not in n.split(".")}


def head_prefix(kind: str) -> str:
    """What stands before a module's path in the names of a file of this type."""
    return "base_model." if kind in PROMPTS else PREFIX


def task_type(model: nn.Module) -> str | None:
    """PEFT's name of the model's task; None for one that it has none for."""
    return next((name for name, classes in TASK_TYPES.items() if type(model).__name__ in classes.values()), None)


def load(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder.

    Raises:
        StoreError: for a folder without them, or a file that is damaged or holds more.
    """
    file = next((folder / f for f in (WEIGHTS, OLD_WEIGHTS) if (folder / f).is_file()), None)
    if file is None:
        raise StoreError(f"{folder} holds neither {WEIGHTS} nor {OLD_WEIGHTS}; give the folder that PEFT's save_pretrained wrote")
    return load_tensors(file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, read without running code from it.

    Raises:
        StoreError: for a file that is damaged or holds more.
    """
    try:
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise StoreError(f"{file} is damaged, or holds more than tensors ({str(error).strip().splitlines()[0]})") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise StoreError(f"{file} holds more than named tensors; it is no adapter of PEFT")
    return tensors


def saved_names(config: dict[str, Any]) -> list[str]:
    """The modules that a file brings whole, as its config names them."""
    implied = CLASSIFIERS if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else ()
    return list(dict.fromkeys([*(config.get("modules_to_save") or ()), *implied]))


def saved(config: dict[str, Any], model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of those modules, by name.

    Raises:
        Incompatible: for a module that the model has not, or that shares its weight with another.
    """
    hits: dict[str, nn.Parameter] = {}
    for word in saved_names(config):
        hit = tuple(f"{path}." for path in modules_of(model) if path.endswith(word))
        if not hit and word not in CLASSIFIERS:
            raise Incompatible(f"modules_to_save {word!r} hits nothing in {type(model).__name__}")
        hits |= {n: p for n, p in model.named_parameters() if hit and n.startswith(hit) and CHILD not in n.split(".")}
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    tied = next((n for n, p in hits.items() if owners.count(id(p)) > 1), None)
    if tied is not None:
        raise Incompatible(f"modules_to_save holds {tied}, which the model shares between modules; PEFT parts them, and paretune does not")
    return hits


def patterns(spec: str | list[str] | None) -> dict[str, str]:
    """PEFT's rule as patterns for a whole path: a text is one already, a list holds paths or their ends from a dot on."""
    return {spec: spec} if isinstance(spec, str) else {word: rf"(.*\.)?{re.escape(word)}" for word in spec or ()}


def fits(pattern: str, path: str) -> bool:
    """Does a whole path match the pattern?"""
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise StoreError(f"{CONFIG}: the pattern {pattern!r} cannot be read ({error})") from None


def check(source: Path, model: nn.Module, *, shapes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    """Every tensor that is asked for is there with its shape, and no other."""
    missing, extra = [n for n in shapes if n not in tensors], [n for n in tensors if n not in shapes]
    if missing or extra:
        parts = [f"{what} {some(names)}" for what, names in (("lacks", missing), ("has over", extra)) if names]
        raise StoreError(f"{source}: for {type(model).__name__} the file {' and '.join(parts)}; was the adapter made on another class of model?")
    wrong = next((n for n, shape in shapes.items() if tuple(tensors[n].shape) != tuple(shape)), None)
    if wrong is not None:
        raise StoreError(f"{source}: {wrong} has shape {tuple(tensors[wrong].shape)}; with this config {type(model).__name__} needs {tuple(shapes[wrong])}")


def refuse_idle(source: Path, model: nn.Module) -> None:
    """Are the answers to a short input, bit for bit, what they are with the active adapters switched off?

    Raises:
        StoreError: then, since such a file was never trained; a model without values is passed over.
    """
    if any(p.is_meta for p in model.parameters()):
        return
    active, was_training = surgery.state(model).active, model.training
    model.eval()
    with torch.no_grad():
        adapted = model(**anatomy.small_input(model))[0]
        surgery.switch(model)
        plain = model(**anatomy.small_input(model))[0]
    surgery.switch(model, *active)
    model.train(was_training)
    if torch.equal(adapted, plain):
        raise StoreError(IDLE.format(source))


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def fingerprint(model: nn.Module, *, without: Iterable[str]) -> str:
    """One value of each of the backbone's parameters, as JSON: the same in any number format, but for its rounding."""
    left_out, head = set(without), surgery.in_head(model)
    own = {n: p for n, p in model.named_parameters() if n not in left_out and not head(n) and CHILD not in n.split(".")}
    return json.dumps({n: _middle(p) for n, p in own.items() if p.is_floating_point() and not p.is_meta})


def _middle(parameter: Tensor) -> float:
    return float(parameter.detach().flatten()[parameter.numel() // 2])


def check_backbone(source: Path, model: nn.Module) -> None:
    """Compares the model with the fingerprints in the file, if there are any; packed and unmaterialized parameters are passed over.

    Raises:
        StoreError: for another tokenizer, or a parameter with another value.
    """
    file = source / WEIGHTS
    if not file.is_file():
        return
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    told, tokenizer = (json.loads(metadata.get(name, "{}")) for name in (FINGERPRINT, TOKENIZER))
    instead = f"load {_base(source)} with that tokenizer, or say same_backbone=False"
    processors.refuse_another(model, tokenizer, source=source, instead=instead)
    here = {n: p for n, p in model.named_parameters() if not p.is_meta}
    other = next((n for n, value in told.items() if n in here and abs(_middle(here[n]) - value) > 0.01 * abs(value) + 1e-6), None)
    if other is not None:
        raise StoreError(f"{source}: the adapter was made on another backbone, as {other} has other values; load {_base(source)}, or say same_backbone=False")


def _base(source: Path) -> str:
    return str(json.loads((source / CONFIG).read_text()).get("base_model_name_or_path"))
