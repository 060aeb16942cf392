"""Import is light, and the catalogue is read without importing a method."""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

import paretune
from paretune import registry
from paretune.card import Card
from paretune.roles import ROLES

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "sklearn", "datasets", "accelerate", "pandas")
CODE = """
import sys, time
started = time.process_time()
{body}
seconds = time.process_time() - started
print(seconds, *[name for name in {heavy!r} if name in sys.modules])
"""
BODIES = {  # what is done first in a process, and the CPU seconds that it may take
    "package": ("import paretune", 0.1),
    "names": ("import paretune; dir(paretune)", 0.5),
    "catalogue": ("from paretune import registry; [registry.describe(n) for n in registry.names()]", 0.5),
    "unknown recipe": ("import paretune\ntry: paretune.parse('nothing')\nexcept ValueError: pass", 0.5),
    "command line": ("from paretune import cli", 0.5),
}


@pytest.mark.parametrize("body, most", BODIES.values(), ids=BODIES)
def test_nothing_heavy_is_imported_and_little_time_suffices(body, most):
    found = []
    for _ in range(3):  # processes that are at work beside cost processor time, too
        child = subprocess.run([sys.executable, "-c", CODE.format(body=body, heavy=HEAVY)], capture_output=True, text=True, check=True)
        seconds, *loaded = child.stdout.split()
        assert not loaded
        found.append(float(seconds))
    assert statistics.median(found) < most


def test_a_name_of_the_package_is_found_without_reading_the_catalogue(monkeypatch):
    read, dataclass = [], registry._dataclass
    monkeypatch.setattr(registry, "_dataclass", lambda path: read.append(path.stem) or dataclass(path))
    assert not hasattr(paretune, "phases_") and not hasattr(paretune, "lora_") and not read  # asked at every `from paretune import ...`
    assert paretune.LoRA is registry.get("lora") and not hasattr(paretune, "LORA") and set(read) == {"lora"}


@pytest.mark.parametrize("name", [n for n in registry.names() if not registry.is_recipe(n)])
def test_the_source_says_what_the_class_is(name):
    cls, entry = registry.get(name), registry.describe(name)
    assert cls.__name__.lower() == name.replace("_", "")
    assert isinstance(cls.card, Card) and cls.card == entry.card
    assert cls.role == entry.role and issubclass(cls, ROLES[entry.role + "s"])
    fields = {f.name: f for f in cls.__dataclass_fields__.values()}
    assert {k["name"]: k["default"] for k in entry.knobs} == {n: f.default for n, f in fields.items()}
    assert all(k["help"] for k in entry.knobs)
    assert {k["name"]: (k["low"], k["high"], k["choices"]) for k in entry.knobs} == {
        n: tuple(f.metadata[key] for key in ("low", "high", "choices")) for n, f in fields.items()
    }


@pytest.mark.parametrize("name", registry.names())
def test_a_method_says_what_it_is_and_where_it_comes_from(name):
    entry = registry.describe(name)
    assert entry.summary.endswith((".", ":")) or entry.role == "recipe"
    if entry.card:
        assert entry.card.title and entry.card.equation and entry.card.lowers and entry.card.why
        assert not entry.card.arxiv or (len(entry.card.arxiv.split(".")) == 2 and entry.card.arxiv in entry.doc)
        assert entry.role != "adapter" or entry.card.lr, "an adapter's card says its learning rate"


def test_class_names_are_unique_over_all_roles():
    methods = [n for n in registry.names() if not registry.is_recipe(n)]
    assert len({registry.get(n).__name__.lower() for n in methods}) == len(methods)


def test_each_method_has_its_own_test():
    from pathlib import Path

    tests = {p.stem for p in (Path(__file__).parents[1] / "methods").rglob("test_*.py")}
    assert not [n for n in registry.names() if not registry.is_recipe(n) and f"test_{n}" not in tests]
