"""The verbs, in the order of the walk: load, adapt, fit, shrink, measure, run, frontier, learning_curve, search, export. The first file to read.

load -> adapt -> fit -> shrink -> measure -> frontier -> report / predict / export
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paretune import backbones, exports, inference, learning_curves, phases, runs, surgery, training
from paretune.errors import DataError, Incompatible
from paretune.inference import Bench
from paretune.meters.cost import Cost, unmeasured
from paretune.methods.modifiers.schedule import Schedule
from paretune.options import Options
from paretune.pareto.front import Front
from paretune.phases import Plan, shrink
from paretune.planning import allotment
from paretune.recipe import Recipe, as_recipe, as_written
from paretune.roles import Adapter, Method, Modifier
from paretune.store import Run
from paretune.tasks import Task

if TYPE_CHECKING:
    from paretune.searches.found import Found

__all__ = ["adapt", "export", "fit", "frontier", "learning_curve", "load", "measure", "processor", "read_run", "run", "search", "shrink"]

# What a frontier runs when no recipe is named: from a trained head to full fine-tuning, with and without shrinking.
# Recipes that begin alike share that work.
DEFAULT_RECIPES = (  # the ones that are missed least at the end: there a time budget may leave some out
    "head",
    "full",
    "lora(r=8)",
    "lora(r=8) | merge | int8",
    "lora(r=8) | merge | vocabulary | int8",
    "full | vocabulary | int8",
    "keep_layers | full | vocabulary | int8",
    "bitfit",
    "adapter",
    "top_layers(k=2)",
    "head | int8",
    "full | int8",
    "keep_layers | full",
)


def load(backbone: str, task: Task | None = None, *, seed: int = 0, readout: str | Method | None = None) -> nn.Module:
    """A plain transformers model with the task's head, in evaluation mode, ready to adapt.

    Args:
        backbone: a short name ("minilm"), a folder that save_pretrained wrote (adapters on it are restored), or a hub id.
        task: decides the head; without one the model has none.
        seed: of the head.
        readout: the one that the model is opened for; `choices` and `in_context` need a language model in the place of a head.
    """
    speaks = readout is not None and any(r.speaks for r in phases.readouts_of(as_recipe(readout)))
    return backbones.load(backbones.find(backbone), task, seed=seed, speaks=speaks)


def processor(model: nn.Module) -> Any:
    """The tokenizer or image processor that travels with the model; None where there is none."""
    return surgery.state(model).processor


def adapt(
    model: nn.Module, methods: str | Method | Recipe, *, name: str = "default", on_top: bool = False, seed: int = 0, task: Task | None = None
) -> nn.Module:
    """Attaches the adapters of one phase; only they and the task's head learn from here on.

    Args:
        model: stays the same object.
        methods: an adapter, or several joined by +.
        name: to switch, remove or route rows by.
        on_top: keep the adapters that are active now below the new ones.
        seed: of the adapters' initial values.
        task: for an adapter that leaves a choice to the training split, such as surgical.
    """
    (phase,) = as_recipe(methods).check().phases
    head = all(m.head for m in phase if isinstance(m, Schedule))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters, _ = phases.decided(model, [m for m in phase if isinstance(m, Adapter)], task=task)
        surgery.attach(model, adapters, name=name, on_top=on_top, head=head)
    return model


def fit(model: nn.Module, task: Task, *modifiers: Modifier, seed: int = 0, report: Callable[[dict[str, Any]], None] | None = None) -> training.Fitted:
    """Trains what `adapt` attached, on the task's training split; keeps the epoch that is best on validation.

    Args:
        modifiers: of this phase, a `Schedule` among them for rates and epochs.
        seed: of the order of examples.
        report: is told epoch, step, loss and examples per second.

    Raises:
        Incompatible: where nothing is attached, or all of it is frozen.
        Diverged: when the loss is not a number.
    """
    attached = [m for methods in surgery.state(model).adapters.values() for m in methods]
    if not attached:
        raise Incompatible("fit: nothing is attached to the model, so nothing would learn; adapt it first, as in pt.adapt(model, pt.LoRA())")
    if not any(p.requires_grad for p in model.parameters()):
        raise Incompatible("fit: nothing learns, as what is attached came frozen from a file or an earlier phase; call pt.thaw(model), or adapt it on_top")
    schedule = next((m for m in modifiers if isinstance(m, Schedule)), Schedule())
    schedule = phases.rated(schedule, tuple(attached), config=model.config)
    settings = training.Settings(seed=seed, device=str(next(model.parameters()).device), report=report)
    return training.fit(model, task, schedule=schedule, modifiers=modifiers, settings=settings)


def measure(model: nn.Module, task: Task, *, options: Options = Options()) -> Cost:  # noqa: B008
    """What an inference of this model costs: latency, throughput, energy, FLOPs; on the task's test examples."""
    (found,) = inference.measured({"model": Bench(model.eval(), task)}, options.metering).values()
    cost = unmeasured("only inference was measured; `pt.run` measures training, size and peak memory").with_readings(found["readings"])
    trainable, in_head = surgery.count(model)
    return Cost.from_json({**cost.to_json(), "meter": found["meter"], "protocol": found["protocol"],
                           "trainable_parameters": trainable, "head_parameters": in_head})  # fmt: skip


