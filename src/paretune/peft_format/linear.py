"""Adapters of linear maps in PEFT's files: LoRA with trained biases, and (IA)³."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paretune import anatomy
from paretune.anatomy import Site
from paretune.anatomy.structure import modules_of
from paretune.errors import Incompatible, did_you_mean, one_of
from paretune.methods.adapters.bitfit import BitFit
from paretune.methods.adapters.dora import Decomposed, DoRA
from paretune.methods.adapters.ia3 import IA3, InputScale, OutputScale
from paretune.methods.adapters.lora import LoRA, LowRank
from paretune.peft_format.files import PREFIX, Found, Piece, Slot, fits, patterns, saved_names
from paretune.roles import Adapter
from paretune.seams import CHILD

OF_LORA, OF_DORA, OF_IA3 = (LowRank,), (Decomposed,), (InputScale, OutputScale)
Read = tuple[list[Piece], dict[str, str]]  # what sits where; biases, by their name in the file


def _by_module(found: Found) -> dict[str, list[Any]]:
    patches: dict[str, list[Any]] = {}
    for path, patch in found.patches:
        patches.setdefault(path, []).append(patch)
    return patches


def write_lora(model: nn.Module, found: Found) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One pair A, B per module, all of one rank r and one lora_alpha.

    Several updates of a module (of later phases, or of the parts of a fused one) are one of higher rank, since
    s₁ B₁ A₁ + s₂ B₂ A₂ = [s₁ B₁, s₂ B₂] [A₁; A₂]; a part's B has zeros in the rows of other parts; a lower rank is filled
    up with zeros. A scale s that all updates share is lora_alpha = s·r; where they differ, each goes into its B, and lora_alpha = r.
    """
    patches = _by_module(found)
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
        tensors |= {f"{PREFIX}{path}.lora_A.weight": down, f"{PREFIX}{path}.lora_B.weight": up}
    bias, biases = _biases(model, found.trained, list(patches))
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "rank_pattern": {}, "alpha_pattern": {},
        "lora_dropout": max(p.dropout for ps in patches.values() for p in ps), "bias": bias, "use_rslora": False, "use_dora": False,
        "init_lora_weights": True, "target_modules": sorted(patches),
    }  # fmt: skip
    return config | _fan(model, patches), tensors | biases


def write_dora(model: nn.Module, found: Found) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LoRA's tensors, and the lengths m of all rows: ‖W‖ + Δm, of the rows of a part that is not adapted ‖W‖."""
    config, tensors = write_lora(model, found)
    for path, ps in _by_module(found).items():
        rows = [row for p in ps for row in (range(len(p.stretch)) if p.site.rows is None else p.site.rows)]
        if len(set(rows)) < len(rows):
            raise Incompatible(f"{path}: a file of PEFT's sets the lengths of a map once, and dora of two phases sets them twice")
        lengths = anatomy.weight(model.get_submodule(path)).detach().float().norm(dim=1)
        lengths[rows] += torch.cat([p.stretch.detach().float() for p in ps])
        tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = lengths
    return config | {"use_dora": True}, tensors


def _biases(model: nn.Module, trained: Iterable[str], targets: list[str]) -> tuple[str, dict[str, Tensor]]:
    """PEFT's word for the biases that were trained, and all the biases that it then asks for."""
    trained = set(trained)
    other = next((n for n in trained if n.rpartition(".")[2] != "bias"), None)
    if other is not None:
        raise Incompatible(f"a LoRA file of PEFT's holds trained biases and no other parameters of the model, and {other} was trained")
    if not trained:
        return "none", {}
    word = "lora_only" if trained <= {f"{path}.bias" for path in targets} else "all"
    names = _bias_names(model, targets, word, without=anatomy.head(model))
    return word, {file: model.get_parameter(name) for file, name in names.items()}


