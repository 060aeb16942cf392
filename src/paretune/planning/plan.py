"""What a run will take, before it begins: time, memory, disk and joules, from a rehearsal of each phase on this machine."""

from __future__ import annotations

import dataclasses
import itertools
import math

from torch import nn

from paretune import batches, phases, training
from paretune.events import Events
from paretune.meters.carbon import KWH_J, Factor
from paretune.meters.memory import Peak
from paretune.meters.reading import Reading, missing
from paretune.methods.modifiers.schedule import Schedule
from paretune.phases import Plan
from paretune.planning import allotment, fitting, rehearsal
from paretune.planning.rehearsal import Took, now
from paretune.recipe import Phase, is_training, spell
from paretune.roles import Readout
from paretune.step import adamw
from paretune.step.probe import Pace
from paretune.units import show
from paretune.weights import packed
from paretune.weights.kernels import Slowdown
from paretune.weights.packed import Packing

CHECKPOINTS = 2  # of a training on disk at once: the older one goes when the newer is whole
WATCHED_AT_ONCE = 16  # rows in a part of a validation, about
WITHIN = 0.25  # half-width of the printed intervals, relative; how often it holds is in docs/plan.md


@dataclasses.dataclass(frozen=True)
class Stage:
    """One phase, or what follows the last."""

    name: str
    took: Took
    peak_mb: float | None = None
    saved_mb: float = 0.0
    work_mb: float = 0.0  # on disk while it trains: checkpoints and frozen features
    flops: float | None = None
    energy_j: float | None = None
    spread: float = 0.0  # of the timed batches, relative


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a run will take; every figure is an estimate."""

    stages: tuple[Stage, ...]
    rehearsal_s: float
    power: str = ""  # why there are no joules
    formats: tuple[tuple[str, tuple[int, int], tuple[Slowdown, ...]], ...] = ()  # packed: spelling, shape of a map, what it costs beside a float one

    @property
    def training(self) -> Took:
        """Of all phases: `train_s` and `train_cpu_s` of the run."""
        return sum((stage.took for stage in self.stages[:-1]), Took())

    @property
    def whole(self) -> Took:
        """With scoring, saving and measuring."""
        return self.training + self.stages[-1].took

    @property
    def peak_mb(self) -> float:
        """`train_peak_mb` of the run."""
        return max(stage.peak_mb for stage in self.stages if stage.peak_mb is not None)

    @property
    def saved_mb(self) -> float:
        """Of the models that stay on disk, one for each phase."""
        return sum(stage.saved_mb for stage in self.stages)

    @property
    def disk_mb(self) -> float:
        """The most that is on disk at a time: the models of earlier phases, and what a phase needs while it trains or leaves behind."""
        before = itertools.accumulate((stage.saved_mb for stage in self.stages), initial=0.0)
        return max(earlier + max(stage.work_mb, stage.saved_mb) for earlier, stage in zip(before, self.stages, strict=False))

    @property
    def energy(self) -> Reading:
        """`train_energy_j` of the run."""
        known = [stage.energy_j for stage in self.stages if stage.energy_j is not None]
        if not known:
            return missing("J", self.power)
        joules = sum(known)
        return Reading(joules, "J", *self.around(joules), source="the power during the rehearsal, times the expected seconds", estimate=True)

    def around(self, value: float) -> tuple[float, float]:
        """The interval about an expected value."""
        apart = max(WITHIN, 2 * max(stage.spread for stage in self.stages))
        return value / (1 + apart), value * (1 + apart)


def expect(plan: Plan) -> Expected:
    """Rehearses each phase on a few batches, on the model as the phases before leave it; writes nothing.

    Raises:
        BudgetError: where a limit of memory is set and nothing fits it.
    """
    started = now()
    model = phases.first_model(plan)
    stages: list[Stage] = []
    formats: list[tuple[str, tuple[int, int], tuple[Slowdown, ...]]] = []
    scored, watts, reason = Took(), None, "nothing is trained, so no power was read"
    for k, phase in enumerate(plan.recipe.phases):
        if is_training(phase):
            stage, found, reason = _trained(model, plan, k)
            watts, scored = found.power_w, found.answer
        else:
            stage, scored = _passed(model, phase, plan=plan, watts=watts)
        stages.append(dataclasses.replace(stage, saved_mb=_bytes(model) / 1e6))
        formats += packed.timed(model) if isinstance(phase[0], Packing) else []
    rows = len(plan.task.validation) + len(plan.task.test)
    if scored == Took():
        scored = rehearsal.answer(model, plan.task)
    last = scored * rows + Took(allotment.PER_RUN_S, allotment.PER_RUN_S)
    return Expected((*stages, Stage("scoring, measuring", last)), (now() - started).wall_s, reason, tuple(formats))


def _trained(model: nn.Module, plan: Plan, k: int) -> tuple[Stage, rehearsal.Rehearsed, str]:
    phase = plan.recipe.phases[k]
    weigher = _Weigher(plan, epochs=next(m.epochs for m in phase if isinstance(m, Schedule)))
    with fitting.within(model, plan.options.training.max_memory_mb) as limits:
        found = rehearsal.rehearse(model, plan, k=k, beside=[*limits, weigher])
    found = dataclasses.replace(found, once=found.once - weigher.took)
    took = found.training(len(plan.task.train), watched=training.watched_of(plan.task))
    saves = math.ceil(weigher.epochs) - 1 + int(took.wall_s / training.Settings.checkpoint_every_s)
    work_mb = (weigher.checkpoint_b * min(saves, CHECKPOINTS) + weigher.features_b) / 1e6
    flops = weigher.counted_flops and weigher.counted_flops * len(plan.task.train) * weigher.per_row * found.epochs * found.share
    energy = None if found.power_w is None else found.power_w * took.wall_s
    return Stage(spell((phase,)), took, weigher.peak_mb, work_mb=work_mb, flops=flops, energy_j=energy, spread=found.spread), found, found.reason


def _passed(model: nn.Module, phase: Phase, *, plan: Plan, watts: float | None) -> tuple[Stage, Took]:
    """A transform or readout: a transform is done as it will be, a readout sees a few rows."""
    if isinstance(phase[0], Readout):
        with Peak(plan.options.compute.device) as peak:
            found = rehearsal.readout(model, phase[0], task=plan.task)
        took, scored = found.training(len(plan.task.train), watched=0), found.answer
    else:
        started = now()
        with Peak(plan.options.compute.device) as peak:
            rehearsal.pass_through(model, phase, task=plan.task)
        took, scored = now() - started, Took()
    return Stage(spell((phase,)), took, peak.reading.value, energy_j=None if watts is None else watts * took.wall_s), scored


def _bytes(model: nn.Module) -> float:
    """Of the file of weights, where tied ones stand once."""
    tensors = {(t.data_ptr(), t.shape, t.dtype): t for t in model.state_dict().values()}
    return float(sum(t.numel() * t.element_size() for t in tensors.values()))


class _Weigher(Events):
    """Counts memory and FLOPs of a training that is about to begin, at the pace that the probe chose, and after a step what it has on disk."""

    def __init__(self, plan: Plan, *, epochs: float) -> None:
        self.asked, self.epochs = plan, epochs
        self.took, self.peak_mb, self.counted_flops, self.per_row = Took(), 0.0, None, 1.0
        self.checkpoint_b = self.features_b = 0.0

    def events(self, loop: training.Loop) -> Events:
        self.resident_b = fitting.resident_b(loop.accelerator.device)
        return self

    def pace(self, loop: training.Loop, pace: Pace) -> Pace:
        started = now()
        kind, size = loop.task.kind, loop.schedule.batch
        rows = rehearsal.sample(self.asked.task.train, rehearsal.SAMPLE * size)
        encodings = training.encode(loop.task, rows, model=loop.model)
        lengths = [kind.length(e) for e in encodings]
        self.per_row = len(encodings) / len(rows)
        found = fitting.appetite(loop.model, kind, encodings=encodings, collate=loop.collate, pace=pace, dropout=loop.schedule.dropout)
        steps = [_parts(loop, indices, lengths) for indices in batches.epoch_batches(lengths, None, schedule=loop.schedule, random=batches.generator(0, 0))]
        held = max(found.of_part([lengths[i] for i in part], packed=loop.schedule.pack) for step in steps for part in step)
        self.resident_b += fitting.encodings_b(encodings) * len(self.asked.task.train) / len(rows)
        learning = sum(p.numel() for p in loop.parameters.values())
        passes = self.epochs * len(self.asked.task.train) / len(rows)
        counts = round(sum(map(len, steps)) * passes) + training.watched_of(self.asked.task) // WATCHED_AT_ONCE
        counts = counts if loop.schedule.pack else min(counts, fitting.shapes(lengths))
        self.resident_b += fitting.kernels_b(loop, counts, dtype=pace.dtype)
        parts, within = max(map(len, steps)) > 1, not adamw.needs_all(loop)
        self.peak_mb = fitting.peak_b(self.resident_b, learning=learning, held=held, parts=parts, within=within) / 1e6
        self.counted_flops = training.flops_per_example(loop.model, loop.task)
        self.took = now() - started
        return pace

    def after_step(self, loop: training.Loop) -> None:
        if not self.checkpoint_b:
            task = self.asked.task
            watched = training.watched_of(task)
            self.checkpoint_b = fitting.checkpoint_b(loop, best=self.epochs > 1 and watched > 0)
            self.features_b = fitting.features_b(loop, rows=round(len(task.train) * self.per_row), watched=watched)


def _parts(loop: training.Loop, indices: list[int], lengths: list[int]) -> list[list[int]]:
    """What the loop makes of a step of other examples than its own."""
    size = loop.schedule.micro_batch or len(indices)
    slices = [indices[i : i + size] for i in range(0, len(indices), size)]
    whole = loop.schedule.micro_batch or loop.accelerator.device.type != "cpu"
    return slices if whole and not loop.tokens else [part for piece in slices for part in batches.parts(piece, lengths, tokens=loop.tokens, packed=loop.schedule.pack)]


def describe(expected: Expected, *, price: Factor | None = None) -> list[str]:
    """Lines for people: a row for each stage, then the sums with their intervals."""
    rows = [("", "time", "CPU time", "peak memory", "on disk", "while it trains", "FLOPs")]
    for stage in expected.stages:
        rows.append((stage.name, show(stage.took.wall_s, "s"), show(stage.took.cpu_s, "s"), show(stage.peak_mb, "MB"),
                     *(show(mb or None, "MB") for mb in (stage.saved_mb, stage.work_mb)), show(stage.flops, "FLOP")))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
    joules, watts = expected.energy, expected.power
    lines += [
        "",
        f"training      {_range(expected, expected.training.wall_s, 's')}, CPU time {_range(expected, expected.training.cpu_s, 's')}",
        f"all           {_range(expected, expected.whole.wall_s, 's')}",
        f"peak memory   {_range(expected, expected.peak_mb, 'MB')}",
        f"disk          {_range(expected, expected.disk_mb, 'MB')} at most, {show(expected.saved_mb, 'MB')} of models stay",
        f"energy        {watts if joules.value is None else _range(expected, joules.value, 'J') + ', training'}",
    ]
    if price is not None and joules.value is not None:
        low, cost, high = (value * price.per_kwh / KWH_J for value in (joules.low, joules.value, joules.high))
        lines.append(f"money         {cost:.2g} {price.unit} [{low:.2g}, {high:.2g}], {price.source}")
    for spelling, shape, found in expected.formats:
        beside = (", ".join(f"{s.tokens}: {getattr(s, dtype):.2g}" for s in found) for dtype in ("fp32", "bf16"))
        lines.append("{}: for so many tokens a map of {} x {} takes so many times as long as in fp32 ({}) and as in bf16 ({}), both eager, timed here"
                     .format(spelling, *shape, *beside))  # fmt: skip
    return [*lines, "", f"estimates, from {expected.rehearsal_s:.0f} s of rehearsal; nothing was written"]


def _range(expected: Expected, value: float, unit: str) -> str:
    low, high = expected.around(value)
    return f"{show(value, unit)} [{show(low, unit)}, {show(high, unit)}]"
