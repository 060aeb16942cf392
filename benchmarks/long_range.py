"""The Long Range Arena on two cores: every attention transform in one small encoder, trained from nothing on six tasks.

    python -m benchmarks.long_range [--hours 2] [--only listops]

ListOps and Pathfinder are made here; passages of books as bytes, pairs of passages and gray pictures come from the folder of data sets
(`benchmarks/data.py`). Tay et al. 2020, arXiv:2011.04006, whose models are larger and see a hundred times as many examples. Speed and
memory are of one training step at lengths 1,024 to 4,096, batch 1, each method in turn with full attention as its own control.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import random
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paretune as pt
from benchmarks import cells, data
from benchmarks.cells import Cell, Table
from paretune.tasks import Task, listops, pathfinder

METHODS = {
    "full attention": "", "blockwise": "blockwise(blocks=4)", "longformer": "longformer(window=64)", "reformer": "reformer(bucket_size=64)",
    "linformer": "linformer(k=64)", "perceiver": "perceiver(latents=64)", "based": "based(window=64)",
}  # fmt: skip
CONTROL, ROUNDS = "full attention", 5
SEEDS, LENGTHS = (0, 1, 2), (1024, 2048, 3072, 4096)
HIDDEN, LAYERS, HEADS, LONGEST = 128, 2, 4, 4096
LR, BATCH, TRAIN, TEST = 1e-3, 16, 1500, 400
BYTES = tuple(map(chr, range(256)))
PASSAGE = 1000  # bytes of a book that are read; of each of the two in a pair half as many


@dataclasses.dataclass(frozen=True)
class Arena:
    """A task, and what its tokens are."""

    task: Callable[[], Task]
    vocabulary: tuple[str, ...]
    words: bool = False  # are tokens set apart by spaces, or is each character one?
    epochs: float = 2.0
    train: int = TRAIN
    published: str = ""  # the column of the paper's table


def passages(pairs: bool = False) -> Task:
    """Is it Conan Doyle? Passages of his books and of others'; or, for pairs, are both of one book? No book stands on two sides."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for split, many in (("train", 1000), ("test", 300)):
        books = {name: _books(name, split) for name in ("books_doyle", "books_en")}
        drawn = random.Random(0)
        for i in range(2 * many):
            rows[split].append(_pair(drawn, books["books_en"], same=i % 2 == 0) if pairs else _passage(drawn, books, doyle=i % 2 == 0))
    with tempfile.TemporaryDirectory() as folder:
        for split, found in rows.items():
            (Path(folder) / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        return pt.task(Path(folder) / "train.jsonl", text="text,second" if pairs else "text", label="label", test=Path(folder) / "test.jsonl")


def _books(name: str, split: str) -> list[str]:
    with gzip.open(data.FOLDER / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"].encode().decode("latin-1") for line in file]  # one character per byte


def _cut(drawn: random.Random, book: str, length: int) -> str:
    start = drawn.randrange(len(book) - length)
    return book[start : start + length]


def _passage(drawn: random.Random, books: dict[str, list[str]], *, doyle: bool) -> dict[str, str]:
    return {"text": _cut(drawn, drawn.choice(books["books_doyle" if doyle else "books_en"]), PASSAGE), "label": "Doyle" if doyle else "another"}


def _pair(drawn: random.Random, books: list[str], *, same: bool) -> dict[str, str]:
    first, other = drawn.sample(books, 2)
    return {"text": _cut(drawn, first, PASSAGE // 2), "second": _cut(drawn, first if same else other, PASSAGE // 2), "label": "one book" if same else "two books"}


def pictures() -> Task:
    """CIFAR-10 in gray, pixel by pixel."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "test"):
            with zipfile.ZipFile(data.FOLDER / "cifar10_subset" / f"{split}.zip") as packed, open(Path(folder) / f"{split}.jsonl", "w") as file:
                for name in packed.namelist():
                    if name.endswith(".jpg"):
                        gray = Image.open(io.BytesIO(packed.read(name))).convert("L").tobytes()
                        file.write(json.dumps({"text": "".join(pathfinder.GRAY[level] for level in gray), "label": name.split("/")[-2]}) + "\n")
        return pt.task(Path(folder) / "train.jsonl", text="text", label="label", test=Path(folder) / "test.jsonl")


ARENA = {
    "listops, 20 to 100": Arena(lambda: pt.task("listops-short"), listops.VOCABULARY, words=True, epochs=4, train=5000),
    "listops, 500 to 2000": Arena(lambda: pt.task("listops"), listops.VOCABULARY, words=True, epochs=1, train=1000, published="ListOps"),
    "passages": Arena(passages, BYTES, published="Text"),
    "pairs": Arena(lambda: passages(pairs=True), BYTES, published="Retrieval"),
    "pictures": Arena(pictures, pathfinder.GRAY, published="Image"),
    "pathfinder": Arena(lambda: pt.task("pathfinder-32"), pathfinder.GRAY, published="Path"),
}
PUBLISHED = {  # Long Range Arena's README of November 2020, in the order of ARENA's `published`
    "full attention": ("36.37", "64.27", "57.46", "42.44", "71.40"), "longformer": ("35.63", "62.85", "56.89", "42.22", "69.71"),
    "reformer": ("37.27", "56.10", "53.40", "38.07", "68.50"), "linformer": ("35.70", "53.94", "52.27", "38.56", "76.34"),
}  # fmt: skip


@functools.cache
def encoder(vocabulary: tuple[str, ...], words: bool) -> tempfile.TemporaryDirectory[str]:
    """A folder with the untrained encoder and its tokenizer, the same for all methods."""
    import torch
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate((*special, *vocabulary))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if words else pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = transformers.BertConfig(
        vocab_size=len(special) + len(vocabulary), hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=2 * HIDDEN, max_position_embeddings=LONGEST, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    folder = tempfile.TemporaryDirectory()
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder.name)
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LONGEST, **named).save_pretrained(folder.name)
    return folder


def every_cell() -> Iterator[Cell]:
    """Speeds first, since they are quick; then scores, seeds outermost."""
    for method in METHODS:
        for length in LENGTHS:
            yield Cell(f"{method} step {length}", functools.partial(step, method, length))
    for seed in SEEDS:
        for name in ARENA:
            for method in METHODS:
                yield Cell(f"{method} {name} {seed}", functools.partial(one, method, name, seed))


def one(method: str, name: str, seed: int) -> dict[str, Any]:
    """One method trained on one task."""
    arena = ARENA[name]
    cut = arena.task().subset(arena.train, seed=seed)
    task = dataclasses.replace(cut, validation=data.few(cut.validation, 200), test=data.few(cut.test, TEST))
    recipe = f"{METHODS[method]} | full + schedule(lr={LR}, batch={BATCH}, epochs={arena.epochs}, warmup=0.1)".removeprefix(" | ")
    return data.one_run(recipe, task, seed=seed, backbone=encoder(arena.vocabulary, arena.words).name)


def ready(method: str, length: int) -> Callable[[], None]:
    """One training step of the encoder with this attention on random tokens, batch 1, all of it learning."""
    import torch

    arena = ARENA["pathfinder"]
    torch.manual_seed(0)
    model = pt.load(encoder(arena.vocabulary, arena.words).name)
    if METHODS[method]:
        ((transform,),) = pt.parse(METHODS[method]).phases
        pt.shrink(model, transform)
    model.train().requires_grad_(True)
    tokens = torch.randint(4, 4 + len(arena.vocabulary), (1, length))

    def work() -> None:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state.square().mean().backward()

    work()
    return work


def whole(method: str, length: int) -> None:
    """The model made and the step taken, for a process whose memory is read."""
    ready(method, length)()


def step(method: str, length: int) -> dict[str, Any]:
    """CPU seconds of a step, in turn with full attention's; peak memory of each in a process of its own."""
    from paretune.meters import memory, system

    steps = {name: ready(name, length) for name in (method, CONTROL)}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    again: list[float] = []
    for _ in range(ROUNDS):
        for name, work in steps.items():
            taken[name].append(_cpu_s(work))
        again.append(_cpu_s(steps[CONTROL]))
    peaks = {name: memory.child_peak("benchmarks.long_range:whole", [name, length]).over_mb.value for name in steps}
    cpu_s, full_s = statistics.median(taken[method]), statistics.median(taken[CONTROL])
    return {"method": method, "length": length, "score": full_s / cpu_s, "step_cpu_s": cpu_s, "full_step_cpu_s": full_s, "full_again_cpu_s": statistics.median(again),
            "peak_mb": peaks[method], "full_peak_mb": peaks[CONTROL], "environment": system.describe()}  # fmt: skip


def _cpu_s(work: Callable[[], None]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def page(table: Table) -> str:
    """docs/long_range.md, from the files."""
    scores = [[f"`{METHODS[m]}`" if METHODS[m] else m, *(cells.mean_range([table.found(f"{m} {a} {s}") for s in SEEDS]) for a in ARENA)] for m in METHODS]
    published = [[m, *PUBLISHED.get(m, ("not in it",) * 5)] for m in METHODS]
    found = {(m, n): table.found(f"{m} step {n}") for m in METHODS for n in LENGTHS}

    def row(method: str, show: Callable[[dict[str, Any]], str]) -> list[str]:
        return [method, *(show(f) if (f := found[method, n]) else cells.NOT_RUN for n in LENGTHS)]

    controls = [f["full_again_cpu_s"] / f["full_step_cpu_s"] for f in found.values() if f]
    spread = f"{min(controls):.2f} to {max(controls):.2f}" if controls else cells.NOT_RUN
    lengths = [f"{n:,} tokens" for n in LENGTHS]
    return f"""# The Long Range Arena on two cores

One encoder of {LAYERS} layers, width {HIDDEN} and {HEADS} heads, trained from nothing; all methods with the same rate ({LR}), batches of {BATCH} and
epochs ({", ".join(f"{name}: {a.epochs:g} over at most {a.train:,}" for name, a in ARENA.items())}). Accuracy in percent on {TEST} test
examples, the mean over {len(SEEDS)} seeds with the lowest and the highest. Chance is 50 for passages, pairs and pathfinder and 10 for pictures; of ListOps'
values the most frequent has about 16.

{cells.markdown(["attention", *ARENA], scores)}

As published (Tay et al. 2020; ListOps, Text, Retrieval, Image, Pathfinder), with larger models and 5,000 to 200,000 steps on other data: not comparable in
level with the table above, which says what a few minutes on two cores reach.

{cells.markdown(["attention", "ListOps", "Text", "Retrieval", "Image", "Path"], published)}

## Cost of a training step

Forward and backward, batch 1, fp32. How many times less CPU time than full attention, in turn in one process, medians of {ROUNDS} (full attention against
itself: {spread}):

{cells.markdown(["attention", *lengths], [row(m, lambda f: f"{f['score']:.2f}x") for m in METHODS])}

CPU seconds:

{cells.markdown(["attention", *lengths], [row(m, lambda f: f"{f['step_cpu_s']:.2f}") for m in METHODS])}

Peak memory of a process above what it holds before the model is there, MB:

{cells.markdown(["attention", *lengths], [row(m, lambda f: f"{f['peak_mb']:,.0f}") for m in METHODS])}

Made by `python -m benchmarks.long_range` from the files in `benchmarks/results/long_range/`; `--table` makes it again from them.
"""


TABLE = Table("long_range", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
