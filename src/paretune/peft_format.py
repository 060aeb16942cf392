"""The adapter folder of Hugging Face PEFT, written and read: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module>.lora_A.weight (r, I), .lora_B.weight (O, r)      W ← W + (lora_alpha / r) B A
    base_model.model.<module>.ia3_l         (1, I) rescales the input of a feed-forward map, (O, 1) the output of any other
    base_model.model.<module>.<parameter>   of the modules_to_save, such as the task's head: the trained values, whole

After the source of huggingface/peft 0.21 (utils/save_and_load.py, tuners/lora, tuners/ia3). PEFT warns or says nothing where
a tensor is missing, left over or without effect; here each of these is an error.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from paretune import anatomy, store, surgery
from paretune.anatomy import Site
from paretune.anatomy.structure import modules_of
from paretune.errors import Incompatible, StoreError, did_you_mean, one_of
from paretune.methods.adapters.ia3 import IA3, InputScale, OutputScale
from paretune.methods.adapters.lora import LoRA, LowRank
from paretune.roles import Adapter
from paretune.seams import CHILD, Patch, Selected, seam_of

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
TASK_TYPES = {  # PEFT's name of a task -> transformers' table of the classes for it
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
CLASSIFIERS = ("classifier", "score")  # PEFT adds both to modules_to_save of these tasks, whether the model has them or not


def save(model: nn.Module, folder: Path, *, base: str, revision: str | None = None) -> None:
    """Writes the active adapters of a model, and its head, as one PEFT adapter.

    Args:
        model: with LoRA patches only, or with (IA)³ patches only, on an unchanged backbone.
        folder: exists.
        base: hub id or folder of the backbone, for PEFT to find it.
        revision: of the backbone on the hub.

    Raises:
        Incompatible: for patches of any other method, or none.
    """
    patches = _patches(model)
    config, tensors = (_lora if isinstance(next(iter(patches.values()))[0], LowRank) else _ia3)(model, patches)
    head = anatomy.head(model)
    in_head = tuple(f"{path}." for path in head)
    inside = next((path for path in patches if f"{path}.".startswith(in_head)), None)
    if inside is not None:
        raise Incompatible(f"a PEFT file holds the task's head whole, and {inside}, a part of it, is adapted; leave it out of the targets")
    tensors |= {n: t for n, t in model.state_dict().items() if n.startswith(in_head) and CHILD not in n.split(".")}
    task = next((name for name, classes in TASK_TYPES.items() if type(model).__name__ in classes.values()), None)
    config |= {
        "base_model_name_or_path": base, "revision": revision, "task_type": task, "inference_mode": True, "target_modules": sorted(patches),
        "modules_to_save": head or None,
        "auto_mapping": None if task else {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
    }  # fmt: skip
    save_file({PREFIX + n: t.detach().clone().contiguous() for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _patches(model: nn.Module) -> dict[str, list[Patch]]:
    """The active patches by module, all of LoRA or all of (IA)³."""
    found: dict[str, list[Patch]] = {}
    for path, _, seam in surgery.seams_of(model):
        for _, _, patch in seam.patches(surgery.state(model).active):
            if isinstance(patch, Selected):
                continue
            if type(patch) not in (LowRank, InputScale, OutputScale):
                raise Incompatible(f"{patch.method!r} has no place in a PEFT file, which holds lora or ia3")
            found.setdefault(path, []).append(patch)
    kinds = {type(p) is LowRank for ps in found.values() for p in ps}
    if len(kinds) != 1:
        raise Incompatible(f"a PEFT file holds either lora or ia3, and the model has {'both' if kinds else 'neither'} on it")
    return found


def _lora(model: nn.Module, patches: dict[str, list[Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One pair A, B per module, all of one rank r and one lora_alpha.

    Several updates of a module (of later phases, or of the parts of a fused one) are one of higher rank, since
    s₁ B₁ A₁ + s₂ B₂ A₂ = [s₁ B₁, s₂ B₂] [A₁; A₂]; a part's B has zeros in the rows of other parts; a lower rank is filled
    up with zeros. A scale s that all updates share is lora_alpha = s·r; where they differ, each goes into its B, and lora_alpha = r.
    """
    rank = max(sum(len(p.A) for p in ps) for ps in patches.values())
    scales = {p.scale for ps in patches.values() for p in ps}
    alpha = next(iter(scales)) * rank if len(scales) == 1 else rank
    tensors: dict[str, Tensor] = {}
    for path, ps in patches.items():
        out_features, in_features = anatomy.weight(model.get_submodule(path)).shape
        down, up, used = torch.zeros(rank, in_features), torch.zeros(out_features, rank), 0
        for p in ps:
            columns = slice(used, used := used + len(p.A))
            down[columns] = p.A.detach().float().cpu()
            up[_rows(p.site), columns] = p.B.detach().float().cpu() * (1.0 if len(scales) == 1 else p.scale)
        tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "rank_pattern": {}, "alpha_pattern": {},
        "lora_dropout": max(p.dropout for ps in patches.values() for p in ps), "bias": "none", "use_rslora": False, "use_dora": False,
        "init_lora_weights": True,
    }  # fmt: skip
    return config | _fan(model, patches), tensors


