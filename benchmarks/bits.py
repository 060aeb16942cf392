"""Accuracy and perplexity by bits: rounding after training against rounding while training, the formats of 8 bits and fewer, a distilled GPT-2.

    python -m benchmarks.bits [--hours 2] [--only books]

SST-2 with MiniLM; a small GPT-2 (10 M parameters, under the folder of data sets) on the books that it was trained on. The full fine-tuning is one
phase per seed, which rows share (kept in $PARETUNE_BENCH, or the folder for temporary files).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import cells, data
from benchmarks.cells import Cell, Table
from benchmarks.grids import _beginning as beginning
from benchmarks.shrinking import EPOCHS, TRAIN, WORK, code

SEEDS = (0, 1, 2)
GRIDS = ((8, 0), (4, 64), (3, 64), (3, 0), (2, 64), (2, 0))  # bits, and weights with one scale (0: a row)
STORED = {(8, 0): "int8_weights(embeddings=False)", (4, 64): "int4(symmetric=True, embeddings=False)"}  # what packs a grid's codes
EIGHT = {"fp32": "full", "int8 weights": "full | int8_weights", "fp8 e4m3": "full | fp8", "fp8 e5m2": 'full | fp8(format="e5m2")',
         "int8": "full | int8", "LLM.int8()": "full | llm_int8"}  # fmt: skip
BOOKS: dict[str, tuple[str, float]] = {  # recipe, bits a weight of a map with 320 inputs, scales included
    "bf16": ("cast", 16.0), "int8": ("int8", 8.1), "int8 weights": ("int8_weights", 8.1), "int8 weights, groups of 64": ("int8_weights(group=64)", 8.5),
    "LLM.int8()": ("llm_int8", 8.1), "fp8 e4m3": ("fp8", 8.1), "fp8 e5m2": ('fp8(format="e5m2")', 8.1), "int4, groups of 32": ("int4(group=32)", 4.75),
    "int4, groups of 64": ("int4", 4.375), "int4, groups of 64, symmetric": ("int4(symmetric=True)", 4.25), "nf4": ("nf4", 4.13),
    "nf4, constants in fp32": ("nf4(double_quant=False)", 4.5),
}  # fmt: skip
ROUNDED = {"3 bits, groups of 64": (3, 64), "2 bits, groups of 64": (2, 64)}  # on the books, without a packed format
SMALLER = {"all layers": "full", "every other layer, as cut": "keep_layers", "every other layer, trained": "keep_layers | full",
           "every other layer, distilled": "distilgpt2"}  # fmt: skip
GPT2 = str(data.FOLDER / "checkpoints" / "books-gpt2")
TEXT = {"train": 200_000, "validation": 20_000, "test": 100_000}  # characters


def every_cell() -> Iterator[Cell]:
    """Seeds outermost."""
    for name in (*BOOKS, *ROUNDED):
        yield Cell(f"books {name}", functools.partial(on_books, name))
    for seed in SEEDS:
        for name, recipe in EIGHT.items():
            yield Cell(f"eight {name} {seed}", functools.partial(_sst2, recipe, seed))
        for bits, group in GRIDS:
            yield Cell(_grid("after", bits, group, seed), functools.partial(after, bits, group, seed))
            yield Cell(_grid("while", bits, group, seed), functools.partial(during, bits, group, seed))
        for name, recipe in SMALLER.items():
            yield Cell(f"smaller {name} {seed}", functools.partial(smaller, recipe, seed))


def _grid(when: str, bits: int, group: int, seed: int) -> str:
    return f"{when} {bits} {group or 'row'} {seed}"


def _sst2(recipe: str, seed: int) -> dict[str, Any]:
    given = data.task("sst2", train=TRAIN, seed=seed)
    return data.figures(data.finished(recipe, given, out=str(WORK / "sst2"), seed=seed, epochs=EPOCHS), given)


def after(bits: int, group: int, seed: int) -> dict[str, Any]:
    """Trained for as many epochs without rounding, then rounded to the nearest code; packed where a format has such codes."""
    if (bits, group) in STORED:
        return _sst2(f"full | full + schedule(epochs=1) | {STORED[bits, group]}", seed)
    from paretune import inference, tasks, training

    given = data.task("sst2", train=TRAIN, seed=seed)
    made = data.finished("full | full + schedule(epochs=1)", given, out=str(WORK / "sst2"), seed=seed, epochs=EPOCHS)
    model = inference.open_model(made.model, given)
    round_to(model, bits, group)
    score = tasks.score(given, training.predict(model, given, rows=given.test), rows=given.test)
    return data.figures(made, given) | {"score": score, "score_low": None, "score_high": None}


def during(bits: int, group: int, seed: int) -> dict[str, Any]:
    """Trained for one epoch on rounded weights with steps that learn; packed where a format has such codes."""
    packed = f" | {STORED[bits, group]}" if (bits, group) in STORED else ""
    return _sst2(f"full | full + qat(bits={bits}, group={group}) + schedule(epochs=1){packed}", seed)


@torch.no_grad()
def round_to(model: Any, bits: int, group: int) -> None:
    """Every weight that a format would pack, at its nearest code: symmetric, one scale per row or group."""
    from paretune import anatomy
    from paretune.weights.numerics import absmax, grouped, scaled, ungrouped
    from paretune.weights.packed import packable

    for path in packable(model, embeddings=False):
        weight = anatomy.weight(model.get_submodule(path))  # (O, I)
        codes, scales = absmax(grouped(weight, group or weight.shape[1]), bits=bits)
        weight.copy_(ungrouped(scaled(codes, scales), weight.shape[1]))


def books() -> Any:
    """The beginning of each split of the books that the small GPT-2 was trained on."""
    import paretune as pt

    place = data.FOLDER / "books_en"
    whole = pt.task(place / "train.jsonl.gz", text="text", validation=place / "validation.jsonl.gz", test=place / "test.jsonl.gz")
    return dataclasses.replace(whole, **{split: beginning(whole.rows(split), "text", n) for split, n in TEXT.items()})


def on_books(name: str) -> dict[str, Any]:
    """The perplexity of the small GPT-2 in a format, saved and opened again; of rounded weights, in memory."""
    import paretune as pt
    from paretune import tasks, training

    given = books()
    if name in BOOKS:
        return data.one_run(BOOKS[name][0], given, backbone=GPT2)
    model = pt.load(GPT2, given).float().eval()
    round_to(model, *ROUNDED[name])
    return {"score": tasks.score(given, training.predict(model, given, rows=given.test), rows=given.test), "task_fingerprint": given.fingerprint}


def smaller(recipe: str, seed: int) -> dict[str, Any]:
    """The small GPT-2 with all or half of its layers, after one epoch."""
    given = books()
    return data.figures(data.finished(recipe, given, out=str(WORK / "books"), seed=seed, backbone=GPT2, epochs=1), given)


def page(table: Table) -> str:
    """docs/bits.md, from the files."""

    def over(cell: str, **how: Any) -> str:
        return cells.mean_range([table.found(f"{cell} {seed}") for seed in SEEDS], **how)

    grids = ([str(bits), str(group or "row"), over(f"after {bits} {group or 'row'}"), over(f"while {bits} {group or 'row'}"),
              code(STORED[bits, group]) if (bits, group) in STORED else ""] for bits, group in GRIDS)  # fmt: skip
    eight = ([name, code(recipe), over(f"eight {name}"), cells.mean([table.found(f"eight {name} {s}") for s in SEEDS], "stored_mb", digits=1)]
             for name, recipe in EIGHT.items())  # fmt: skip
    named = {name: code(recipe) for name, (recipe, _) in BOOKS.items()} | dict.fromkeys(ROUNDED, "rounded in memory")
    bits = {name: f"{bits:g}" for name, (_, bits) in BOOKS.items()} | {name: f"{b + 32 / g:g}" for name, (b, g) in ROUNDED.items()}
    books = ([name, named[name], bits[name], cells.mean([table.found(f"books {name}")], "score", digits=2)] for name in named)
    layers = ([name, code(recipe), over(f"smaller {name}", times=1.0, digits=2),
               cells.mean([table.found(f"smaller {name} {s}") for s in SEEDS], "stored_mb", digits=1)] for name, recipe in SMALLER.items())  # fmt: skip
    return f"""# Bits

