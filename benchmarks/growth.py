"""How time and memory of a training step grow: with batch, length, layers, adapters and rank.

    python -m benchmarks.growth [--hours 1] [--only length]       about twelve minutes on 2 cores

A BERT-shaped model of width 256 with random weights; one of the five grows, the others stay where they are. Steps are those of the library's
own loop, as `pt.fit` does them by default. A cell is a line: one method, one thing that grows, each in a process of its own. The exponent b of
cost = a n^b is fitted to the upper half of a line, where what is constant weighs least.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import cells
from benchmarks.cells import Cell, Table

HERE = {"batch": 8, "length": 64, "layers": 4, "adapters": 1, "rank": 8}
LINES = {"batch": (4, 8, 16, 32, 64, 128, 256), "length": (32, 64, 128, 256, 512, 1024, 2048), "layers": (2, 4, 8, 16, 32, 64),
         "adapters": (1, 2, 4, 8, 16, 32), "rank": (2, 8, 32, 128, 256)}  # fmt: skip
METHODS = ("full", "lora", "adapter", "ia3")
OF_ADAPTERS = ("adapters", "rank")  # what `full` and, of the ranks, `ia3` have not
SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "max_position_embeddings": 2048}
WORDS = [f"w{i}" for i in range(1000)]
STEPS, WARM = 3, 1  # counted, and before them
LINEAR, CLEAR = 1.0, 0.1  # the exponent of a cost that grows as what it is for; what exponents of such short lines differ by, whatever they are of
FIGURES = (("CPU ms", "cpu_s", 1000, 0), ("added MB", "added_mb", 1, 0))  # title, field, times, digits


def every_cell() -> Iterator[Cell]:
    """Every line: a method, and what grows."""
    for what in LINES:
        for method in METHODS:
            if has(method, what):
                yield Cell(f"{method} {what}", functools.partial(cells.fresh, line, method, what))


def has(method: str, what: str) -> bool:
    """Does the method have what grows?"""
    return what not in OF_ADAPTERS or (method != "full" and not (what == "rank" and method == "ia3"))


def line(method: str, what: str) -> dict[str, Any]:
    """The points of a line, from small to large; `score` is the exponent of the CPU time."""
    from paretune.meters import system

    point(method, HERE)  # libraries load some of their parts at work
    points = [{"n": n, **point(method, {**HERE, what: n})} for n in LINES[what]]
    return {"score": exponent([(p["n"], p["cpu_s"]) for p in points]), "points": points, "environment": system.describe()}


def point(method: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Median CPU seconds of a step, and by how much steps raise the memory that the process had with the adapted model."""
    import torch

    import paretune as pt
    from benchmarks import limits, peers
    from paretune import registry, surgery, training
    from paretune.methods.modifiers.schedule import Schedule

    knobs = {"lora": {"r": sizes["rank"]}, "adapter": {"bottleneck": sizes["rank"]}}.get(method, {})
    with tempfile.TemporaryDirectory() as folder:
        task = _task(Path(folder), rows=sizes["batch"] * (WARM + STEPS), words=sizes["length"] - 2)
        model: Any = pt.load(_backbone(Path(folder) / "model", layers=sizes["layers"]), task)
        torch.manual_seed(0)
        for i in range(sizes["adapters"]):
            surgery.attach(model, [registry.get(method)(**knobs)], name=f"a{i}", on_top=True, head=i == 0)
        if sizes["adapters"] > 1:
            surgery.thaw(model)
        watch = limits.Watch(time.process_time)
        with peers.Window() as spent:
            fitted = training.fit(model, task, schedule=Schedule(lr=1e-4, epochs=1.0, batch=sizes["batch"], cache=False), modifiers=[watch])
    marks = watch.marks[WARM - 1 :]
    return {"cpu_s": statistics.median(b - a for a, b in zip(marks, marks[1:], strict=False)), "added_mb": spent.figures["added_mb"],
            "took_s": spent.figures["whole_s"], "learning": sum(surgery.count(model)), "dtype": fitted.dtype, "attention": fitted.attention}  # fmt: skip


def _task(folder: Path, *, rows: int, words: int) -> Any:
    """So many texts to train on, each of so many words, a word being a token; none to validate or test on."""
    import paretune as pt

    chance = random.Random(0)
    lines = [f"{' '.join(chance.choices(WORDS, k=words))},{i % 2}" for i in range(2 * rows + 60)]  # some of which are split off
    (folder / "texts.csv").write_text("\n".join(["text,label", *lines]))
    whole = pt.task(folder / "texts.csv", text="text", label="label")
    of_rows = type(whole.train)
    return dataclasses.replace(whole, train=of_rows(whole.train[:rows]), validation=of_rows(), test=of_rows())