def _ia3(model: nn.Module, patches: dict[str, list[Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One vector per module: the product of its patches' scales, with ones where a part of a fused module has none."""
    tensors, inner = {}, [path for path, ps in patches.items() if isinstance(ps[0], InputScale)]
    for path, ps in patches.items():
        out_features, in_features = anatomy.weight(model.get_submodule(path)).shape
        if any(isinstance(p, InputScale) and p.site.rows is not None or type(p) is not type(ps[0]) for p in ps):
            raise Incompatible(f"{path}: a PEFT file rescales the whole input of a module or its output, and ia3 does otherwise here")
        scale = torch.ones(in_features if path in inner else out_features)
        for p in ps:
            scale[_rows(p.site)] *= p.scale.detach().float().cpu()
        tensors[f"{path}.ia3_l"] = scale[None, :] if path in inner else scale[:, None]
    return {"peft_type": "IA3", "feedforward_modules": sorted(inner), "init_ia3_weights": True} | _fan(model, patches), tensors


def _rows(site: Site) -> Any:
    return slice(None) if site.rows is None else torch.tensor(site.rows)


def _fan(model: nn.Module, patches: Iterable[str]) -> dict[str, bool]:
    return {"fan_in_fan_out": all(anatomy.is_transposed(model.get_submodule(path)) for path in patches)}


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What a file must hold for one module."""

    site: Site
    method: Adapter
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # the patch's tensor -> its name in the file, and its shape there
    idle: float  # the value of the last of them at which the adapter changes nothing

    def changes(self, tensors: dict[str, Tensor]) -> bool:
        name, _ = list(self.tensors.values())[-1]
        return bool((tensors[name] != self.idle).any())

    def pairs(self, model: nn.Module, name: str) -> list[tuple[nn.Parameter, str]]:
        """The attached patch's parameters, each with its name in the file."""
        seam = seam_of(model.get_submodule(self.site.path))
        assert seam is not None
        (patch,) = (p for _, _, p in seam.patches([name]) if not isinstance(p, Selected))
        return [(getattr(patch, attribute), tensor) for attribute, (tensor, _) in self.tensors.items()]


def read_peft(model: nn.Module, folder: str | Path, *, name: str = "default") -> nn.Module:
    """Puts a LoRA or (IA)³ adapter that PEFT wrote on its backbone, active and ready to train; the model stays the same object.

    Args:
        model: the backbone, of the class that the adapter was made on.
        folder: with adapter_config.json and adapter_model.safetensors (or .bin, which is read without running code from it).
        name: to switch, remove or route rows by.

    Raises:
        Incompatible: for another kind of adapter, a setting that paretune lacks, or a target that the model has not.
        StoreError: for a damaged folder, a tensor that is missing, left over or of the wrong shape, or a file that changes nothing.
    """
    folder = Path(folder)
    config, tensors = store.read_json(folder / CONFIG), _load(folder)
    kind = str(config.get("peft_type"))
    if kind not in _PIECES:
        raise Incompatible(f"{folder} holds {kind}, which cannot be read{did_you_mean(kind, _PIECES)}; {one_of(_PIECES)} can")
    _refuse_unread(folder, config)
    saved = _saved(config, model)
    pieces = _PIECES[kind](config, model, _targets(config, model))
    shapes = {n: s for p in pieces for n, s in p.tensors.values()} | {PREFIX + n: tuple(p.shape) for n, p in saved.items()}
    _check(folder, model, shapes, tensors)
    if not saved and not any(p.changes(tensors) for p in pieces):
        raise StoreError(f"{folder}: the adapter changes nothing, as it was never trained; was another file meant?")
    _attach(model, name, pieces, list(saved))
    with torch.no_grad():
        for parameter, tensor in [pair for p in pieces for pair in p.pairs(model, name)] + [(p, PREFIX + n) for n, p in saved.items()]:
            parameter.copy_(tensors[tensor].view_as(parameter))
    return model


def _attach(model: nn.Module, name: str, pieces: list[_Piece], saved: list[str]) -> None:
    surgery.attach(model, [], name=name, head=False)
    for piece in pieces:  # a patch is spelled with its own module only: a config that repeats all of them grows as their square
        surgery.install(model, name, dataclasses.replace(piece.method, targets=piece.site.path), piece.site)  # type: ignore[call-arg]
    surgery.select(model, name, surgery.HEAD, saved)
    surgery.state(model).adapters[name] = tuple(dict.fromkeys(p.method for p in pieces))
    surgery.switch(model, name)


def _load(folder: Path) -> dict[str, Tensor]:
    file = next((folder / f for f in (WEIGHTS, OLD_WEIGHTS) if (folder / f).is_file()), None)
    if file is None:
        raise StoreError(f"{folder} holds neither {WEIGHTS} nor {OLD_WEIGHTS}; give the folder that PEFT's save_pretrained wrote")
    try:
        tensors = load_file(file) if file.name == WEIGHTS else torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise StoreError(f"{file} is damaged, or holds more than tensors ({str(error).strip().splitlines()[0]})") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise StoreError(f"{file} holds more than named tensors; it is no adapter of PEFT")
    return tensors


# What this file reads, and what changes nothing in the meaning of the tensors. Any other setting must be empty.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "feedforward_modules", "inference_mode",
    "init_ia3_weights", "init_lora_weights", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def _refuse_unread(folder: Path, config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key not in _KNOWN and value not in (None, False, "none", {}, []):
            raise Incompatible(f"{folder}: {key}={value!r} cannot be read; merge the adapter in PEFT (merge_and_unload) and load that as a backbone")
    start = config.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal"):
        raise Incompatible(f"{folder}: init_lora_weights={start!r} changed the backbone; save with PEFT's path_initial_model_for_weight_conversion")


def _targets(config: dict[str, Any], model: nn.Module) -> list[Site]:
    """The linear maps that the config names, in the model's order."""
    wanted = _patterns(config.get("target_modules"))
    barred = [*_patterns(config.get("exclude_modules")).values(), *(rf"(.*\.)?{word}(\..*)?" for word in _saved_names(config))]
    modules = [path for path in modules_of(model) if path]
    idle = [word for word, pattern in wanted.items() if not any(_fits(pattern, path) for path in modules)]
    found = [path for path in modules if any(_fits(p, path) for p in wanted.values()) and not any(_fits(p, path) for p in barred)]
    if idle or not found:
        near = did_you_mean(idle[0], {path.rpartition(".")[2] for path in modules}) if idle else ""
        raise Incompatible(f"target_modules {one_of(map(repr, idle or wanted))} hits nothing in {type(model).__name__}{near}")
    other = next((p for p in found if not anatomy.is_linear(model.get_submodule(p))), None)
    if other is not None:
        raise Incompatible(f"target_modules hits {other}, a {type(model.get_submodule(other)).__name__}; adapters of linear maps alone can be read")
    return [s for s in anatomy.resolve(model, found, kind="linear") if s.path in found]


def _patterns(spec: str | list[str] | None) -> dict[str, str]:
    """PEFT's rule as patterns for a whole path: a text is one already, a list holds paths or their ends from a dot on."""
    return {spec: spec} if isinstance(spec, str) else {word: rf"(.*\.)?{re.escape(word)}" for word in spec or ()}


def _fits(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise StoreError(f"{CONFIG}: the pattern {pattern!r} cannot be read ({error})") from None


def _saved_names(config: dict[str, Any]) -> list[str]:
    implied = CLASSIFIERS if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else ()
    return list(dict.fromkeys([*(config.get("modules_to_save") or ()), *implied]))


def _saved(config: dict[str, Any], model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the file brings whole, by name."""
    found: dict[str, nn.Parameter] = {}
    for word in _saved_names(config):
        hit = tuple(f"{path}." for path in modules_of(model) if path.endswith(word))
        if not hit and word not in CLASSIFIERS:
            raise Incompatible(f"modules_to_save {word!r} hits nothing in {type(model).__name__}")
        found |= {n: p for n, p in model.named_parameters() if hit and n.startswith(hit) and CHILD not in n.split(".")}
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    tied = next((n for n, p in found.items() if owners.count(id(p)) > 1), None)
    if tied is not None:
        raise Incompatible(f"modules_to_save holds {tied}, which the model shares between modules; PEFT parts them, and paretune does not")
    return found


def _lora_pieces(config: dict[str, Any], model: nn.Module, sites: list[Site]) -> list[_Piece]:
    paths = [s.path for s in sites]
    ranks = _by_pattern(config, "rank_pattern", paths, config.get("r", 8))
    alphas = _by_pattern(config, "alpha_pattern", paths, config.get("lora_alpha", 8))
    common = {"dropout": config.get("lora_dropout", 0.0), "rank_stabilized": config.get("use_rslora", False)}
    pieces = []
    for site in sites:
        r, alpha = ranks[site.path], alphas[site.path]
        alike = tuple(p for p in paths if (ranks[p], alphas[p]) == (r, alpha))
        tensors = {
            "A": (f"{PREFIX}{site.path}.lora_A.weight", (r, site.in_features)),
            "B": (f"{PREFIX}{site.path}.lora_B.weight", (site.out_features, r)),
        }
        pieces.append(_Piece(site, LoRA(r=r, alpha=alpha, targets=alike, **common), tensors, idle=0.0))
    return pieces


def _by_pattern(config: dict[str, Any], key: str, paths: list[str], default: Any) -> dict[str, Any]:
    """A module's value: that of the first pattern which its path, or an end of it, matches."""
    patterns = config.get(key) or {}
    hits = {path: next((p for p in patterns if _fits(rf"(.*\.)?({p})", path)), None) for path in paths}
    idle = next((p for p in patterns if p not in hits.values()), None)
    if idle is not None:
        raise Incompatible(f"{key}: {idle!r} matches none of the adapted modules")
    return {path: default if hit is None else patterns[hit] for path, hit in hits.items()}


def _ia3_pieces(config: dict[str, Any], model: nn.Module, sites: list[Site]) -> list[_Piece]:
    inner = config.get("feedforward_modules") or []
    method = IA3(targets=tuple(s.path for s in sites))
    pieces = []
    for site in sites:
        enters = _fits(inner, site.path) if isinstance(inner, str) else any(site.path.endswith(word) for word in inner)
        # our (IA)³ goes by the site's place, PEFT's by the list in the file; where they differ, the place follows the file
        if enters != (site.place in anatomy.FFN):
            site = dataclasses.replace(site, place="down" if enters else "other")
        shape = (1, site.in_features) if enters else (site.out_features, 1)
        pieces.append(_Piece(site, method, {"scale": (f"{PREFIX}{site.path}.ia3_l", shape)}, idle=1.0))
    return pieces


_PIECES: dict[str, Callable[[dict[str, Any], nn.Module, list[Site]], list[_Piece]]] = {"LORA": _lora_pieces, "IA3": _ia3_pieces}


def _check(folder: Path, model: nn.Module, shapes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    """Every tensor that is asked for is there with its shape, and no other."""
    missing, extra = [n for n in shapes if n not in tensors], [n for n in tensors if n not in shapes]
    if missing or extra:
        parts = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("has over", extra)) if names]
        raise StoreError(f"{folder}: for {type(model).__name__} the file {' and '.join(parts)}; was the adapter made on another class of model?")
    wrong = next((n for n, shape in shapes.items() if tuple(tensors[n].shape) != shape), None)
    if wrong is not None:
        raise StoreError(f"{folder}: {wrong} has shape {tuple(tensors[wrong].shape)}; with this config {type(model).__name__} needs {shapes[wrong]}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