Means over {len(SEEDS)} seeds with the lowest and the highest.

## Rounding after training, and while training

MiniLM on SST-2, accuracy in percent on the whole test split: {EPOCHS} epochs of full fine-tuning on {TRAIN:,} texts, then one more, plain (and the weights rounded to
the nearest code at the end) or with `qat`. Embeddings and the head stay float. Codes of 8 and 4 bits are packed and opened again, both ways; no format packs fewer.

{cells.markdown(["bits", "weights with one scale", "rounded after training", "qat", "packed as"], grids)}

## Eight bits: FP8 against INT8

The same models after {EPOCHS} epochs; their times are with [the other shrunk models](shrinking.md).

{cells.markdown(["format", "recipe", "score", "MB"], eight)}

## Perplexity by bits

A GPT-2 of 10 M parameters, on {TEXT["test"]:,} characters of books that it has not seen. Bits a weight count scales and constants.

{cells.markdown(["format", "recipe", "bits a weight", "perplexity"], books)}

## A smaller GPT-2

One epoch on {TEXT["train"]:,} characters of its training books; perplexity as above.

{cells.markdown(["model", "recipe", "perplexity", "MB"], layers)}

Made by `python -m benchmarks.bits` from the files in `benchmarks/results/bits/`; `--table` makes it again from them.
"""


TABLE = Table("bits", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