def run(
    recipe: str | Method | Recipe,
    task: Task,
    *,
    backbone: str,
    out: str | Path = "out",
    seed: int = 0,
    resume: bool = False,
    options: Options = Options(),
) -> Run:  # noqa: B008
    """Trains, shrinks, scores and measures one recipe; the result is `out/runs/<id>/`.

    Raises:
        Incompatible: before anything runs, where the recipe does not compose.
        StoreError: where this run was begun before and `resume` is not set.
    """
    runs.set_threads(options)
    plan = _plan(as_recipe(recipe), task, backbone, Path(out), seed, options)
    runs.refuse_existing([plan], plan.out, resume=resume)
    made = runs.make(plan, as_written(recipe))
    return made if runs.is_measured(made) else runs.measure([made], plan.task, options=options, progress=_measuring(options))[0]


def _measuring(options: Options) -> Callable[[str, int, int], None] | None:
    report = options.report
    return (lambda what, done, of: report({"measuring": what, "done": done, "of": of})) if report else None


def _plan(recipe: Recipe, task: Task, backbone: str, out: Path, seed: int, options: Options) -> Plan:
    found = backbones.find(backbone)
    if options.training.max_train:
        task = task.subset(options.training.max_train, seed=0)
    return Plan(phases.complete(recipe, found, task=task, options=options), task, found, seed, out, options)


def plan_frontier(
    task: Task, *, backbone: str, recipes: Sequence[str] | None = None, seeds: int = 1, out: str | Path = "out", options: Options = Options()
) -> list[tuple[str, Plan]]:  # noqa: B008
    """(recipe as written, plan) of every run of a frontier, all checked; nothing is trained.

    With a time budget among the options, the training examples are cut to what it allows on this machine; where that is too little for all
    recipes, those at the end are left out.
    """
    asked = {as_recipe(r): as_written(r) for r in (recipes or DEFAULT_RECIPES)}  # each once, however often it is written
    plans = [(text, _plan(recipe, task, backbone, Path(out), seed, options)) for seed in range(seeds) for recipe, text in asked.items()]
    if options.training.time_budget_s is None:
        return plans
    max_train, kept = allotment.remembered(Path(out), plans, options=options)
    fewer = dataclasses.replace(options, training=dataclasses.replace(options.training, time_budget_s=None, max_train=max_train))
    return plan_frontier(task, backbone=backbone, recipes=list(asked.values())[:kept], seeds=seeds, out=out, options=fewer)


def frontier(
    task: Task, *, backbone: str, recipes: Sequence[str] | None = None, seeds: int = 1, battery: str | None = None,
    out: str | Path = "out", resume: bool = False, options: Options = Options(),
) -> Front:  # noqa: B008  # fmt: skip
    """Runs recipes over seeds, each shared phase once, measures them interleaved, and gives the frontier.

    Raises:
        Incompatible: before anything runs, where a recipe does not compose.
        StoreError: where the folder holds work begun before and `resume` is not set.
    """
    runs.set_threads(options)
    plans = plan_frontier(task, backbone=backbone, recipes=recipes, seeds=seeds, out=out, options=options)
    runs.refuse_existing([plan for _, plan in plans], Path(out), resume=resume)
    made = []
    for i, (text, plan) in enumerate(plans):
        made.append(runs.make(_telling(plan, recipe=text, run=i + 1, runs=len(plans)), text))
    open_runs = [r for r in made if not runs.is_measured(r)]
    if open_runs:
        runs.measure(open_runs, plans[0][1].task, options=options, progress=_measuring(options))
    return Front([Run.read(r.folder) for r in made], battery, folder=Path(out))


