"""`AutoModel.from_pretrained(folder)` opens our folders: adapted and packed models, after `import paretune`.

What a plain config cannot say (which patches sit where, which linear maps are packed) stands in the config as a
quantization method named "paretune". Without paretune the folder does not open, with an error that says what to import:
a backbone without its patches, beside norms or a head that were trained with them, would be a damaged model.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

NAME = "paretune"
FORMAT = 1
# The config asks for an attention of this name: transformers stops at it, and our loader takes it away. A plain selection has
# none, for its file is the trained model whoever opens it.
SENTENCE = "paretune (import paretune before opening this folder)"


def record(model: Any) -> dict[str, Any] | None:
    """What must be rebuilt before the weights of this model can be loaded; None for a plain model."""
    from paretune import processors, surgery
    from paretune.seams import Selected
    from paretune.weights import sharing

    patches, selected = [], []
    for path, _, seam in surgery.seams_of(model):
        for adapter, key, patch in seam.patches():
            if isinstance(patch, Selected):
                selected.append({"adapter": adapter, "key": key, "module": path, "names": list(patch.names)})
            else:
                site = {**dataclasses.asdict(patch.site), "rows": _short(patch.site.rows)}
                form = {"settled": {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in patch.named_buffers()}} if patch.settled else {}
                patches.append({"adapter": adapter, "key": key, "method": patch.method.spell(), "site": site, **form})
    packed = [{"path": p, "method": m.packed_by} for p, m in model.named_modules() if hasattr(m, "packed_by")]
    resized = [{"path": p, "sizes": m.__dict__["resized"]} for p, m in model.named_modules() if "resized" in m.__dict__]
    shared = sharing.shared_layers(model)
    if not (patches or selected or packed or resized or shared):
        return None
    here = surgery.state(model)
    adapters = {name: [m.spell() for m in methods] for name, methods in here.adapters.items()}
    tokenizer = processors.told(model) if patches or selected else None
    return {"quant_method": NAME, "format": FORMAT, "adapters": adapters, "active": list(here.active),
            "patches": patches, "selected": selected, "packed": packed, "resized": resized, "shared": shared,
            **({"tokenizer": tokenizer} if tokenizer else {})}  # fmt: skip


def speaks(config: dict[str, Any]) -> bool:
    """Does a saved config tell of a readout around the whole model, which answers in a language model's own words?"""
    from paretune.seams import READOUT

    about = config.get("quantization_config") or {}
    return any(p["adapter"] == READOUT and not p["site"]["path"] for p in about.get("patches", []))


def attached(config: dict[str, Any]) -> bool:
    """Does a saved config tell of adapters that stand beside the weights?"""
    from paretune.seams import OWN

    about = config.get("quantization_config") or {}
    return any(p["adapter"] not in OWN for p in about.get("patches", []))


def _short(rows: tuple[int, ...] | None) -> Any:
    """Rows as the config keeps them: a run of neighbors as its ends."""
    from paretune.seams import contiguous

    return {"from": rows[0], "to": rows[-1]} if rows and contiguous(rows) else rows


def _long(rows: Any) -> tuple[int, ...] | None:
    if rows is None:
        return None
    return tuple(range(rows["from"], rows["to"] + 1)) if isinstance(rows, dict) else tuple(rows)


def refresh(model: Any) -> None:
    """Brings the config up to date with what is on the model, so that `save_pretrained` is always right."""
    from paretune.weights import sharing

    config = getattr(model, "config", None)
    if config is None:
        return
    now = record(model)
    sharing.declare(model)
    config.__dict__.pop("attn_implementation", None)
    if now is not None:
        config.quantization_config = now
        if any(now[what] for what in ("patches", "packed", "resized", "shared")):
            config.__dict__["attn_implementation"] = SENTENCE
    elif getattr(config, "quantization_config", None) is not None and dict(config.quantization_config).get("quant_method") == NAME:
        del config.quantization_config


