"""A run's model for others: a Hugging Face folder, an adapter folder in PEFT's format, or an ONNX graph."""

from __future__ import annotations

import dataclasses
import filecmp
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from paretune import anatomy, backbones, bitsandbytes_files, folding, hub, inference, onnx_files, peft_format, phases, processors, recipe, store, surgery
from paretune.errors import BackboneError, DataError, Incompatible, StoreError, unknown
from paretune.meters.cost import MEASURED, unmeasured
from paretune.parity import TITLES, Answers, Parity
from paretune.reports import card, use
from paretune.roles import Adapter, Modifier
from paretune.seams import CHILD

FORMATS = ("hf", "peft", "onnx", "bitsandbytes")
MERGE = ("hf", "onnx")  # of them, those that hold adapters merged
ROOM = 1.05  # of the size of what is copied, for a card and the file system's blocks
OPENED = 2.5  # times the run's files are in memory while an export is compared with it: both models, and room to compute
UNMEASURED = "the export is not measured yet; `paretune measure` does it"
APART = "measured was the run, with its adapters apart; a recipe with merge at its end is measured merged"
INSTEAD = "export with --to hf, which holds every run"


def write(
    run: store.Run, folder: Path, *, to: str = "hf", keep_adapters: bool = False, told: Callable[[str], None] | None = None
) -> Path:
    """Writes a run's model into a new or empty folder, whole or not at all.

    Args:
        to: "hf", what `from_pretrained` opens, or "peft", the adapter alone: what PEFT, or of adapters that it has not `read_peft`,
            puts on the unchanged backbone; or "onnx", what onnxruntime runs, float or int8 as the run is; or "bitsandbytes", what
            transformers opens with bitsandbytes, of a run in NF4.
        keep_adapters: leaves adapters apart that an "hf" or "onnx" export would have merged (`folding.attempt`).
        told: is told what the export has otherwise than the run.

    Raises:
        Incompatible: for an unknown `to`, a run that the format cannot hold, or an export that answers otherwise than the run.
        StoreError: for a folder that holds something already, or a run without a model.
    """
    if to not in FORMATS:
        raise Incompatible(unknown("export format", to, allowed=FORMATS))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} holds something already; name a new or an empty folder")
    if not (run.folder / "model" / "config.json").is_file():
        raise StoreError(f"{run.folder} holds no model; give a run folder that `paretune run` wrote")
    record = {**run.record, "license": _license(run)}
    with store.written(folder) as part:
        writer = functools.partial(_WRITERS[to], merge=not keep_adapters) if to in MERGE else _WRITERS[to]
        record, code = writer(run, part, record)
        card.save(record, part, code=code)
    for note in record.get("export", {}).get("notes", ()) if told else ():
        told(note)
    return folder


def _write_hub(run: store.Run, folder: Path, record: dict[str, Any], *, merge: bool) -> tuple[dict[str, Any], str]:
    """The run's model with its adapters merged, where they can be; else as it is, byte for byte."""
    merged, notes = _merged(run, folder) if merge else (None, ())
    if merged is not None:
        record = _answering(run, folder, {**record, "loads_with": phases.loads_with(folder)}, merged, why=APART)
        return record, use.hub(record, _auto_class(run, folder))
    record = {**record, "export": {"notes": notes}} if notes else record
    model = run.folder / "model"
    store.require_space(folder, ROOM * store.stored_mb(model))
    shutil.copytree(model, folder, dirs_exist_ok=True)
    names = sorted(str(path.relative_to(model)) for path in model.rglob("*") if path.is_file())
    _, *other = filecmp.cmpfiles(model, folder, names, shallow=False)
    if wrong := sorted(name for found in other for name in found):
        raise StoreError(f"{folder}: {len(wrong)} of {len(names)} files are not what {model} holds, {wrong[0]} first; check the disk and export again")
    return record, use.hub(record, _auto_class(run, model))


