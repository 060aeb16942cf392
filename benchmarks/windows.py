"""From which length a window pays: attention alone, and a BERT's training step, against all pairs; with what was aimed at, and memory.

    python -m benchmarks.windows [--threads 2] [--rounds 3] [--longest 16384] [--afresh]

With one thread it is CPU time, whoever else is at work on the machine; with more it is time by the clock, and the machine should be
idle. Ways take turns within a round, and up to 1,024 tokens, where the differences are small, within five times as many rounds; all pairs
run twice as the A/A control. What stands in the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import cells, growth

WINDOW = 256
LENGTHS = (128, 256, 384, 512, 640, 1024, 2048, 4096, 8192, 16384)
STEPS = LENGTHS[:-1]
SHORT, OFTENER = 1024, 5  # up to so many tokens, so many times the rounds
HEADS, SIZE = 4, 64
PLAIN, AGAIN, LONGFORMER, CHUNKS = "all pairs", "all pairs, again", "longformer", "chunks"
CAUSAL, CAUSAL_CHUNKS = "causal, all pairs", "causal, chunks"
GLOBAL = ", one global token"
AIMS = (("attention", 4096, 1.8), ("attention", 8192, 5.0), ("attention", 16384, 9.0), ("step", 8192, 2.5))  # times less than all pairs, forward and backward
SLOWER = 0.05  # at no length more than that
LINEAR = 1.1  # largest exponent of memory that is called linear
FILE = Path(__file__).parent / "results" / "windows.json"
PAGE = Path(__file__).parent.parent / "docs" / "windows.md"


def main() -> None:
    """Times all ways in turn and writes the file and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--afresh", action="store_true", help="run what was run, too")
    parser.add_argument("--table", action="store_true", help="only write docs/windows.md from the file")
    asked = parser.parse_args()
    found = json.loads(FILE.read_text()) if FILE.is_file() else []
    for key, run in () if asked.table else jobs(asked.threads, asked.rounds, longest=asked.longest):
        same = [record for record in found if all(record.get(k) == v for k, v in key.items())]
        if asked.afresh or not same:
            found = [record for record in found if record not in same] + [key | run()]
            FILE.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))


def jobs(threads: int, rounds: int, *, longest: int) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Every record: what names it, and how to get its figures."""
    times = {n: rounds * (OFTENER if n <= SHORT else 1) for n in LENGTHS}
    for n in [n for n in LENGTHS if n <= longest]:
        for backward in (False, True):
            key = {"what": "attention", "tokens": n, "backward": backward, "threads": threads}
            yield key, lambda n=n, backward=backward: timed(dict(attentions(n, backward)), times[n], threads=threads, warm=n < 4096)
    for n in [n for n in STEPS if n <= longest]:
        yield {"what": "step", "tokens": n, "backward": True, "threads": threads}, lambda n=n: timed(dict(trainings(n)), times[n], threads=threads, warm=n < 4096)
    for what, lengths in (("attention", LENGTHS), ("step", STEPS)):
        for n in [n for n in lengths if n <= longest]:
            yield {"what": f"memory of {what}", "tokens": n}, lambda what=what, n=n: peaks(what, n)


def timed(ways: dict[str, Callable[[], Any]], rounds: int, *, threads: int, warm: bool) -> dict[str, Any]:
    """Seconds of each way in each round, the least of a tenth of a second's repeats; with `warm`, after a first turn that does not count."""
    import torch

    from paretune.attention.windows import crossover
    from paretune.meters import system

    clock = time.process_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(1 - warm, rounds + 1):
        for name in list(ways)[:: 1 if i % 2 else -1]:
            best, spent = float("inf"), 0.0
            while spent < 0.1:
                started = clock()
                ways[name]()
                best, spent = min(best, clock() - started), spent + clock() - started
            if i:
                seconds[name].append(best)
    return {"machine": system.describe()["cpu"], "rounds": rounds, "dense_below": crossover(WINDOW), "seconds": seconds}


def peaks(what: str, n: int) -> dict[str, Any]:
    """MB that one turn of each way adds to a process of its own, in which it was once before."""
    from paretune.meters import memory

    names = [PLAIN, LONGFORMER, CHUNKS, LONGFORMER + GLOBAL]
    found = memory.child_peaks("benchmarks.windows:alone", [[what, n, name] for name in names], timeout_s=1800)
    return {"mb": {name: peak.over_mb.value for name, peak in zip(names, found, strict=True)}}


def alone(what: str, n: int, way: str) -> Callable[[], Any]:
    """One way, done once."""
    import torch

    torch.set_num_threads(1)
    work = dict(attentions(n, True) if what == "attention" else trainings(n))[way]
    work()
    return work


