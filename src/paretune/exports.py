"""A run's model for others: a Hugging Face folder, or an adapter folder in PEFT's format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paretune import anatomy, backbones, inference, peft_format, recipe, store
from paretune.errors import Incompatible, StoreError, unknown
from paretune.reports import card
from paretune.roles import Adapter, Modifier
from paretune.seams import CHILD

FORMATS = ("hf", "peft")
INSTEAD = "export with --to hf, which holds every run"


def write(run: store.Run, folder: Path, *, to: str = "hf") -> Path:
    """Writes a run's model into a new or empty folder, whole or not at all.

    Args:
        to: "hf", what `from_pretrained` opens, or "peft", the adapter alone: what PEFT, or of adapters that it has not `read_peft`,
            puts on the unchanged backbone.

    Raises:
        Incompatible: for an unknown `to`, or a run that the format cannot hold.
        StoreError: for a folder that holds something already, or a run without a model.
    """
    if to not in FORMATS:
        raise Incompatible(unknown("export format", to, allowed=FORMATS))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} holds something already; name a new or an empty folder")
    if not (run.folder / "model" / "config.json").is_file():
        raise StoreError(f"{run.folder} holds no model; give a run folder that `paretune run` wrote")
    with store.written(folder) as part:
        if to == "hf":
            shutil.copytree(run.folder / "model", part, dirs_exist_ok=True)
        else:
            _write_peft(run, part)
        card.save(run.record, part)
    return folder


def _write_peft(run: store.Run, folder: Path) -> None:
    """The adapters and the head of a run whose backbone is, tensor for tensor, the one that PEFT's user will load."""
    methods = [m for phase in recipe.parse(run.record["resolved"]).phases for m in phase if not isinstance(m, Modifier)]
    other = next((m for m in methods if not isinstance(m, Adapter)), None)
    if other is not None:
        raise Incompatible(f"{run.recipe}: an adapter's file holds what stands on the run's own backbone, and {other!r} is no adapter; {INSTEAD}")
    found = _same_backbone(run)
    task = inference.task_of(run)
    model = inference.open_model(run.folder / "model", task)
    plain = backbones.load(found, task, seed=run.record["seed"])
    changed = _changed(model, plain)
    chosen = {n for m in methods if isinstance(m, Adapter) for n in m.selection(plain)}
    other_name = next((n for n in changed if n not in chosen), None)
    if other_name is not None:
        raise Incompatible(f"{run.recipe}: the run changed the backbone's own {other_name}, which none of its adapters trains; {INSTEAD}")
    try:
        peft_format.save(model, folder, trained=tuple(changed), **_origin(found))
    except Incompatible as error:
        raise Incompatible(f"{run.recipe}: {error}; {INSTEAD}") from None


def _same_backbone(run: store.Run) -> backbones.Backbone:
    found = backbones.find(run.record["backbone"])
    if found.weights_sha256 != run.record["weights_sha256"]:
        raise StoreError(f"backbone {found.name}: its weights are not those the run {run.id} started from; bring them back to export for PEFT")
    return found


def _origin(backbone: backbones.Backbone) -> dict[str, Any]:
    """Where PEFT finds the backbone: the hub's name for a packaged one, else the folder or hub id that the run was given."""
    if backbone.name in backbones.PACKAGED:
        return {"base": backbones.PACKAGED[backbone.name][-1]}
    return {"base": backbone.name, "revision": None if backbone.revision == "local" else backbone.revision}


def _changed(model: nn.Module, plain: nn.Module) -> list[str]:
    """The tensors outside the head and the adapters that differ from the backbone's."""
    head = tuple(f"{path}." for path in anatomy.head(model))
    before = {n: t for n, t in plain.state_dict().items() if not n.startswith(head)}
    after = {n: t for n, t in model.state_dict().items() if not n.startswith(head) and CHILD not in n.split(".")}
    return [n for n in before | after if n not in before or n not in after or not torch.equal(before[n], after[n])]
