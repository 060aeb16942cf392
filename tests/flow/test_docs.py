"""The pages are true: their Python runs, their commands parse, their links lead somewhere, and what is generated is up to date.

Where a page says "minilm", a tiny BERT of six layers stands in for it, and windows of measurement are short.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

import paretune as pt
from paretune import backbones, cli, inference, registry
from paretune.anatomy import families
from paretune.meters import battery, estimate, protocol, throughput
from paretune.meters.reading import Reading
from paretune.pareto import budgets
from paretune.units import read

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "paretune"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
WORDS = {"good": ("good", "great", "fine", "bright"), "bad": ("bad", "poor", "dull", "hated")}
NEW_METHOD = re.compile(r"# src/paretune/methods/(adapters|transforms|modifiers|readouts)/(\w+)\.py\n")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a reader: reviews.csv, new.csv, and a small "minilm"; what a page registers is forgotten again."""
    monkeypatch.chdir(tmp_path)
    _write_data()
    tiny.model("bert", "base", config={"num_hidden_layers": 6}).save_pretrained("tiny")
    tiny.tokenizer().save_pretrained("tiny")
    find = backbones.find
    monkeypatch.setattr(backbones, "find", lambda name: dataclasses.replace(find(str(tmp_path / "tiny")), name=name) if name == "minilm" else find(name))
    _measure_briefly(monkeypatch)
    known = dict(families.FAMILIES)
    yield tmp_path
    families.FAMILIES.clear()
    families.FAMILIES.update(known)


def _measure_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    itself, most = protocol.same_against_same, throughput.best_throughput
    monkeypatch.setitem(protocol.PROTOCOLS, "quick", dataclasses.replace(protocol.QUICK, window_s=0.05, window_n=10, idle_s=0.02))
    monkeypatch.setattr(protocol, "warm", lambda call, limit_s: call())
    monkeypatch.setattr(protocol, "same_against_same", lambda call: itself(call, pairs=2, block_s=0.005))
    monkeypatch.setattr(throughput, "best_throughput", lambda run, largest, seconds, limit_s: most(run, largest=2, seconds=seconds / 30))
    monkeypatch.setattr(inference, "peak_memory", lambda folders: [Reading(12.0, "MB")] * len(folders))  # starts processes


def _write_data() -> None:
    nouns = ("movie", "film", "book", "story", "plot", "scene", "actor", "the")
    rows = [(f"the {noun} was so {word}", label) for noun in nouns for label in WORDS for word in WORDS[label]]
    for file, columns in (("reviews.csv", ("review", "stars")), ("plain.csv", ("text", "label"))):
        with Path(file).open("w", newline="") as stream:
            csv.writer(stream).writerows([columns, *rows])
    Path("new.csv").write_text("review\na great story\na dull plot\n")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, each behind so many empty lines that an error names the page's own line."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


# --- Python ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_every_python_block_runs(page, place, monkeypatch):
    space: dict[str, object] = {"__name__": "page"}
    for code in blocks(page, "python"):
        new = NEW_METHOD.match(code.lstrip())
        if new:
            _add_method(code.lstrip(), *new.groups(), place, monkeypatch)
        else:
            exec(compile(code, name(page), "exec"), space)
    for test in [value for key, value in space.items() if key.startswith("test_")]:
        test()  # type: ignore[operator]
    for run in place.glob("*/runs/*/run.json"):
        _check_fields(json.loads(run.read_text()))


def _add_method(code: str, role: str, method: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a page's method file beside those of the library, and holds it to the promises of its role."""
    copy = shutil.copytree(registry.METHODS, place / "paretune" / "methods", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / role / f"{method}.py").write_text(code)
    package = importlib.import_module(f"paretune.methods.{role}")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(copy / role)])
    monkeypatch.setattr(registry, "METHODS", copy)
    monkeypatch.setattr(registry, "_files", registry._files.__wrapped__)
    assert role == "adapters"
    _keeps_its_promises(registry.get(method)())