def attentions(n: int, backward: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """One attention as a model calls it, queries, keys and values as transposed views."""
    import torch
    from torch.nn import functional as F

    from paretune.attention import Call, windows
    from paretune.attention.windows import Band
    from paretune.methods.transforms.longformer import Longformer

    query, key, value = (torch.randn(1, n, HEADS, SIZE).transpose(1, 2).requires_grad_(backward) for _ in range(3))

    def done(out: torch.Tensor) -> None:
        if backward:
            torch.autograd.grad(out.sum(), (query, key, value))

    def dense(mask: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal).transpose(1, 2).contiguous()

    call, below, method = Call(torch.nn.Identity(), "sdpa", query, query, key, value, None, {}), windows.crossover(WINDOW), Longformer(window=WINDOW)

    def as_used(band: Band) -> None:
        out, _ = windows.attention(lambda c: (dense(c.mask), None), call, bands=[band], dense_below=below, by=method)
        done(out)

    yield PLAIN, lambda: done(dense())
    yield AGAIN, lambda: done(dense())
    yield LONGFORMER, lambda: as_used(Band(WINDOW))
    yield LONGFORMER + GLOBAL, lambda: as_used(Band(WINDOW, first=1))
    yield CHUNKS, lambda: done(windows.banded(query, key, value=value, band=Band(WINDOW)))
    yield CHUNKS + GLOBAL, lambda: done(windows.banded(query, key, value=value, band=Band(WINDOW, first=1)))
    yield CAUSAL, lambda: done(dense(causal=True))
    yield CAUSAL_CHUNKS, lambda: done(windows.banded(query, key, value=value, band=Band(WINDOW, causal=True)))


def trainings(n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Forward and backward of a BERT of 4 layers of width 256 on one text of n tokens, without dropout."""
    import torch
    from transformers import AutoModel, BertConfig

    from paretune.methods.transforms.longformer import Longformer

    def step(model: Any) -> Callable[[], Any]:
        ids = torch.randint(1000, (1, n))
        return lambda: model(ids).last_hidden_state.sum().backward()

    def made() -> Any:
        config = BertConfig(vocab_size=1000, hidden_size=HEADS * SIZE, num_hidden_layers=4, num_attention_heads=HEADS, intermediate_size=4 * HEADS * SIZE,
                            max_position_embeddings=n, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
        return AutoModel.from_config(config, attn_implementation="sdpa").train()

    model = made()
    yield PLAIN, step(model)
    yield AGAIN, step(model)
    yield LONGFORMER, step(Longformer(window=WINDOW, global_tokens=0).apply(made()))
    yield LONGFORMER + GLOBAL, step(Longformer(window=WINDOW).apply(made()))
    yield CHUNKS, step(Longformer(window=WINDOW, global_tokens=0, dense_below=0).apply(made()))


# --- what the file says -----------------------------------------------------------------------------------------------------------


def ratio(record: dict[str, Any] | None, way: str, base: str = PLAIN) -> list[float]:
    """How many times less a way takes than the base beside it, round by round; empty where it was not run."""
    seconds = (record or {}).get("seconds", {})
    return [a / b for a, b in zip(seconds[base], seconds[way], strict=True)] if way in seconds else []


def of(found: list[dict[str, Any]], what: str, n: int, *, threads: int, backward: bool = True) -> dict[str, Any] | None:
    """One timed record."""
    return next((r for r in found if (r["what"], r["tokens"], r.get("threads"), r.get("backward")) == (what, n, threads, backward)), None)


def pays_from(found: list[dict[str, Any]], what: str, *, threads: int, way: str = LONGFORMER) -> str:
    """The first measured length from which on the way takes less than all pairs, forward and backward, by more than the A/A control says of chance."""
    records = {n: record for n in LENGTHS if ratio(record := of(found, what, n, threads=threads), way)}
    if not records:
        return cells.NOT_RUN
    slower = max((n for n, r in records.items() if statistics.median(ratio(r, way)) <= max(1, *ratio(r, AGAIN))), default=0)
    return f"{min(n for n in records if n > slower):,}" if slower < max(records) else f"not up to {max(records):,}"


def aims(found: list[dict[str, Any]], threads: int) -> list[list[str]]:
    """What was aimed at, what was measured with so many threads, and whether it is met."""

    def row(text: str, asked: str, seen: str | None, met: str) -> list[str]:
        return [text, asked, f"{threads}", seen or cells.NOT_RUN, met if seen else "-"]

    rows = []
    for what, n, times in AIMS:
        record = of(found, what, n, threads=threads)
        way = LONGFORMER if ratio(record, LONGFORMER) else CHUNKS
        seen = ratio(record, way)
        text = f"{'attention, forward and backward' if what == 'attention' else 'a BERT training step'}, {n:,} tokens"
        met = "met" if seen and statistics.median(seen) >= times else "not met"
        rows.append(row(text, f"at least {times:g}x", f"`{way}`: {_shown(seen)}" if seen else None, met))
    medians = {
        f"{r['tokens']:,} ({'step' if r['what'] == 'step' else 'both' if r['backward'] else 'forward'})": statistics.median(seen)
        for r in found if r.get("threads") == threads and (seen := ratio(r, LONGFORMER))
    }  # fmt: skip
    worst, wanted = ", ".join(f"{at}: {m:.2f}x" for at, m in medians.items() if m < 1 - SLOWER), 2 * len(LENGTHS) + len(STEPS)
    seen = f"{len(medians)} of {wanted} measured, slower at {worst or 'none'}" if medians else None
    met = "not met" if worst else "met" if len(medians) == wanted else "not known"
    return [*rows, row("`longformer` at any length", f"at most {SLOWER:.0%} slower than all pairs", seen, met)]


def memories(found: list[dict[str, Any]]) -> tuple[list[list[str]], list[list[str]]]:
    """The table of memory, and the rows that say whether it is linear."""
    table, aimed = [], []
    for what, lengths in (("attention", LENGTHS), ("step", STEPS)):
        records = {r["tokens"]: r["mb"] for r in found if r["what"] == f"memory of {what}"}
        for way in (PLAIN, LONGFORMER, LONGFORMER + GLOBAL, CHUNKS):
            line = [(n, records[n][way]) for n in lengths if records.get(n, {}).get(way) is not None]
            b = growth.exponent(line) if len(line) == len(lengths) else None
            at = [f"{records[n][way]:,.0f}" if n in dict(line) else cells.NOT_RUN if n in lengths else "-" for n in LENGTHS]
            table.append([f"{what}, {way}", *at, cells.NOT_RUN if b is None else f"{b:.2f}"])
            if way == LONGFORMER:
                seen = [cells.NOT_RUN, "-"] if b is None else [f"n^{b:.2f} from {line[len(line) // 2][0]:,} to {line[-1][0]:,}", "met" if b <= LINEAR else "not met"]
                aimed.append([f"memory of {what}", f"linear in n (n^{LINEAR:g} at most)", "1", *seen])
    return table, aimed


def page(found: list[dict[str, Any]]) -> str:
    """docs/windows.md, from the file."""
    timings = [r for r in found if "seconds" in r]
    used = sorted({r["threads"] for r in timings} | {2})
    machines = " and ".join(sorted({r["machine"] for r in timings})) or cells.NOT_RUN
    often, seldom = (" or ".join(map(str, sorted({r["rounds"] for r in timings if (r["tokens"] <= SHORT) is short}))) or "no" for short in (True, False))
    memory, linear = memories(found)
    aimed = [row for threads in used for row in aims(found, threads)] + linear
    parts = "\n\n".join(_timings(found, threads) for threads in used)
    return f"""# From which length a window pays

A window of {WINDOW} keys on each side against fused attention over all pairs: fp32, {HEADS} heads of {SIZE} features, one text, on {machines}. Medians over
{often} rounds up to {SHORT:,} tokens and {seldom} above, of CPU time with one thread and by the clock with more; a ratio above 1 is how many times
less the way takes than all pairs beside it, with its range. `all pairs, again` is the A/A control.

`longformer` is what users get with `global_tokens=0`, and beside it with the one global token that is the default: all pairs where the window
hides nothing, all pairs with a mask below the length at which a probe finds chunks to be faster than that (`dense_below`), and chunks from there on.
`chunks` are those of `paretune.attention.windows` at every length.

## What was aimed at

{cells.markdown(["what", "aim", "threads", "measured", ""], aimed)}

{parts}

## Memory

MB that forward and backward add to a process of its own, by tokens; the exponent of n is fitted to the longer half of the lengths.

{cells.markdown(["", *(f"{n:,}" for n in LENGTHS), "exponent"], memory)}

Made by `python -m benchmarks.windows` from `benchmarks/results/windows.json`; `--table` makes it again from the file.
"""


def _timings(found: list[dict[str, Any]], threads: int) -> str:
    noun = "1 thread" if threads == 1 else f"{threads} threads"
    if not any(r.get("threads") == threads for r in found):
        return f"## With {noun}\n\nNot run."
    ways = [AGAIN, LONGFORMER, LONGFORMER + GLOBAL, CHUNKS, CHUNKS + GLOBAL]
    alone, steps = [], []
    for n in LENGTHS:
        for backward in (False, True):
            record = of(found, "attention", n, threads=threads, backward=backward)
            shown = [_ms(record, PLAIN), *(_shown(ratio(record, way)) for way in ways), _ms(record, CAUSAL), _shown(ratio(record, CAUSAL_CHUNKS, CAUSAL))]
            alone.append([f"{n:,}", "both" if backward else "forward", *shown])
    for n in STEPS:
        record = of(found, "step", n, threads=threads)
        steps.append([f"{n:,}", _ms(record, PLAIN), *(_shown(ratio(record, way)) for way in ways[:-1])])
    return f"""## Attention alone, {noun}

{cells.markdown(["tokens", "pass", "all pairs, ms", *ways, "causal, all pairs, ms", CAUSAL_CHUNKS], alone)}

## A training step of BERT, 4 layers of width {HEADS * SIZE}, {noun}

A global token has maps of its own; its keys and values are never made.

{cells.markdown(["tokens", "all pairs, ms", *ways[:-1]], steps)}"""


def _ms(record: dict[str, Any] | None, way: str) -> str:
    return f"{1e3 * statistics.median(record['seconds'][way]):,.1f}" if record and way in record["seconds"] else cells.NOT_RUN


def _shown(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else cells.NOT_RUN


if __name__ == "__main__":
    main()