def _bias_names(model: nn.Module, targets: list[str], word: str, *, without: list[str]) -> dict[str, str]:
    """Name in the file -> name in the model, of every bias that PEFT trains for `bias=word`."""
    left_out = tuple(f"{path}." for path in without)
    names = [n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias" and CHILD not in n.split(".") and not n.startswith(left_out)]
    below = {n: n.removesuffix(".bias") in targets for n in names}
    return {PREFIX + (n.removesuffix("bias") + "base_layer.bias" if inner else n): n for n, inner in below.items() if inner or word == "all"}


def duplicate(name: str, config: dict[str, Any], *, heads: Iterable[str]) -> bool:
    """Is it a head's bias that PEFT writes once more, or as it was before, with bias="all"? No one reads these."""
    if config.get("bias") != "all" or not name.endswith(".bias"):
        return False
    plain = {re.sub(infix, "", name, count=1) for infix in (r"\.original_module", r"\.modules_to_save\.\w+", r"\.modules_to_save")} - {name}
    return any(PREFIX + head in plain for head in heads)


def selection(biases: list[str]) -> Adapter:
    """The method that trains these biases."""
    return BitFit(biases=tuple(n.removesuffix(".bias") for n in biases))


def write_ia3(model: nn.Module, found: Found) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One vector per module: the product of its patches' scales, with ones where a part of a fused module has none."""
    if found.trained:
        raise Incompatible(f"an (IA)³ file of PEFT's holds no other parameters of the model, and {found.trained[0]} was trained")
    patches = _by_module(found)
    tensors, inner = {}, [path for path, ps in patches.items() if isinstance(ps[0], InputScale)]
    for path, ps in patches.items():
        out_features, in_features = anatomy.weight(model.get_submodule(path)).shape
        if any(isinstance(p, InputScale) and p.site.rows is not None or type(p) is not type(ps[0]) for p in ps):
            raise Incompatible(f"{path}: a file of PEFT's rescales the whole input of a module or its output, and ia3 does otherwise here")
        scale = torch.ones(in_features if path in inner else out_features)
        for p in ps:
            scale[_rows(p.site)] *= p.scale.detach().float().cpu()
        tensors[f"{PREFIX}{path}.ia3_l"] = scale[None, :] if path in inner else scale[:, None]
    config = {"peft_type": "IA3", "feedforward_modules": sorted(inner), "init_ia3_weights": True, "target_modules": sorted(patches)}
    return config | _fan(model, patches), tensors


def _rows(site: Site) -> Any:
    return slice(None) if site.rows is None else torch.tensor(site.rows)


def _fan(model: nn.Module, patches: Iterable[str]) -> dict[str, bool]:
    return {"fan_in_fan_out": all(anatomy.is_transposed(model.get_submodule(path)) for path in patches)}


# What is read here, and what changes nothing in the meaning of the tensors. Any other setting must be empty.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "feedforward_modules", "inference_mode",
    "init_ia3_weights", "init_lora_weights", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


def _refuse_unread(source: Path, config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key not in _KNOWN and value not in (None, False, "none", {}, []):
            raise Incompatible(f"{source}: {key}={value!r} cannot be read; merge the adapter in PEFT (merge_and_unload) and load that as a backbone")
    start, bias = config.get("init_lora_weights", True), config.get("bias", "none")
    if start not in (True, False, "gaussian", "orthogonal"):
        raise Incompatible(f"{source}: init_lora_weights={start!r} changed the backbone; save with PEFT's path_initial_model_for_weight_conversion")
    if bias not in ("none", "lora_only", "all"):
        raise Incompatible(f"{source}: bias={bias!r} cannot be read; there are none, lora_only and all")


def _targets(config: dict[str, Any], model: nn.Module) -> list[Site]:
    """The linear maps that the config names, in the model's order."""
    wanted = patterns(config.get("target_modules"))
    barred = [*patterns(config.get("exclude_modules")).values(), *(rf"(.*\.)?{word}(\..*)?" for word in saved_names(config))]
    modules = [path for path in modules_of(model) if path]
    idle = [word for word, pattern in wanted.items() if not any(fits(pattern, path) for path in modules)]
    found = [path for path in modules if any(fits(p, path) for p in wanted.values()) and not any(fits(p, path) for p in barred)]
    if idle or not found:
        near = did_you_mean(idle[0], {path.rpartition(".")[2] for path in modules}) if idle else ""
        raise Incompatible(f"target_modules {one_of(map(repr, idle or wanted))} hits nothing in {type(model).__name__}{near}")
    other = next((p for p in found if not anatomy.is_linear(model.get_submodule(p))), None)
    if other is not None:
        raise Incompatible(f"target_modules hits {other}, a {type(model.get_submodule(other)).__name__}; adapters of linear maps alone can be read")
    return [s for s in anatomy.resolve(model, found, kind="linear") if s.path in found]


def read_lora(config: dict[str, Any], model: nn.Module, *, source: Path) -> Read:
    """What a LoRA file must hold for this model."""
    _refuse_unread(source, config)
    sites = _targets(config, model)
    paths = [s.path for s in sites]
    ranks = _by_pattern(config, "rank_pattern", paths, config.get("r", 8))
    alphas = _by_pattern(config, "alpha_pattern", paths, config.get("lora_alpha", 8))
    pieces = []
    for site in sites:
        r, alpha, name = ranks[site.path], alphas[site.path], PREFIX + site.path
        alike = tuple(p for p in paths if (ranks[p], alphas[p]) == (r, alpha))
        slots = {"A": Slot(f"{name}.lora_A.weight", (r, site.in_features)), "B": Slot(f"{name}.lora_B.weight", (site.out_features, r), idle=0.0)}
        if config.get("use_dora"):
            lengths = anatomy.weight(model.get_submodule(site.path)).detach().float().norm(dim=1)  # ‖W‖
            slots = {"stretch": Slot(f"{name}.lora_magnitude_vector", (site.out_features,), _stretch(lengths), idle=lengths), **slots}
        pieces.append(Piece(site, _of_rank(config, r, alpha=alpha, targets=alike), slots))
    word = config.get("bias", "none")
    heads = [path for path in modules_of(model) if any(path.endswith(w) for w in saved_names(config))]
    return pieces, {} if word == "none" else _bias_names(model, paths, word, without=heads)


def _of_rank(config: dict[str, Any], r: int, *, alpha: float, targets: tuple[str, ...]) -> Adapter:
    stable = config.get("use_rslora", False)
    if config.get("use_dora"):
        return DoRA(r=r, alpha=alpha * r**0.5 if stable else alpha, targets=targets)
    return LoRA(r=r, alpha=alpha, targets=targets, dropout=config.get("lora_dropout", 0.0), rank_stabilized=stable)


def _stretch(lengths: Tensor) -> Any:
    """Δm = m − ‖W‖."""
    return lambda m: m.float() - lengths.to(m.device)


def _by_pattern(config: dict[str, Any], key: str, paths: list[str], default: Any) -> dict[str, Any]:
    """A module's value: that of the first pattern which its path, or an end of it, matches."""
    wanted = config.get(key) or {}
    hits = {path: next((p for p in wanted if fits(rf"(.*\.)?({p})", path)), None) for path in paths}
    idle = next((p for p in wanted if p not in hits.values()), None)
    if idle is not None:
        raise Incompatible(f"{key}: {idle!r} matches none of the adapted modules")
    return {path: default if hit is None else wanted[hit] for path, hit in hits.items()}


def read_ia3(config: dict[str, Any], model: nn.Module, *, source: Path) -> Read:
    """What an (IA)³ file must hold for this model."""
    _refuse_unread(source, config)
    sites, inner = _targets(config, model), config.get("feedforward_modules") or []
    method = IA3(targets=tuple(s.path for s in sites))
    pieces = []
    for site in sites:
        enters = fits(inner, site.path) if isinstance(inner, str) else any(site.path.endswith(word) for word in inner)
        # our (IA)³ goes by the site's place, PEFT's by the list in the file; where they differ, the place follows the file
        if enters != (site.place in anatomy.FFN):
            site = dataclasses.replace(site, place="down" if enters else "other")
        shape = (1, site.in_features) if enters else (site.out_features, 1)
        pieces.append(Piece(site, method, {"scale": Slot(f"{PREFIX}{site.path}.ia3_l", shape, idle=1.0)}))
    return pieces, {}
