"""From a finished recipe to a run folder: scored on the test split, measured on the model that was saved and opened again."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import paretune
from paretune import inference, phases, store, tasks, together, training
from paretune.errors import StoreError
from paretune.inference import Bench
from paretune.meters import system
from paretune.meters.cost import MEASURED, Cost, unmeasured
from paretune.meters.reading import Reading, missing
from paretune.options import Options
from paretune.pareto import intervals
from paretune.phases import Plan
from paretune.reports import card
from paretune.store import Run
from paretune.weights import packed

PENDING = "inference is not measured yet"
NO_PEAKS = "it takes a fresh process, which a trial has only where a limit asks for it; `paretune measure` measures it"


def folder_of(plan: Plan) -> Path:
    """Where the plan's run is kept."""
    return plan.out / "runs" / plan.id


def begun(plan: Plan) -> bool:
    """Has anything of this run been done in its results folder?"""
    return folder_of(plan).exists() or any(
        plan.folder(k).with_name(plan.folder(k).name + ".work").exists() for k in range(1, 1 + len(plan.recipe.phases))
    )


def make(plan: Plan, spelling: str) -> Run:
    """Does what is not done yet of one run; its inference costs stay open until `measure`."""
    target = folder_of(plan)
    together.join(plan.options.compute.device)
    with together.locked(target):
        done = together.agreed((target / "run.json").is_file())
        records = [] if done else phases.walk(plan)
        if together.first() and not done:
            saved = plan.folder(len(plan.recipe.phases)) / "model"
            with store.written(target) as part:
                store.share(saved, part / "model")
                store.write_json(part / "run.json", _record(plan, spelling, records, part))
                (part / "log.jsonl").write_text("".join(json.dumps(record, default=str) + "\n" for record in records))
                card.save(store.read_json(part / "run.json"), part)
    return Run.read(target)


def _record(plan: Plan, spelling: str, records: list[dict[str, Any]], part: Path) -> dict[str, Any]:
    task = plan.task
    model = inference.open_model(part / "model", task)
    found = training.predict(model, task, rows=task.test)
    each = tasks.per_example(task, found, rows=task.test)
    score = tasks.score(task, found, rows=task.test)
    interval, how = intervals.of_run(each, tasks.redrawn(task, found, rows=task.test), rows=len(found))
    low, high = interval or (None, None)
    store.write_json(part / "per_example.json", each)
    store.write_json(part / "sample.json", list(task.test[: inference.SAMPLE]) if _plain(task.test[:1]) else [])
    validation = tasks.score(task, training.predict(model, task, rows=task.validation), rows=task.validation) if len(task.validation) else None
    return {
        "format": store.FORMAT, "id": plan.id, "recipe": spelling, "resolved": plan.recipe.resolved, "recipe_id": plan.recipe.id,
        "backbone": plan.backbone.name, "backbone_revision": plan.backbone.revision, "weights_sha256": plan.backbone.weights_sha256,
        "task": task.name, "task_definition": task.define(), "task_fingerprint": task.fingerprint, "seed": plan.seed, "metric": task.metric,
        "validation_score": validation, "score": score, "score_low": low, "score_high": high, "score_interval": how,
        "per_example": "per_example.json" if each else None, "label_scale": {k: v for k, v in model.config.to_dict().items() if k in ("label_mean", "label_std")},
        "loads_with": phases.loads_with(part / "model"), "phases": records, "cost": _training_cost(records, store.stored_mb(part / "model")).to_json(),
        "environment": {**system.describe(), "paretune": paretune.__version__, "device": plan.options.compute.device},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }  # fmt: skip


def _plain(rows: Sequence[Any]) -> bool:
    return all(isinstance(v, str | int | float | list | type(None)) for row in rows for v in row.values())