def _keeps_its_promises(method: object) -> None:
    where = importlib.util.spec_from_file_location("contracts_of_adapters", ROOT / "tests" / "contracts" / "test_adapters.py")
    contracts = importlib.util.module_from_spec(where)
    where.loader.exec_module(contracts)
    promises = [f for n, f in vars(contracts).items() if n.startswith("test_") and list(inspect.signature(f).parameters) == ["method", "family"]]
    kept = [promise for promise in promises if "refusal" not in promise.__name__]
    assert len(kept) > 5
    for promise in kept:
        for family in ("bert", "gpt2", "llama"):
            promise(method, family)


def _check_fields(record: dict[str, object]) -> None:
    """Every field of a run.json stands on the page that describes the format."""
    described = (ROOT / "docs" / "architecture.md").read_text()
    parts = [record, record["cost"], record["cost"]["meter"], record["environment"], record["task_definition"], *record["phases"]]
    assert not {key for part in parts for key in part if f"`{key}`" not in described}


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_every_example_runs_and_is_short(example, place, monkeypatch, capsys):
    assert len(example.read_text().splitlines()) <= 60
    monkeypatch.setattr(sys, "argv", [str(example), "plain.csv", "minilm", "made"])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_there_is_an_example_for_each_verb():
    assert {p.stem for p in EXAMPLES} == {"load_adapt_fit", "run", "frontier", "shrink_and_measure", "predict"}


# --- commands -------------------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """Indented lines, and code within a line, that call `paretune`; a backslash at a line's end goes on in the next."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    lines = re.findall(r"^ {4,}(paretune [^\n]*)$", text, re.MULTILINE)
    inline = [re.sub(r"\s+", " ", code) for code in re.findall(r"(?<!`)`(paretune [^`]+)`(?!`)", text)]
    return [re.sub(r"\s+#.*", "", line).strip() for line in (*lines, *inline)]


@every_page
def test_every_command_parses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("out")
    for line in commands(page):
        verb, *words = shlex.split(line)[1:]
        command = cli.app.commands.get(verb)
        assert command, f"{line}: no such verb"
        if words:
            with command.make_context(verb, words) as context:
                _check_values(context.params)


def _check_values(given: dict[str, object]) -> None:
    """What is written in little languages of our own is read, too."""
    for recipe in (*(given.get("recipes") or ()), *filter(None, [given.get("recipe")])):
        pt.parse(recipe)
    for budget in given.get("under") or ():
        budgets.parse(budget)
    if given.get("battery"):
        battery.Battery.parse(given["battery"])
    if given.get("power"):
        estimate.Power.parse(given["power"])
    for flag, dimension in (("rate", "rate"), ("time_budget", "time")):
        if given.get(flag):
            read(given[flag], dimension)


def test_the_pages_have_commands_at_all():
    assert sum(len(commands(page)) for page in PAGES) > 20


# --- text -----------------------------------------------------------------------------------------------------------------------


@every_page
def test_every_link_within_the_project_leads_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    for target in targets:
        file, _, anchor = target.partition("#")
        found = (page.parent / file) if file else page
        assert found.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_the_catalogue_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["page"]()
    assert (ROOT / "docs" / "catalogue.md").read_text() == page, "run `python docs/generate.py`"


def test_what_trains_slower_than_full_says_so_on_its_card():
    """What is measured is in benchmarks/results/method_steps.json; slower is what lies beyond most of the A/A control."""
    for rounds in json.loads((ROOT / "benchmarks" / "results" / "method_steps.json").read_text())["rounds"].values():
        ratios = {name: [r[name] / r["full"] for r in rounds] for name in rounds[0]}
        most = max(1.0, statistics.quantiles(ratios["full, again"], n=4)[-1])
        slower = {name: middle for name, found in ratios.items() if (middle := statistics.median(found)) > most}
        for name, middle in slower.items():
            assert f"{middle:.1f} times full fine-tuning's CPU time" in registry.get(re.match(r"[\w ]+", name)[0].replace(" ", "_")).card.note
        assert slower or "t_few" in ratios


def test_the_architecture_names_every_file_of_the_spine():
    text = (ROOT / "docs" / "architecture.md").read_text()
    files = [p.name for p in SOURCE.glob("*.py") if p.name != "__init__.py"] + [f"{p.parent.name}/" for p in SOURCE.glob("*/__init__.py")]
    assert not [file for file in files if f"`{file}`" not in text]


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 70
