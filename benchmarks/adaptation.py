"""Methods by tasks: MiniLM adapted to six real tasks by every adapter here, and by the two libraries that have many of them.

    python -m benchmarks.adaptation [--hours 2] [--only sst2]

Every method of every library gets the same tuning: four learning rates on SST-2, one seed, chosen on validation, then used on all
tasks. Needs the folder of data sets (`benchmarks/data.py`); the `adapters` library runs in its own environment (`make oracles`).
The peers get the number format and the length grouping that paretune takes by itself. Costs are those of the runs on one task, each in
a process of its own: fill these cells (`--only " sst2 "`) with nothing else running than at most one such process for each core.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import cells, data, peers
from benchmarks.cells import Cell, Table
from paretune.meters import memory
from paretune.tasks import Task

TASKS = ("sst2", "cola", "mrpc", "rte", "stsb", "trec6")
COSTED = "sst2"  # the task whose runs say what a method costs
SEEDS = (0, 1, 2)
TRAIN, VALIDATION, TEST, EPOCHS, BATCH, LONGEST = 600, 200, 500, 2, 16, 128
WHOLE, ADDED, PROMPTS = (5e-5, 1e-4, 2e-4, 4e-4), (3e-4, 1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2, 1e-1)  # the rates tried
METHODS: dict[str, tuple[str, tuple[float, ...]]] = {  # recipe, rates tried
    "full": ("full", WHOLE), "top layers": ("top_layers(k=2)", WHOLE), "head": ("head", ADDED), "bitfit": ("bitfit", ADDED), "ia3": ("ia3", ADDED),
    "lora": ("lora(r=8)", ADDED), "lora q, v": ('lora(r=8, targets="query value")', ADDED), "dora": ("dora(r=8)", ADDED), "houlsby": ("adapter(bottleneck=24)", ADDED),
    "pfeiffer": ('adapter(bottleneck=24, form="pfeiffer")', ADDED), "parallel": ('adapter(bottleneck=24, form="parallel")', ADDED),
    "compacter": ("compacter", ADDED), "compacter++": ('compacter(form="compacter++")', ADDED),
    "prefix": ("prefix", ADDED), "prompt": ("prompt", PROMPTS), "ptuning": ("ptuning", ADDED),
    "mam": ("mam", WHOLE), "unipelt": ("unipelt", ADDED), "intrinsic dimension": ("intrinsic_dimension", ADDED),
    "diff pruning": ("diff_pruning", WHOLE), "mask": ("mask", ADDED), "surgical": ("surgical", WHOLE),
}  # fmt: skip
PEERS: dict[str, tuple[str, str, dict[str, Any], tuple[float, ...]]] = {  # library, configuration, its arguments, rates tried
    "peft: lora q, v": ("peft", "LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}, ADDED),
    "peft: dora": ("peft", "LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": r".*encoder.*(query|key|value|dense)", "use_dora": True}, ADDED),
    "peft: ia3": ("peft", "IA3Config", {}, ADDED),
    "peft: prefix": ("peft", "PrefixTuningConfig", {"num_virtual_tokens": 20}, ADDED),
    "peft: prompt": ("peft", "PromptTuningConfig", {"num_virtual_tokens": 20}, PROMPTS),
    "peft: ptuning": ("peft", "PromptEncoderConfig", {"num_virtual_tokens": 20, "encoder_hidden_size": 384}, ADDED),
    "adapters: lora q, v": ("adapters", "LoRAConfig", {"r": 8, "alpha": 16}, ADDED),
    "adapters: houlsby": ("adapters", "DoubleSeqBnConfig", {"reduction_factor": 16}, ADDED),
    "adapters: pfeiffer": ("adapters", "SeqBnConfig", {"reduction_factor": 16}, ADDED),
    "adapters: parallel": ("adapters", "ParBnConfig", {"reduction_factor": 16}, ADDED),
    "adapters: compacter": ("adapters", "CompacterConfig", {"reduction_factor": 16}, ADDED),
    "adapters: compacter++": ("adapters", "CompacterPlusPlusConfig", {"reduction_factor": 16}, ADDED),
    "adapters: prefix": ("adapters", "PrefixTuningConfig", {}, ADDED),
    "adapters: prompt": ("adapters", "PromptTuningConfig", {"prompt_length": 20}, PROMPTS),
    "adapters: mam": ("adapters", "MAMConfig", {}, WHOLE),
    "adapters: unipelt": ("adapters", "UniPELTConfig", {}, ADDED),
    "adapters: ia3": ("adapters", "IA3Config", {}, ADDED),
}
ORDER = (  # the weaker, the stronger, who found that on full data sets
    ("head", "full", "Peters et al. 2019"), ("prompt", "prefix", "Liu et al. 2022, P-tuning v2"), ("prompt", "bitfit", "Mahabadi et al. 2021"),
    ("intrinsic dimension", "bitfit", "Mahabadi et al. 2021"), ("bitfit", "lora", "Hu et al. 2021"), ("bitfit", "houlsby", "He et al. 2022"),
    ("prefix", "lora", "He et al. 2022"), ("pfeiffer", "parallel", "He et al. 2022"), ("prefix", "mam", "He et al. 2022"), ("bitfit", "unipelt", "Mao et al. 2022"),
    ("compacter", "full", "equal in Mahabadi et al. 2021"), ("lora", "full", "equal in Hu et al. 2021"), ("mask", "full", "equal in Zhao et al. 2020"),
    ("diff pruning", "full", "equal in Guo et al. 2021"),
)
INTERPRETERS = {"peft": sys.executable, "adapters": str(cells.ROOT / ".venv-oracles" / "bin" / "python")}


def every_cell() -> Iterator[Cell]:
    """The tuning of every method, then every method on every task with every seed; seeds outermost, so that a part is a table, too."""
    rates = {name: tried for name, (_, tried) in METHODS.items()} | {name: peer[3] for name, peer in PEERS.items()}
    for name, tried in rates.items():
        for lr in tried:
            yield Cell(_tuning(name, lr), functools.partial(_one, name, "sst2", 0, lr))
    for seed in SEEDS:
        for name, tried in rates.items():
            for task in TASKS:
                yield Cell(_cell(name, task, seed), functools.partial(_chosen, name, task, seed, tried))


def _tuning(name: str, lr: float) -> str:
    return f"tune {name} {lr:g}"


def _cell(name: str, task: str, seed: int) -> str:
    return f"{name} {task} {seed}"


def _chosen(name: str, task: str, seed: int, tried: tuple[float, ...]) -> dict[str, Any]:
    return _one(name, task, seed, best_rate(name, tried))


def best_rate(name: str, tried: tuple[float, ...]) -> float:
    """The rate with the best validation score on SST-2.

    Raises:
        NotYetError: where one of them was not tried.
    """
    found = {lr: TABLE.found(_tuning(name, lr)) for lr in tried}
    if None in found.values():
        raise cells.NotYetError
    return max(tried, key=lambda lr: found[lr]["validation_score"])  # type: ignore[index]


def _one(name: str, task: str, seed: int, lr: float) -> dict[str, Any]:
    costed = task == COSTED
    if name in METHODS:
        return {"lr": lr, **(cells.fresh(_ours, name, task, seed, lr) if costed else _ours(name, task, seed, lr))}
    return {"lr": lr, **_peer(PEERS[name], _task(task, seed), seed, lr, costed=costed)}


def _task(name: str, seed: int) -> Task:
    return data.task(name, train=TRAIN, validation=VALIDATION, test=TEST, seed=seed)


def _ours(name: str, task: str, seed: int, lr: float) -> dict[str, Any]:
    given = _task(task, seed)
    with memory.Peak() as peak:
        found = data.one_run(METHODS[name][0], given, seed=seed, epochs=EPOCHS, lr=lr, batch=BATCH)
    return found | {"added_mb": found["train_peak_mb"] - peak.before_mb}


def _peer(peer: tuple[str, str, dict[str, Any], tuple[float, ...]], given: Task, seed: int, lr: float, *, costed: bool) -> dict[str, Any]:
    """A peer's figures, scored by the same metric: validation and test rows are predicted together and parted here; costs want a process of their own."""
    import torch

    from paretune import backbones, tasks
    from paretune.meters import system

    library, config, arguments, _ = peer
    source = str(backbones.find("minilm").source)
    pace = {"dtype": system.fastest_dtype().dtype}
    train, validation, test = (data.encoded(given, split, source=source, longest=LONGEST) for split in ("train", "validation", "test"))
    job = {"library": library, "config": config, "arguments": arguments, "source": source, "outputs": len(given.labels) or 1, "train": train,
           "test": [*validation, *test], "lr": lr, "epochs": EPOCHS, "batch": BATCH, "seed": seed, "like_ours": pace}  # fmt: skip
    command = (INTERPRETERS[library], peers.__file__)
    if costed:
        with peers.Worker(*command) as worker:
            found = worker.ask(job)
    else:
        found = peers.standing(*command).ask(job)
    answers = [torch.tensor(p).softmax(-1).tolist() if given.labels else p[0] for p in found.pop("predictions")]
    split = len(given.validation)
    return found | {
        "seed": seed, "metric": given.metric, "score": tasks.score(given, answers[split:], rows=given.test),
        "validation_score": tasks.score(given, answers[:split], rows=given.validation), "train": len(given.train), "test": len(given.test),
        "environment": system.describe(),
    }  # fmt: skip