def _training_cost(records: list[dict[str, Any]], stored: float) -> Cost:
    joules = [r["train_energy_j"] for r in records]
    reason = next((r["energy_reason"] for r in records if r["train_energy_j"] is None), "")
    return dataclasses.replace(
        unmeasured(PENDING),
        train_s=sum(r["train_s"] for r in records),
        train_cpu_s=sum(r["train_cpu_s"] for r in records),
        train_energy_j=None if None in joules else sum(joules),
        train_peak_mb=max(r["train_peak_mb"] for r in records),
        trainable_parameters=max(r["trainable_parameters"] for r in records),
        head_parameters=max(r["head_parameters"] for r in records),
        stored_mb=stored,
        reasons={**dict.fromkeys(MEASURED, PENDING), "train_energy_j": reason or PENDING},
    )


def measure(runs: Sequence[Run], task: Any, *, options: Options, peaks: bool = True, progress: Callable[[str, int, int], None] | None = None) -> list[Run]:
    """Measures the inference of runs, interleaved, and writes it into their run.json. Runs of one recipe on one backbone share one measurement.

    Of several processes the first one measures, while the others wait.

    Args:
        peaks: their peak memory, too, each in a fresh process.
    """
    if not together.first():
        together.wait()
        return [Run.read(run.folder) for run in runs]
    first = {_what(run): run for run in reversed(runs)}
    benches = {what: Bench(_open(run, task, options), task) for what, run in first.items()}
    found = inference.measured(benches, options.metering, progress=progress)
    slow = {what: _slowdowns(bench.model) if options.compute.device == "cpu" else [] for what, bench in benches.items()}
    benches.clear()
    for what, peak in zip(first, _peaks(list(first.values()), options, progress) if peaks else [missing("MB", NO_PEAKS)] * len(first), strict=True):
        found[what]["readings"]["peak_memory_mb"] = peak
    measured = [_measured(run, {**found[_what(run)], "slowdowns": slow[_what(run)]}, first[_what(run)].id) for run in runs]
    together.wait()
    return measured


def _what(run: Run) -> str:
    return f"{run.recipe} on {run.record['backbone']}"


def _peaks(runs: Sequence[Run], options: Options, progress: Callable[[str, int, int], None] | None) -> list[Reading]:
    if progress:
        progress("memory", 0, len(runs))
    found = inference.peak_memory([run.folder for run in runs])
    if progress:
        progress("memory", len(runs), len(runs))
    for run, peak in zip(runs, found, strict=True):
        if peak.value is None and options.report:
            options.report({"said": f"warning: {run.recipe}: {peak.reason}"})
    return found


def _open(run: Run, task: Any, options: Options) -> Any:
    return inference.open_model(run.model, task).to(options.compute.device)


def _slowdowns(model: Any) -> list[dict[str, Any]]:
    """What the model's packed maps cost in time on this processor, beside float ones."""
    where = {"environment": system.describe()}
    return [{"format": spelling, "shape": list(shape), "times": [dataclasses.asdict(s) for s in times], **where} for spelling, shape, times in packed.timed(model)]


def _measured(run: Run, found: dict[str, Any], by: str) -> Run:
    readings: dict[str, Reading] = found["readings"]
    cost = run.cost.with_readings(readings)
    cost = dataclasses.replace(cost, meter=found["meter"], protocol=found["protocol"])
    record = {**run.record, "cost": cost.to_json(), "cost_measured_on": by, "slowdowns": found["slowdowns"]}
    store.write_json(run.folder / "run.json", record)
    card.save(record, run.folder)
    return Run(run.folder, record)


def is_measured(run: Run) -> bool:
    """Has the run's inference been measured?"""
    return run.cost.latency_p50_ms is not None


def refuse_existing(plans: Sequence[Plan], out: Path, *, resume: bool) -> None:
    """Without `resume`, work that was begun before is neither taken over nor overwritten silently.

    Raises:
        StoreError: naming the run and what to do.
    """
    old = next((plan for plan in plans if begun(plan)), None)
    if old is not None and not resume:
        raise StoreError(
            f"{folder_of(old)} was begun before, with the same recipe, data, backbone and seed; add --resume to go on with it, or choose another --out"
        )


def set_threads(options: Options) -> None:
    """Lets torch use the asked number of threads."""
    if options.compute.threads:
        torch.set_num_threads(options.compute.threads)
