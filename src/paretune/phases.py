"""A recipe at work: phase after phase, each done once per (recipe so far, backbone, data, seed) and kept for others to share."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from paretune import backbones, hub, inference, processors, registry, shards, store, surgery, teachers, together, training
from paretune.backbones import Backbone
from paretune.errors import Incompatible
from paretune.meters import energy
from paretune.meters.spending import Spending, Spent
from paretune.methods.modifiers.schedule import Schedule
from paretune.options import Options
from paretune.planning import fitting
from paretune.recipe import Phase, Recipe, as_recipe, is_training, spell
from paretune.roles import Adapter, Examples, Method, Modifier, Readout, Transform
from paretune.tasks import Task


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides what a run computes, and where it is kept."""

    recipe: Recipe  # complete: every training phase has its schedule
    task: Task
    backbone: Backbone
    seed: int
    out: Path
    options: Options = Options()

    def identity(self, k: int) -> str:
        """The name of the first k phases' result."""
        return store.identity({
            "recipe": self.recipe.prefix(k).resolved, "backbone": self.backbone.revision, "weights": self.backbone.weights_sha256,
            "task": self.task.fingerprint, "seed": self.seed, **teachers.hashes(self.recipe.prefix(k)),
        })  # fmt: skip

    @property
    def id(self) -> str:
        """The run's name."""
        return self.identity(len(self.recipe.phases))

    def folder(self, k: int) -> Path:
        """Where the result of the first k phases is kept."""
        return self.out / "phases" / self.identity(k)


def complete(recipe: Recipe, backbone: Backbone, *, task: Task, options: Options) -> Recipe:
    """The recipe with a schedule in every training phase, learning rates from the adapters' cards filled in.

    Raises:
        Incompatible: where it does not compose, or nothing in it gives the task an answer that the checkpoint does not have.
    """
    if any(m.ranks for phase in recipe.phases for m in phase if isinstance(m, Modifier)) and not readouts_of(recipe):
        recipe = registry.get("choices")() | recipe.behind(1)  # what their losses compare
    answers = any(is_training(phase) or isinstance(phase[0], Readout) for phase in recipe.phases)
    if not answers and not backbones.has_head(backbone, task):
        raise Incompatible(
            f"{recipe}: nothing learns, and {backbone.name} has no head for the task {task.name}; train first, as in lora | merge | {recipe}, "
            "or give a backbone that was fine-tuned for these labels"
        )
    teachers.check(recipe, backbone, task=task)
    recipe.check()
    if options.training.shard:
        shards.check(recipe)
    for readout in readouts_of(recipe):
        readout.check(backbones.outline(backbone, task, speaks=readout.speaks), Examples(task, None))
    config = AutoConfig.from_pretrained(backbone.source)
    return Recipe(tuple(_scheduled(phase, options, config, task=task) if is_training(phase) else phase for phase in recipe.phases))


def readouts_of(recipe: Recipe) -> list[Readout]:
    """The readouts of a recipe: none or one, where it composes."""
    return [m for phase in recipe.phases for m in phase if isinstance(m, Readout)]


def first_model(plan: Plan) -> nn.Module:
    """What the plan starts from: the backbone with the task's head, or with its own words where the recipe's readout speaks."""
    return backbones.load(plan.backbone, plan.task, seed=plan.seed, speaks=any(r.speaks for r in readouts_of(plan.recipe)))


def _scheduled(phase: Phase, options: Options, config: Any, *, task: Task) -> Phase:
    given = next((m for m in phase if isinstance(m, Schedule)), None)
    asked = {k: getattr(options.training, k) for k in ("epochs", "lr", "batch", "dtype") if getattr(options.training, k) is not None}
    schedule = rated(given or Schedule(**asked), phase, config=config).sized(task)
    return (*(m for m in phase if not isinstance(m, Schedule)), schedule)


MOST_HEAD_LR = 3e-3  # beside adapters; on 300 texts of SST-2, MiniLM's pooler and head lost by the rates of 1e-2 and more that suit ia3 and prompt


def rated(schedule: Schedule, phase: Phase, *, config: Any) -> Schedule:
    """The schedule with the rates that it leaves open: of a phase's adapters; and of a head beside adapters, where theirs would spoil it."""
    if schedule.lr is None:
        schedule = dataclasses.replace(schedule, lr=default_lr(phase, config))
    beside = any(isinstance(m, Adapter) and not isinstance(m, registry.get("head")) for m in phase)
    if schedule.head and schedule.head_lr is None and schedule.lr > MOST_HEAD_LR and beside:
        schedule = dataclasses.replace(schedule, head_lr=MOST_HEAD_LR)
    return schedule