def _machine(table: Table) -> str:
    """What the costs were measured on, and the most that any run of the table took."""
    runs = [found for n in (*METHODS, *PEERS) for t in TASKS for s in SEEDS if (found := table.found(_cell(n, t, s)))]
    costed = [table.found(_cell(n, COSTED, s)) for n in (*METHODS, *PEERS) for s in SEEDS]
    machines = sorted({f["environment"]["cpu"] if "environment" in f else "a machine that was not noted" for f in costed if f})
    longest = max(runs, key=lambda found: found["train_cpu_s"])
    return f"One thread of {' or '.join(machines)}, at most one run on a core. No training took more than {longest['train_cpu_s']:.0f} CPU s (`{longest['cell']}`)."


def _whole(table: Table) -> int | None:
    """The parameters of the backbone with its head, all of which `full` trains."""
    found = table.found(_cell("full", COSTED, SEEDS[0]))
    return found and found["trainable_parameters"] + found["head_parameters"]


def _costs(runs: list[dict[str, Any] | None], *, whole: int | None) -> list[str]:
    """What a method learns with and needs: a row of the second table."""
    tuned = next(filter(None, runs), None)
    learns = tuned and tuned["trainable_parameters"]
    shown = [f"{tuned['lr']:g}", f"{learns:,}", f"{100 * learns / whole:.3g} %" if whole else cells.NOT_RUN] if tuned else [cells.NOT_RUN] * 3
    return [*shown, *(cells.mean_range(runs, field=field, times=1.0, digits=digits) for field, digits in (("train_s", 1), ("train_cpu_s", 1), ("added_mb", 0)))]