def rebuild(model: Any, wanted: dict[str, Any]) -> None:
    """Gives a plain model the patches and packed modules that the record names; their values are loaded later."""
    import torch

    from paretune import seams, surgery
    from paretune.anatomy import Site
    from paretune.recipe import parse
    from paretune.weights import maps, sharing

    for item in wanted.get("resized", ()):
        maps.resize(model.get_submodule(item["path"]), item["sizes"])
    formats = {text: _method(text) for text in {item["method"] for item in wanted["packed"]}}
    if formats:
        surgery.replace(model, ((item["path"], formats[item["method"]].empty(model.get_submodule(item["path"]))) for item in wanted["packed"]))
    here = surgery.state(model)
    here.tokenizer = wanted.get("tokenizer") or here.tokenizer
    for name, methods in wanted["adapters"].items():
        here.adapters[name] = tuple(m for text in methods for m in parse(text).phases[0])
        for method in here.adapters[name]:
            if method.role == "adapter":
                surgery.share(model, name, method=method)
    for text in dict.fromkeys(item["method"] for item in wanted["patches"] if item["adapter"] == seams.ATTENTION):
        surgery.share(model, seams.ATTENTION, method=_method(text))
    for item in wanted["patches"]:
        site = Site(**{**item["site"], "rows": _long(item["site"]["rows"])})
        patch = surgery.install(model, item["adapter"], method=_method(item["method"]), site=site, key=item["key"])
        if "settled" in item:
            patch.hold({n: torch.empty(shape, dtype=getattr(torch, dtype), device=model.device) for n, (dtype, shape) in item["settled"].items()})
    seams.sweep(model)
    for item in wanted["selected"]:
        surgery.select(model, item["adapter"], key=item["key"], parameters=[f"{item['module']}.{n}".lstrip(".") for n in item["names"]])
    for follower in wanted.get("shared", ()):
        sharing.sever(model.get_submodule(follower))
    for _, _, seam in surgery.seams_of(model):
        seam.active = tuple(wanted["active"])  # the file holds the values as they were, so nothing is exchanged
    here.active = tuple(wanted["active"])
    surgery.freeze(model)


def _method(text: str) -> Any:
    from paretune.recipe import parse

    ((method,),) = parse(text).phases
    return method


def _register(module: ModuleType) -> None:
    """Adds our loading step to transformers' quantizers."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if NAME in module.AUTO_QUANTIZER_MAPPING:
        return

    class ParetuneConfig(QuantizationConfigMixin):
        """The record as transformers wants it: an object whose attributes are the record's fields."""

        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

    class ParetuneLoader(HfQuantizer):
        """Rebuilds the model's shape before its weights are loaded."""

        serialized_names: dict[str, tuple[str, ...]] = {}

        def update_attn_implementation(self, config: Any) -> Any:
            if config._attn_implementation == SENTENCE:
                config._attn_implementation = None
            return config

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            rebuild(model, self.quantization_config.to_dict())

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            from paretune import surgery
            from paretune.weights import sharing

            for module in [m for m in model.modules() if hasattr(m, "loaded")]:
                module.loaded()  # such as sparse weights, which become dense
            for follower, leader in getattr(self.quantization_config, "shared", {}).items():
                sharing.tie(model.get_submodule(leader), model.get_submodule(follower))
            refresh(model)
            surgery.freeze(model)  # loading makes new parameters, which ask for gradients
            model.is_quantized = False  # Trainer may train the adapters
            del model.hf_quantizer, model.quantization_method
            return model

        def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> None:
            """Every tensor keeps the number format of the file: packed codes, fp32 adapters, a bf16 backbone."""
            return None

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    module.register_quantization_config(NAME)(ParetuneConfig)
    module.register_quantizer(NAME)(ParetuneLoader)


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Runs `_register` right after transformers' quantizers are first imported, so that `import paretune` stays light."""

    target = "transformers.quantizers.auto"

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if fullname != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module)


def install() -> None:
    """Makes transformers able to open our folders, now or as soon as it is imported."""
    if _AfterImport.target in sys.modules:
        _register(sys.modules[_AfterImport.target])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