BASE_SIZE = 12 * 768  # layers times width of the base models that most published rates are for


def default_lr(phase: Phase, config: Any) -> float:
    """The lowest rate of the phase's adapters; one that moves whole weights falls with the size of the model."""
    size = (getattr(config, "num_hidden_layers", None) or 12) * (getattr(config, "hidden_size", None) or 768)
    rates = [m.lr * (BASE_SIZE / size if m.card.lr_falls_with_size else 1.0) for m in phase if isinstance(m, Adapter) and m.lr]
    return float(f"{min(rates, default=1e-3):.3g}")


def walk(plan: Plan) -> list[dict[str, Any]]:
    """Does what is not done yet; afterwards `plan.folder(len(phases))` holds the model. Returns the phases' records."""
    records: list[dict[str, Any]] = []
    model: nn.Module | None = None
    for k in range(1, len(plan.recipe.phases) + 1):
        folder = plan.folder(k)
        with together.locked(folder):
            if together.agreed((folder / "phase.json").is_file()):
                records.append(store.read_json(folder / "phase.json"))
                model = None
                continue
            if not (together.first() or is_training(plan.recipe.phases[k - 1])):
                model = None  # what is not training the first process does alone
                continue
            model = model or _before(plan, k)
            records.append(_execute(plan, k, model))
    if not plan.recipe.phases:
        raise Incompatible("the recipe is empty")
    return records


def _before(plan: Plan, k: int) -> nn.Module:
    if k == 1:
        return first_model(plan)
    return inference.open_model(plan.folder(k - 1) / "model", plan.task)


def _execute(plan: Plan, k: int, model: nn.Module) -> dict[str, Any]:
    phase, folder = plan.recipe.phases[k - 1], plan.folder(k)
    torch.manual_seed(int(plan.identity(k), 16) % 2**63)
    work = folder.with_name(folder.name + ".work")
    record = {"id": plan.identity(k), "spelling": spell((phase,)), "role": "training" if is_training(phase) else phase[0].role}
    before = processors.get(model)
    record |= _train(plan, k, model, work) if is_training(phase) else _shrunk(plan, model, phase[0])
    if isinstance(phase[0], Transform):
        record["facts"] = phase[0].facts(before, model, task=plan.task)
    if not together.first():
        return record
    store.require_space(folder, sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6 * 1.1)
    with store.written(folder) as part:
        save_model(model, part / "model")
        store.write_json(part / "phase.json", record)
    shutil.rmtree(work, ignore_errors=True)
    return record


def _train(plan: Plan, k: int, model: nn.Module, work: Path) -> dict[str, Any]:
    phase = plan.recipe.phases[k - 1]
    schedule = next(m for m in phase if isinstance(m, Schedule))
    report = plan.options.report
    settings = training.Settings(
        seed=plan.seed, device=plan.options.compute.device, folder=work, name=str(plan.recipe),
        report=(lambda info: report({**info, "phase": k, "phases": len(plan.recipe.phases)})) if report else None,
        after=lambda k: _before(plan, k + 1), shard=plan.options.training.shard,
    )  # fmt: skip
    modifiers = [m for m in phase if isinstance(m, Modifier)]
    found: dict[str, Any] = {}
    fitted: list[training.Fitted] = []

    def learn(spending: Spending) -> None:
        adapters, about = decided(model, [m for m in phase if isinstance(m, Adapter)], task=plan.task)
        surgery.attach(model, adapters, name=f"phase_{k}", on_top=True, head=schedule.head)
        found.update(about, **dict(zip(("trainable_parameters", "head_parameters"), surgery.count(model), strict=True)))
        counted = dataclasses.replace(settings, spending=spending)
        with fitting.within(model, plan.options.training.max_memory_mb) as limits:
            fitted.append(training.fit(model, plan.task, schedule=schedule, modifiers=[*modifiers, *limits], settings=counted))
        found.update([("memory_cut", dataclasses.asdict(limit.cut)) for limit in limits])

    record = _metered(plan, learn, together.spent)
    each = training.flops_per_example(model, plan.task)
    surgery.freeze(model)
    surgery.settle(model)
    (fit,) = fitted
    several = {"processes": together.count()} if together.count() > 1 else {}
    return record | found | several | {
        "examples": fit.examples, "steps": fit.steps, "epochs": fit.epochs, "best_epoch": fit.best_epoch, "dtype": fit.dtype,
        "attention": fit.attention, "train_flops": None if each is None or fit.flops_beside is None else each * fit.examples + fit.flops_beside,
    }  # fmt: skip