def learning_curve(
    recipe: str | Method | Recipe, task: Task, *, backbone: str, seeds: int = 1, out: str | Path = "out", resume: bool = False, options: Options = Options()
) -> list[Run]:  # noqa: B008
    """Trains one recipe on growing shares of the training split, smallest first; inference is not measured.

    `learning_curves.predict` says where the scores lead.

    Raises:
        DataError: for a metric of which less is better, and for too few training rows.
        StoreError: where the folder holds work begun before and `resume` is not set.
    """
    if task.better == "lower":
        raise DataError(f"a learning curve foretells a score of which more is better, such as accuracy; less {task.metric} is better")
    runs.set_threads(options)
    whole = task.subset(options.training.max_train, seed=0) if options.training.max_train else task
    every = dataclasses.replace(options, training=dataclasses.replace(options.training, max_train=None))
    asked = [(n, seed) for n in learning_curves.shares(len(whole.train)) for seed in range(seeds)]
    plans = [_plan(as_recipe(recipe), whole.subset(n, seed=0), backbone, Path(out), seed, every) for n, seed in asked]
    runs.refuse_existing(plans, Path(out), resume=resume)
    return [
        runs.make(_telling(plan, recipe=f"{len(plan.task.train):,} rows", run=i + 1, runs=len(plans)), as_written(recipe)) for i, plan in enumerate(plans)
    ]


def _telling(plan: Plan, **where: Any) -> Plan:
    """The plan, whose progress says which run of how many it is."""
    report = plan.options.report
    told = (lambda info: report({**info, **where})) if report else None
    return dataclasses.replace(plan, options=dataclasses.replace(plan.options, report=told))


def search(
    task: Task, *, backbone: str, space: str = "auto", budget: str | None = None, under: str | None = None,
    out: str | Path = "out", resume: bool = False, options: Options = Options(),
) -> Found:  # noqa: B008  # fmt: skip
    """Finds the recipes of a space with the best scores for the least cost, and spends no more than its budget on it.

    Args:
        backbone: one, or several to choose from: "minilm,roberta-base".
        space: a recipe with ranges, "lora(r=[2..64 log]) | {none, merge | int8}", or auto or autopeft; see `searches.space`.
        budget: what all of it may spend, failed trials, scoring and measuring included: "train_s=3600, train_energy_j=20000".
        under: limits of the model that is chosen, "latency_p50_ms=20, stored_mb=30"; their costs are what the score is set against.
        options: `searching` has the number of trials, the fresh seeds of the end, the seed and the storage.

    Raises:
        BudgetError: without a budget or a number of trials, or where the budget does not reach for one recipe.
        StoreError: without Optuna; where `out` holds a search that was begun before and `resume` is not set.
    """
    from paretune.searches import verb  # which makes its runs with the verbs here

    asked = {"space": space, "budget": budget, "under": under}
    return verb.searched(task, backbone=backbone, asked=asked, out=Path(out), resume=resume, options=options)


def read_run(folder: str | Path) -> Run:
    """A finished run."""
    return Run.read(folder)


def export(
    run: Run | str | Path, folder: str | Path, *, to: str = "hf", keep_adapters: bool = False, told: Callable[[str], None] | None = None
) -> Path:
    """Writes a run's model for others: "hf" a Hugging Face folder, "peft" a PEFT adapter folder where the format has the method,
    "onnx" a graph that onnxruntime runs, "bitsandbytes" a folder of an NF4 run that transformers opens with it.

    Args:
        keep_adapters: "hf" and "onnx" merge adapters where they can be merged; with this, they stay apart.
        told: is told what the export has otherwise than the run, in sentences; the folder's card has them, too.

    Raises:
        Incompatible: for a run whose methods the format has not, or an export that answers otherwise than the run.
        StoreError: for a folder that holds something already, or too little disk.
    """
    return exports.write(run if isinstance(run, Run) else Run.read(run), Path(folder), to=to, keep_adapters=keep_adapters, told=told)