def _merged(run: store.Run, folder: Path) -> tuple[Parity | None, tuple[str, ...]]:
    """Writes the run's model with its adapters merged and compares it with the run's; where they stay apart it writes nothing, and says why."""
    if not hub.attached(store.read_json(run.model / "config.json")):
        return None, ()
    store.require_memory(folder, OPENED * store.stored_mb(run.model))
    model = inference.open_model(run.model, inference.task_of(run))
    notes = folding.attempt(model)
    if surgery.state(model).adapters:
        return None, notes
    try:
        task = inference.compared(run)
        lack = "" if len(task.test) else "there are none"
    except (DataError, StoreError) as error:
        lack = str(error)
    if lack:
        return None, (f"adapters are left apart, for a merge is compared on test rows: {lack}",)
    store.require_space(folder, ROOM * 1e-6 * sum(p.numel() * p.element_size() for p in model.parameters()))
    phases.save_model(model, folder)
    folding.unmerge(model)
    parity = Answers.of(model, task).beside(Answers.of(inference.open_model(folder, task), task), task, form="merged", notes=notes)
    parity.check(run.recipe)
    return parity, notes


def _auto_class(run: store.Run, folder: Path) -> str:
    """The name of the transformers class that opens the run's model."""
    with backbones.quiet():
        config = AutoConfig.from_pretrained(folder)
    return backbones.auto_class(config.to_dict(), config, task=inference.task_of(run))


def _license(run: store.Run) -> str | None:
    """The backbone's license, where the backbone is still there and says it."""
    try:
        return backbones.find(run.record["backbone"]).license or None
    except BackboneError:
        return None


def _write_onnx(run: store.Run, folder: Path, record: dict[str, Any], *, merge: bool) -> tuple[dict[str, Any], str]:
    """The graph, what reads text for it, and a record with which `predict` and `measure` take the folder."""
    task = inference.compared(run)
    model = inference.open_model(run.model, task)
    parity = onnx_files.write(model, task, folder=folder, name=run.recipe, merge=merge)
    config = store.read_json(run.model / "config.json")
    store.write_json(folder / "config.json", {k: v for k, v in config.items() if k not in ("quantization_config", "attn_implementation")})
    processors.save(model, folder)
    record = _answering(run, folder, {**record, "loads_with": "onnx"}, parity)
    store.write_json(folder / "run.json", record)
    shutil.copyfile(run.folder / "sample.json", folder / "sample.json")
    if run.record["per_example"]:
        shutil.copyfile(run.folder / run.record["per_example"], folder / run.record["per_example"])
    return record, use.RUN


def _answering(run: store.Run, folder: Path, record: dict[str, Any], parity: Parity, *, why: str = UNMEASURED) -> dict[str, Any]:
    """The record of an export that other software runs: the training's costs, its own size, and how near its answers are."""
    trained = {name: getattr(run.cost, name) for name in MEASURED if name.startswith("train") or name == "head_parameters"}
    cost = dataclasses.replace(unmeasured(why), **trained, stored_mb=store.stored_mb(folder))
    cost = dataclasses.replace(cost, reasons=cost.reasons | {name: run.cost.reasons[name] for name in trained if name in run.cost.reasons})
    return {**record, "cost": cost.to_json(), "export": {"title": TITLES[parity.form], **dataclasses.asdict(parity)}}


def _write_bitsandbytes(run: store.Run, folder: Path, record: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A folder that transformers opens with bitsandbytes, and a card."""
    task = inference.compared(run)
    auto = _auto_class(run, run.model)
    store.require_memory(folder, OPENED * store.stored_mb(run.model))
    parity = bitsandbytes_files.write(inference.open_model(run.model, task), task, folder=folder, auto=auto, name=run.recipe)
    record = _answering(run, folder, {**record, "loads_with": "transformers+bitsandbytes"}, parity)
    return record, use.hub(record, auto)


def _write_peft(run: store.Run, folder: Path, record: dict[str, Any]) -> tuple[dict[str, Any], str]:
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
    about, origin = store.read_json(folder / peft_format.CONFIG), {"revision": None, **_origin(found)}
    return record, use.adapter(record, _auto_class(run, run.model), config=about, head=task.kind.config(task), **origin)


_WRITERS = {"hf": _write_hub, "peft": _write_peft, "onnx": _write_onnx, "bitsandbytes": _write_bitsandbytes}


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
