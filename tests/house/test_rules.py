"""The house rules of docs/architecture.md, as far as a machine can read them."""

from __future__ import annotations

import ast
import functools
import re
import statistics
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "paretune"
FILES = sorted(SOURCE.rglob("*.py"))
TEXTS = sorted(p for folder in ("src", "tests", "docs", "examples", "benchmarks") for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md"))
TEXTS += [p for p in ROOT.iterdir() if p.is_file() and p.suffix in (".md", ".toml", ".txt") or p.name in ("Makefile", "run")]
PRINTS = ("cli", "reports")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, Function)]


def public(path: Path) -> list[Function]:
    """Functions and methods that users or other files call."""
    found = [node for node in tree(path).body if isinstance(node, Function)]
    found += [f for c in tree(path).body if isinstance(c, ast.ClassDef) and not c.name.startswith("_") for f in c.body if isinstance(f, Function)]
    return [f for f in found if not f.name.startswith("_")]


def length(node: Function) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def of_all(paths: list[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """A rule of one file as one test of all these files, which names each that breaks it."""

    def test_of(rule: Callable[[Path], None]) -> Callable[[], None]:
        def whole() -> None:
            broken = []
            for path in paths:
                try:
                    rule(path)
                except AssertionError as error:
                    broken.append(f"{name(path)}: {error}")
            assert not broken, "\n".join(broken)

        whole.__doc__ = rule.__doc__
        return whole

    return test_of


every_file = of_all(FILES)


# --- sizes ----------------------------------------------------------------------------------------------------------------------


@every_file
def test_files_are_short_and_lines_fit_the_screen(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    assert not [i for i, line in enumerate(lines, 1) if len(line) > 170]


def test_the_median_file_is_near_150_lines():
    assert statistics.median(len(p.read_text().splitlines()) for p in FILES if p.name != "__init__.py") <= 165


@every_file
def test_functions_have_at_most_60_lines(path):
    assert not [f"{f.name}: {length(f)}" for f in functions(path) if length(f) > 60]


def test_nine_functions_in_ten_have_under_35_lines():
    lengths = [length(f) for path in FILES for f in functions(path)]
    assert sum(n < 35 for n in lengths) >= 0.9 * len(lengths)


BY_PLACE = ("shrink",)  # its public form is shrink(model, method, task)


@every_file
def test_public_functions_take_few_parameters_and_name_them(path):
    wrong = []
    for f in public(path):
        positional = [a.arg for a in (*f.args.posonlyargs, *f.args.args) if a.arg not in ("self", "cls")]
        if len(positional) + len(f.args.kwonlyargs) > 8:
            wrong.append(f"{f.name} has {len(positional) + len(f.args.kwonlyargs)} parameters")
        if len(positional) > 2 and f.name not in BY_PLACE:
            wrong.append(f"{f.name} takes {len(positional)} parameters by place")
    assert not wrong


# --- style ----------------------------------------------------------------------------------------------------------------------


@every_file
def test_annotations_are_postponed(path):
    body = [n for n in tree(path).body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    assert not body or ast.unparse(body[0]) == "from __future__ import annotations"


@every_file
def test_public_names_are_typed_and_documented(path):
    wrong = [] if not tree(path).body or ast.get_docstring(tree(path)) else ["the file has no docstring"]
    wrong += [f"class {c.name} has no docstring" for c in tree(path).body if isinstance(c, ast.ClassDef) and c.name[0] != "_" and not ast.get_docstring(c)]
    for f in public(path):
        arguments = [a for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, f.args.vararg, f.args.kwarg) if a]
        wrong += [f"{f.name}({a.arg}) has no type" for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        wrong += [f"{f.name} has no return type"] * (f.returns is None)
    wrong += [f"{f.name} has no docstring" for f in tree(path).body if isinstance(f, Function) and f.name[0] != "_" and not ast.get_docstring(f)]
    assert not wrong


@every_file
def test_errors_are_named(path):
    handlers = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ExceptHandler)]
    caught = [ast.unparse(h.type) if h.type else "everything" for h in handlers]
    assert not [c for c in caught if c in ("everything", "Exception", "BaseException")]


@every_file
def test_only_the_command_line_and_the_reports_print(path):
    calls = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"]
    inside = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert not calls or inside in PRINTS or path.name == "child.py"  # a measured child answers its parent through a pipe


@every_file
def test_keywords_are_not_passed_through(path):
    """`**kwargs` hides what a function takes; a wrapper of transformers' own signature (forward, attention, hooks) is excepted."""
    excepted = ("forward", "around", "run", "_patched", "_with_first_input", "_first_input")
    found = [f.name for f in functions(path) if f.args.kwarg and f.args.kwarg.arg == "kwargs" and f.name not in excepted]
    assert not [f for f in found if not f.startswith("_process_model") and "attention" not in f]


@every_file
def test_nothing_is_left_open(path):
    text = path.read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError", text)


@of_all(TEXTS)
def test_no_file_names_this_machine(path):
    if path == Path(__file__):
        return
    text = path.read_text()
    found = re.findall(r"(?<![\w.])/(?:work|tmp|root|home|Users)/\w+", text) + re.findall(r"\b(?:download\.pytorch\.org|files\.pythonhosted\.org)\b", text)
    assert not found


BRITISH = re.compile(
    r"\b(\w+isation|quantis\w+|optimis\w+|normalis\w+|initialis\w+|regularis\w+|generalis\w+|factoris\w+|tokenis\w+|serialis\w+|parameteris\w+"
    r"|summaris\w+|minimis\w+|maximis\w+|recognis\w+|colou?rs? ?=\"colour|colour\w*|behaviour\w*|favour\w*|neighbour\w*|centre[sd]?|labell\w+|modell(?:ed|ing)"
    r"|travell\w+|cancell(?:ed|ing)|analys(?:e|ed|es|ing)\b|grey|catalogu(?!e\b)\w+|honour\w*)\b",
    re.IGNORECASE,
)


@of_all([p for p in TEXTS if p.suffix in (".py", ".md")])
def test_the_spelling_is_american(path):
    if path == Path(__file__):
        return
    assert not {m.group(0) for m in BRITISH.finditer(path.read_text())}


# --- borders --------------------------------------------------------------------------------------------------------------------


@every_file
def test_only_the_anatomy_knows_how_transformers_are_built(path):
    if "anatomy" in path.parts:
        return
    code = tree(path)
    imported = [a.name for n in ast.walk(code) if isinstance(n, ast.ImportFrom) for a in n.names] + [
        n.module or "" for n in ast.walk(code) if isinstance(n, ast.ImportFrom)
    ]
    used = [n.id for n in ast.walk(code) if isinstance(n, ast.Name)] + [n.attr for n in ast.walk(code) if isinstance(n, ast.Attribute)]
    assert "Conv1D" not in imported + used
    assert not [i for i in imported if re.match(r"transformers\.models\.(?!auto\b)", i) or re.match(r"(Bert|Roberta|GPT2|Llama|T5|ViT)[A-Z]", i)]
    compared = [c.value for n in ast.walk(code) if isinstance(n, ast.Compare) and "model_type" in ast.unparse(n) for c in ast.walk(n) if isinstance(c, ast.Constant)]
    assert not compared, "a family is told by its description, not by its name"


@every_file
def test_only_the_surgery_replaces_modules(path):
    if path.name in ("surgery.py", "seams.py"):
        return
    text = path.read_text()
    assert not re.search(r"\._modules\[[^\]]+\]\s*=[^=]|\.add_module\(|\.register_module\(|\.__class__\s*=[^=]|\.set_submodule\(", text)


@every_file
def test_files_are_read_and_written_without_pickle(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            assert not {"dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(names)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError"  # what reading a foreign file may raise
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.save", "eval", "exec", "pickle.load", "pickle.loads", "os.system")
            if called == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)


def test_no_public_name_hides_a_module():
    """`paretune.export` could be a function or a file, not both; the same in each package that gives names on."""
    import paretune

    wrong = {f"paretune.{n}" for n in paretune._HOME if (SOURCE / f"{n}.py").is_file() or (SOURCE / n).is_dir()}
    for path in FILES:
        if path.name == "__init__.py":
            given = {a.asname or a.name for n in tree(path).body if isinstance(n, ast.ImportFrom) and n.level == 0 for a in n.names if n.module != "__future__"}
            given |= {f.name for f in tree(path).body if isinstance(f, Function)}
            beside = {p.stem for p in path.parent.iterdir() if p.suffix == ".py" or p.is_dir()}
            imported = {a.name for n in tree(path).body if isinstance(n, ast.ImportFrom) and (n.module or "").endswith(path.parent.name) for a in n.names}
            wrong |= {f"{name(path.parent)}: {n}" for n in given & beside - imported}
    assert not wrong


# --- dependencies ---------------------------------------------------------------------------------------------------------------


def test_a_declared_dependency_is_imported_and_an_imported_one_is_declared():
    import sys
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    package = {"sklearn": "scikit-learn", "PIL": "pillow", "pynvml": "nvidia-ml-py", "yaml": "pyyaml"}
    declared = {re.split(r"[><=~!;\[ ]", d)[0].lower().replace("_", "-") for d in listed}
    imported = set()
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                imported |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").split(".")[0])
    foreign = {package.get(i, i).lower().replace("_", "-") for i in imported if i not in sys.stdlib_module_names and i not in ("paretune", "")}
    assert foreign <= declared, sorted(foreign - declared)
    core = {re.split(r"[><=~!;\[ ]", d)[0].lower() for d in project["dependencies"]}
    assert core <= foreign | {"tokenizers", "datasets", "psutil", "rich"}, sorted(core - foreign)
