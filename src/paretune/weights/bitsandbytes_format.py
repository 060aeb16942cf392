"""The tensors of bitsandbytes' NF4 checkpoints, read into packed modules and written from them.

For a map `p` its files hold `p.weight` (n / 2, 1) uint8, `p.weight.absmax`, `p.weight.quant_map`, with doubly quantized constants
`p.weight.nested_absmax` and `p.weight.nested_quant_map`, `p.bias`, and in `p.weight.quant_state.bitsandbytes__nf4` the rest as the
bytes of a JSON text. The codes are the same in both, so nothing is rounded again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paretune import hub, surgery
from paretune.errors import Incompatible, all_of
from paretune.methods.transforms.nf4 import NESTED, NF4
from paretune.weights.numerics import dynamic_float, normal_float
from paretune.weights.packed import PackedLinear

STATE = "weight.quant_state.bitsandbytes__nf4"


def read(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Puts packed maps with the codes of a bitsandbytes checkpoint into a float model; returns their paths.

    Args:
        model: of the checkpoint's architecture; its other tensors are left to `load_state_dict`.
        tensors: a state dict, such as `safetensors.torch.load_file` gives.

    Raises:
        Incompatible: where no map of the checkpoint is in NF4, or one does not fit its place in the model.
    """
    paths = [name.removesuffix(f".{STATE}") for name in tensors if name.endswith(f".{STATE}")]
    if not paths:
        raise Incompatible(f"bitsandbytes: no tensor is named ....{STATE}, so nothing in it is NF4; there are {all_of(list(tensors)[:4])}")
    codes = {path: {n: tensors[k] for n in _NAMES if (k := f"{path}.{n}") in tensors} for path in paths}
    surgery.replace(model, ((path, _module(path, model.get_submodule(path), codes[path])) for path in paths))
    surgery.freeze(model)
    hub.refresh(model)
    return paths


_NAMES = ("weight", "weight.absmax", "weight.nested_absmax", "bias", STATE)


def _module(path: str, old: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    about = json.loads(bytes(tensors[STATE].tolist()).decode())
    method = NF4(block=about["blocksize"], double_quant="nested_offset" in about)
    made = method.empty(old)
    if tuple(about["shape"]) != made.shape or about.get("nested_blocksize", NESTED) != NESTED:
        raise Incompatible(f"bitsandbytes: {path} has the shape {made.shape} in the model and {tuple(about['shape'])} in the checkpoint; load its own model")
    values = {"weight": tensors["weight"].flatten().view(torch.int8), "absmax": tensors["weight.absmax"]}
    if method.double_quant:
        values |= {"nested_absmax": tensors["weight.nested_absmax"], "nested_offset": torch.tensor(about["nested_offset"])}
    if "bias" in tensors:
        values["bias"] = tensors["bias"]
    made.load_state_dict(values)
    return made


def write(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with every NF4 map under bitsandbytes' names; for a model without adapters."""
    tensors = dict(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear) and isinstance(module.method, NF4):
            for name in module.codes():
                del tensors[f"{path}.{name}"]
            tensors |= {f"{path}.{name}": tensor for name, tensor in _tensors(module).items()}
    return tensors


def _tensors(module: PackedLinear) -> dict[str, Tensor]:
    method, codes = module.method, module.codes()
    assert isinstance(method, NF4)
    about: dict[str, Any] = {"quant_type": "nf4", "blocksize": method.block, "dtype": str(module.dtype).removeprefix("torch."), "shape": list(module.shape)}
    tensors = {"weight": codes["weight"][:, None].view(torch.uint8), "weight.absmax": codes["absmax"], "weight.quant_map": normal_float().clone()}
    if method.double_quant:
        about |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": float(codes["nested_offset"])}
        tensors |= {"weight.nested_absmax": codes["nested_absmax"], "weight.nested_quant_map": dynamic_float().clone()}
    return tensors | {STATE: torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)}