def _shrunk(plan: Plan, model: nn.Module, method: Any) -> dict[str, Any]:
    if not isinstance(method, Readout):
        return _metered(plan, lambda _: shrink(model, method, plan.task))
    fitted: list[int] = []
    record = _metered(plan, lambda _: fitted.append(_fit(model, method, plan.task)))
    each = training.forward_flops(model, plan.task)
    return record | {"examples": fitted[0], "train_flops": None if each is None else each * fitted[0]}


def decided(model: nn.Module, adapters: list[Adapter], *, task: Task | None) -> tuple[list[Adapter], dict[str, Any]]:
    """The adapters with what they leave to the data decided on the training split; for the record, what was decided and found out."""
    examples = Examples(task, surgery.state(model).processor) if task else None
    pairs = [method.chosen(model, examples) for method in adapters]
    methods, facts = [method for method, _ in pairs], {name: value for _, found in pairs for name, value in found.items()}
    return methods, {} if methods == adapters else {"decided": spell((tuple(methods),)), "facts": facts}


def _metered(plan: Plan, work: Callable[[Spending], Any], all_of: Callable[[Spent], Spent] = lambda here: here) -> dict[str, Any]:
    """What the work cost; of a training that was resumed with what it had spent until its checkpoint, of several processes what all spent.

    What a killed process did after its last checkpoint is not counted, in seconds and joules as in examples and FLOPs.
    """
    metering, device = plan.options.metering, plan.options.compute.device
    with Spending(energy.find(metering.power, metering.profile, device=device), device) as spending:
        work(spending)
    spent = all_of(spending.so_far())
    return {
        "train_s": spent.wall_s, "train_cpu_s": spent.cpu_s, "train_energy_j": spent.energy.value,
        "energy_reason": spent.energy.reason, "train_peak_mb": spent.peak_mb,
        "trainable_parameters": 0, "head_parameters": 0, "examples": 0, "train_flops": 0.0,
    }  # fmt: skip


def shrink(model: nn.Module, methods: Any, task: Task | None = None) -> nn.Module:
    """Transforms and readouts applied to a model one after another, with the training split where they ask for examples.

    Args:
        model: stays the same object.
        methods: one, or a recipe of them: `Int8()`, "vocabulary | int8".
        task: for what reads examples.

    Raises:
        Incompatible: for a method that needs examples and no task, or that is no transform or readout.
    """
    for phase in as_recipe(methods).phases:
        for method in phase:
            _change(model, method, task=task)
    return model


def _change(model: nn.Module, method: Method, *, task: Task | None) -> None:
    if not isinstance(method, Transform | Readout):
        raise Incompatible(f"{method!r} is {method.role}, not a transform or readout; use adapt and fit for what learns")
    if not method.keeps_ranges:
        surgery.refuse_ranges(model, repr(method))
    needs = isinstance(method, Readout) or method.needs_examples
    if needs and task is None:
        raise Incompatible(f"{method!r} reads training examples; give the task: shrink(model, {method!r}, task)")
    if isinstance(method, Readout):
        _fit(model, method, task)
        return
    examples = Examples(task, surgery.state(model).processor) if task else None
    if isinstance(method, registry.get("merge")) and not surgery.state(model).active:
        surgery.settle(model)  # what was selected was folded when its phase ended
    else:
        method.apply(model, examples)
    hub.refresh(model)


def _fit(model: nn.Module, readout: Readout, task: Task | None) -> int:
    examples = readout.fit(model, Examples(task, surgery.state(model).processor))
    hub.refresh(model)
    return examples


def save_model(model: Any, folder: Path) -> None:
    """The model and its processor in Hugging Face format."""
    with backbones.quiet():
        model.save_pretrained(folder)
        processors.save(model, folder)


def loads_with(folder: Path) -> str:
    """What opens a saved model: "transformers", or "transformers+paretune"."""
    about = store.read_json(folder / "config.json").get("quantization_config") or {}
    return "transformers+paretune" if about.get("quant_method") == hub.NAME else "transformers"