def _beside(table: Table) -> str:
    """What peers need for the methods that they have, too."""
    shared = [(theirs, theirs.partition(": ")[2]) for theirs in PEERS]
    ratios = {field: [_mean(table, theirs, field) / _mean(table, ours, field) for theirs, ours in shared] for field in ("train_cpu_s", "added_mb")}
    said = [f"{min(found):.2f} to {max(found):.2f} times paretune's {what} (median {statistics.median(found):.2f})"
            for found, what in zip(ratios.values(), ("CPU time", "memory"), strict=True)]  # fmt: skip
    return f"In the {len(shared)} rows of peers, the same method takes {' and '.join(said)}."


def _mean(table: Table, name: str, field: str) -> float:
    found = [table.found(_cell(name, COSTED, s)) for s in SEEDS]
    return statistics.mean(f[field] for f in found if f) if any(found) else math.nan


def _gaps(table: Table, weaker: str, stronger: str) -> list[float]:
    """By how many points the second is ahead, task by task and seed by seed."""
    pairs = [(table.found(_cell(weaker, t, s)), table.found(_cell(stronger, t, s))) for t in TASKS for s in SEEDS]
    return [100 * (b["score"] - a["score"]) for a, b in pairs if a and b]


def page(table: Table) -> str:
    """docs/adaptation.md, from the files."""
    names = [*METHODS, *PEERS]
    scores = [[f"`{METHODS[n][0]}`" if n in METHODS else n, *(cells.mean_interval([table.found(_cell(n, t, s)) for s in SEEDS]) for t in TASKS)] for n in names]
    costs = [[n, *_costs([table.found(_cell(n, COSTED, s)) for s in SEEDS], whole=_whole(table))] for n in names]
    return f"""# Adapting MiniLM to six tasks

Test scores in percent (accuracy; Matthews for CoLA, Pearson for STS-B): the mean over {len(SEEDS)} seeds and the half width of its
95 % interval over them (Student's t, which is wide for {len(SEEDS)}; a method that stayed at chance with one seed shows as such a width). {TRAIN} training
texts, {EPOCHS} epochs in batches of {BATCH}, {TEST} test texts; the learning rate of every method of every library is the best of four on SST-2's validation split (one
seed) and is used on all tasks. Where a method needs many more steps than these, that shows. Of STS-B's labels paretune learns standardized ones, as it does of any
regression; the peers learn them as they are. MAM's rates are those of whole models, in both libraries: with the four of other added parts it failed in both. A rate
that one seed chose can be too high for another: so `compacter` and `unipelt` stay at chance with a seed where their intervals are wide.

{cells.markdown(["method", *TASKS], scores)}

What a run on {COSTED} costs: the mean of {len(SEEDS)} runs, each in a process of its own, with the lowest and the highest. Learns is without the head, and its share
is of the whole model. Memory is the process's peak while it trains, less what it held before the model was loaded. paretune's figures have the validation of each epoch
and the timing of number formats and attention kernels at the start in them; the peers' have neither. {_machine(table)}

{cells.markdown(["method", "rate", "learns", "share", "train s", "train CPU s", "memory MB"], costs)}

{_beside(table)}

The order that the literature found, and the order here, in points between runs of the same task and seed (95 % intervals, Student's t):

{cells.order(ORDER, functools.partial(_gaps, table))}

{TRAIN} texts and {EPOCHS} epochs are {math.ceil(TRAIN / BATCH) * EPOCHS} steps: what starts far from its goal (a random prompt, a random projection, masks) has
not arrived, and CoLA, MRPC and RTE need more than that of any method with a model of this size. The papers train for thousands of steps; this table
says what a small budget buys.

Made by `python -m benchmarks.adaptation` from the files in `benchmarks/results/adaptation/`; `--table` makes it again from them.
"""


TABLE = Table("adaptation", every_cell, page)

if __name__ == "__main__":
    TABLE.main()
