"""paretune finds the best model a budget can buy. `import paretune as pt`; every name is loaded when it is first used."""

from __future__ import annotations

import importlib
from typing import Any

from paretune import hub, registry, telemetry

__version__ = "0.1.0"

# public name -> the module that defines it; the methods' classes (`pt.LoRA`) come from the registry
_HOME = {
    **dict.fromkeys(("load", "adapt", "fit", "shrink", "measure", "run", "frontier", "search", "learning_curve", "export", "processor", "read_run"), "flow"),
    "read_peft": "peft_format",
    **dict.fromkeys(("parse", "after", "Recipe"), "recipe"),
    **dict.fromkeys(("task", "Task"), "tasks"),
    **dict.fromkeys(("targets",), "anatomy"),
    **dict.fromkeys(("switch", "rows", "remove", "merge", "unmerge", "thaw", "count"), "surgery"),
    **dict.fromkeys(("add_class",), "readouts.heads"),
    **dict.fromkeys(("vote",), "methods.adapters.prompt"),
    **dict.fromkeys(("Run",), "store"),
    **dict.fromkeys(("Front",), "pareto.front"),
    **dict.fromkeys(("d90",), "pareto.intrinsic"),
    **dict.fromkeys(("ParetuneError", "Incompatible", "RecipeError", "TargetError", "DataError", "BackboneError"), "errors"),
    **dict.fromkeys(("StoreError", "BudgetError", "MeterError", "Diverged"), "errors"),
}
_MODULES = ("arithmetic",)  # public as modules: `pt.arithmetic.combine(...)`

hub.install()
telemetry.off()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    method = registry.with_class(name)
    if method is not None:
        return registry.get(method)
    raise AttributeError(f"module 'paretune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOME, *_MODULES, *registry.class_names(), "__version__"])