def _backbone(folder: Path, *, layers: int) -> str:
    """A BERT of so many layers, its weights random, and a tokenizer of whole words."""
    import tokenizers
    import torch
    import transformers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))  # noqa: S106
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=SHAPE["max_position_embeddings"], **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers, vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
    return str(folder)


def exponent(points: list[tuple[int, float]], *, whole: bool = False) -> float | None:
    """b of y = a n^b by least squares of the logarithms, over the upper half of the points or over all; None where memory did not grow at all."""
    fitted = points if whole else points[len(points) // 2 :]
    if len(fitted) < 2 or min(y for _, y in fitted) <= 0:
        return None
    return statistics.linear_regression(*zip(*((math.log(n), math.log(y)) for n, y in fitted), strict=True)).slope


def page(table: Table) -> str:
    """docs/growth.md, from the files."""
    found = {(what, method): table.found(f"{method} {what}") for what in LINES for method in METHODS if has(method, what)}
    known = list(filter(None, found.values()))
    how = "No line was run yet."
    if known:
        here = known[0]["environment"]
        slowest, hungriest = (max(p[field] for f in known for p in f["points"]) for field in ("took_s", "added_mb"))
        how = (f"A point took up to {slowest:,.0f} s and up to {hungriest:,.0f} of the machine's {here['memory_mb']:,} MB. {here['cpu']}, {here['threads']} threads; "
               f"commit {cells.when(known)}.")  # fmt: skip
    verdicts = [verdict for key in found for _, _, verdict in _exponents(found, *key)]
    missing = f"; {verdicts.count(cells.NOT_RUN)} were not run" if cells.NOT_RUN in verdicts else ""
    joined = "\n\n".join(_section(found, what) for what in LINES)
    fixed = ", ".join(f"{what} {n}" for what, n in HERE.items())
    return f"""# How cost grows

A step of `pt.fit` with its defaults (number format, attention kernel and parts of a batch as it chooses them) on a BERT-shaped model of width 256: CPU milliseconds, and
how far steps raise the memory of the process with its adapted model. One thing grows at a time; else {fixed}. "Adapters" are attached one above the
other and all learn. {how}

The exponent is that of n, over the upper half of each line. The target is that no term grows faster than the model's own: an exponent is to be at most that of
`full`, the model itself, or {LINEAR:.0f} where that is more (twice the adapters or ranks may cost twice), and {CLEAR} beside for chance. Met by
{verdicts.count("met")} of {verdicts.count("met") + verdicts.count("not met")} figures{missing}.

{joined}

Made by `python -m benchmarks.growth` from the files in `benchmarks/results/growth/`; `--table` makes it again from them.
"""


Found = dict[tuple[str, str], dict[str, Any] | None]  # (what grows, method) -> the file


def _section(found: Found, what: str) -> str:
    rows = []
    for method in (m for m in METHODS if has(m, what)):
        cell = found[what, method]
        for (title, field, times, digits), (b, most, verdict) in zip(FIGURES, _exponents(found, what, method), strict=True):
            figures = [f"{times * p[field]:,.{digits}f}" for p in cell["points"]] if cell else [cells.NOT_RUN] * len(LINES[what])
            rows.append([f"`{method}`, {title}", *figures, "-" if b is None else f"{b:.2f}", "-" if most is None else f"{most:.2f}", verdict])
        formats = [f"{p['dtype']} {p['attention']}" for p in cell["points"]] if cell else [cells.NOT_RUN] * len(LINES[what])
        rows.append([f"`{method}`, format and kernel", *formats, "", "", ""])
    return f"## {what.capitalize()}\n\n{cells.markdown(['n', *map(str, LINES[what]), 'exponent', 'at most', ''], rows)}"


def _exponents(found: Found, what: str, method: str) -> list[tuple[float | None, float | None, str]]:
    """(exponent, what it is to be at most, verdict) of each figure of a line."""
    cell, itself = found[what, method], found.get((what, "full"))
    verdicts: list[tuple[float | None, float | None, str]] = []
    for _, field, _, _ in FIGURES:
        b, own = ([(p["n"], p[field]) for p in f["points"]] if f else [] for f in (cell, itself))
        slope, of_full = exponent(b), exponent(own)
        most = max(LINEAR, of_full or 0.0) + CLEAR
        if method == "full":
            verdicts.append((slope, None, ""))
        elif cell is None or (itself is None and what not in OF_ADAPTERS):
            verdicts.append((slope, None, cells.NOT_RUN))
        else:
            verdicts.append((slope, most, "met" if slope is None else cells.verdict(slope, most=most)))
    return verdicts


TABLE = Table("growth", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
