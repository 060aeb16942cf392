"""Adapters that PEFT has not, in the same two files: the config holds our record of what sits where, the tensors have our names.

    base_model.model.<module>.paretune.<adapter>.<method>.<tensor>,   base_model.model.<parameter> of what was trained in place
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paretune import hub, surgery
from paretune.anatomy.structure import modules_of
from paretune.errors import Incompatible, StoreError
from paretune.peft_format import files
from paretune.peft_format.files import PREFIX, Found
from paretune.seams import CHILD, Selected

TYPE, FORMAT = "PARETUNE", 1
IN_PLACE = "trained"  # the key under which a loaded adapter keeps the originals of parameters that it brings


def write(model: nn.Module, found: Found, *, reason: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of the active adapters and the head."""
    active = surgery.state(model).active
    record = hub.record(model) or {"adapters": {}, "patches": []}
    kept = {
        "format": FORMAT, "adapters": {n: m for n, m in record["adapters"].items() if n in active},
        "patches": [p for p in record["patches"] if p["adapter"] in active], "trained": sorted({*found.trained, *files.head_tensors(model)}),
    }  # fmt: skip
    state = model.state_dict()
    tensors = {n: state[n] for n in (*_ours(model, active), *kept["trained"])}
    return {"peft_type": TYPE, "task_type": files.task_type(model), "not_in_peft": reason, "record": kept}, {PREFIX + n: t for n, t in tensors.items()}


def _ours(model: nn.Module, adapters: tuple[str, ...]) -> list[str]:
    """State-dict names of what these adapters brought: their patches' tensors and what patches share."""
    found = []
    for path, _, seam in surgery.seams_of(model):
        for adapter, group in seam.named_children():
            for key, module in group.named_children():
                if adapter in adapters and not isinstance(module, Selected):
                    found += [f"{path}.{CHILD}.{adapter}.{key}.{n}".lstrip(".") for n in module.state_dict()]
    return found


def read(model: nn.Module, source: Path, *, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> nn.Module:
    """Puts the adapters of a file on their backbone; a single one gets this name, several keep theirs."""
    record = config["record"]
    if record["format"] != FORMAT:
        raise StoreError(f"{source}: format {record['format']} is not known, {FORMAT} is; install the paretune that wrote it")
    names = list(record["adapters"]) or [name]
    new = {old: name for old in names} if len(names) == 1 else {old: old for old in names}
    _refuse(model, source, record, list(new.values()))
    patches = [{**p, "adapter": new[p["adapter"]]} for p in record["patches"]]
    adapters = {new[old]: methods for old, methods in record["adapters"].items()} or {name: []}
    surgery.switch(model)
    hub.rebuild(model, {"packed": [], "adapters": adapters, "patches": patches, "selected": [], "active": list(adapters)})
    last = list(adapters)[-1]
    surgery.select(model, last, key=IN_PLACE, parameters=record["trained"])
    surgery.switch(model, *adapters)
    values = {_renamed(n.removeprefix(PREFIX), new): t for n, t in tensors.items()}
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if n in {*_ours(model, tuple(adapters)), *record["trained"]}}
    with contextlib.ExitStack() as undo:  # whatever goes wrong, the model is left as it was
        for adapter in adapters:
            undo.callback(surgery.remove, model, adapter)
        files.check(source, model, shapes={n: tuple(t.shape) for n, t in state.items()}, tensors=values)
        moved = any(not torch.equal(state[n], values[n].to(state[n])) for n in record["trained"])
        with torch.no_grad():
            for n, t in state.items():
                t.copy_(values[n])
        if not moved:
            files.refuse_idle(source, model)
        undo.pop_all()
    surgery.thaw(model)
    return model


def _refuse(model: nn.Module, source: Path, record: dict[str, Any], names: list[str]) -> None:
    paths, parameters = modules_of(model), dict(model.named_parameters())
    gone = next((p["site"]["path"] for p in record["patches"] if p["site"]["path"] not in paths), None)
    gone = gone or next((n for n in record["trained"] if n not in parameters), None)
    if gone is not None:
        raise StoreError(f"{source}: {type(model).__name__} has no {gone}; the adapter was made on another class of model")
    taken = next((n for n in names if n in surgery.state(model).adapters), None)
    if taken is not None:
        raise Incompatible(f"adapter {taken!r} is on the model already; remove it first or choose another name")


def _renamed(name: str, new: dict[str, str]) -> str:
    parts = name.split(".")
    if CHILD in parts:
        at = parts.index(CHILD) + 1
        parts[at] = new.get(parts[at], parts[at])
    return ".".join(parts)
