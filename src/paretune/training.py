"""The one training loop, on accelerate, with named events that modifiers hook; and evaluation.

Order of the events in one phase:
    pace -> for each epoch: indices -> plan -> for each step: inputs -> loss -> before_step -> after_step -> epoch_ends -> score
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from paretune import batches, checkpoints, features, seams, shards, surgery, together, virtual_tokens
from paretune.errors import Diverged
from paretune.events import Events
from paretune.meters import flops, memory
from paretune.meters.spending import Spending
from paretune.methods.modifiers.schedule import Schedule
from paretune.roles import Modifier
from paretune.step import adamw, cross_entropy, packing, probe
from paretune.tasks import Task, score

WATCHED = (256, 2048)  # validation examples scored after each epoch, at least and at most; a run's own validation score is over all of them
PATIENT = 50  # steps that a training goes on without a better score, however short its epochs are


@dataclasses.dataclass(frozen=True)
class Settings:
    """How and where to run, apart from what the recipe says."""

    seed: int = 0
    device: str = "cpu"
    folder: Path | None = None  # where checkpoints go; None keeps none
    checkpoint_every_s: float = 30.0
    report: Callable[[dict[str, Any]], None] | None = None  # gets epoch, step, steps, loss, examples_per_s, tokens_per_s (without padding)
    name: str = "this recipe"  # how an error calls the training
    after: Callable[[int], nn.Module] | None = None  # opens `@k`; None outside a recipe
    spending: Spending | None = None  # what the phase costs; kept in the checkpoints
    shard: bool = False  # of several processes, does each keep a part of the weights?


@dataclasses.dataclass
class Fitted:
    """What a training phase did."""

    epochs: list[dict[str, float]]  # per epoch: loss, validation_score, examples
    steps: int
    examples: int  # visited, over all epochs
    best_epoch: int
    dtype: str
    attention: str
    flops_beside: float | None = 0.0  # FLOPs of modifiers, such as a teacher's; None where they cannot be counted


def fit(model: nn.Module, task: Task, *, schedule: Schedule, modifiers: Sequence[Modifier] = (), settings: Settings = Settings()) -> Fitted:  # noqa: B008
    """Trains what learns in the model (`requires_grad`) on the task's training split; keeps the best epoch by validation.

    Args:
        model: adapted; its trainable parameters change in place.
        task: gives examples, loss and score.
        schedule: with its learning rate set.
        modifiers: of this phase, in the order written.
        settings: seed, device, checkpoints, progress.

    Raises:
        Diverged: when the loss is not a number, with the step and the recipe.
        StoreError: for a damaged checkpoint.
    """
    loop = Loop(model, task, schedule, settings)
    loop.events = [m.events(loop) for m in modifiers if not isinstance(m, Schedule)]
    loop.events += [events for m in surgery.newest(model) if (events := m.events(loop))]
    return loop.run()


class Loop:
    """One training phase; modifiers see it and may read everything on it."""

    def __init__(self, model: nn.Module, task: Task, schedule: Schedule, settings: Settings) -> None:
        together.join(settings.device)
        self.keeps = together.agreed(settings.folder is not None)  # are there checkpoints?
        self.task = task
        self.settings = settings if together.first() else dataclasses.replace(settings, folder=None, report=None)
        self.accelerator = accelerate.Accelerator(cpu=settings.device == "cpu", mixed_precision="no")
        self.model = model if settings.shard else model.to(self.accelerator.device)
        self.events: list[Events] = []
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.encodings = encode(task, task.train, model=model)
        self.schedule = schedule = schedule.sized(task)
        self.lengths = [task.kind.length(e) for e in self.encodings]
        self.longest = max(self.lengths)
        self.split = features.Split(model, self.encodings)
        self.optimizer = adamw.optimizer(self.parameters, schedule, in_head=surgery.in_head(model))
        self.tokens: int | None = None  # at most so many at once, where memory is limited
        self.output: nn.Module | None = None  # the map onto the vocabulary, where the loss goes around it
        self.epoch = self.step = self.examples = 0
        self.indices: list[int] = []  # the training examples of the batch that is at work
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] | None = None
        self.best_epoch = -1
        self.improved = -1  # the newest epoch that was better than all before, not only as good

    def run(self) -> Fitted:
        """All epochs, from the start or from the newest checkpoint."""
        was_training, whole = self.model.training, shards.enter(self)
        packing.check(self)
        batch = self._probe_batch()
        passes = self.schedule.epochs * len(self.encodings) / len(next(iter(batch.values())))
        self.pace = shards.pace(self) or together.told(probe.choose(self.model, self.task.kind, batch=batch, schedule=self.schedule, passes=passes))
        for events in self.events:
            self.pace = events.pace(self, self.pace)
        visits = [self._visited(e) for e in range(self._epochs)]
        self.per_epoch = [batches.steps(self.lengths, v, schedule=self.schedule, share=min(1.0, self.schedule.epochs - e)) for e, v in enumerate(visits)]
        self.total = sum(self.per_epoch)
        together.part_ways()
        cursor = checkpoints.restore(self)
        with memory.kept_between_calls(), probe.paced(self.model, shards.held(self), dropout=self.schedule.dropout):
            self.features = features.Features(self, encode(self.task, self.task.validation[: watched_of(self.task)], model=self.model))
            self.split = self.features.train
            if not self.settings.shard and all(type(events).loss is Events.loss for events in self.events):
                with probe.autocast(self.pace):
                    self.output = cross_entropy.projection(self.model, self.task.kind, batch=batch)
            self._forward = self.model
            while self.epoch < self._epochs and not self._stalled():
                self._run_epoch(skip=cursor)
                cursor = 0
        self.model.train(was_training)
        if self.best is not None:
            _load(self.parameters, self.best)
        shards.leave(self, whole)
        checkpoints.clear(self.settings.folder)
        beside = [self.features.flops(), *(events.flops() for events in self.events)]
        features.clear(self.settings.folder)
        uncounted = None in beside or together.count() > 1 and any(beside)  # each process knows of its own alone
        return Fitted(
            self.history, self.step, self.examples, self.best_epoch, self.pace.dtype, self.pace.attention, None if uncounted else sum(filter(None, beside))
        )

    @property
    def _epochs(self) -> int:
        return math.ceil(self.schedule.epochs)

    def _stalled(self) -> bool:
        waited = self.per_epoch[self.improved + 1 : self.epoch]  # steps, epoch by epoch
        return self.best_epoch >= 0 and len(waited) >= self.schedule.patience and sum(waited) >= PATIENT

    def _probe_batch(self) -> dict[str, Tensor]:
        middle = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        start = max(0, len(middle) // 2 - self.schedule.batch // 2)
        part = self._micro_batches(middle[start : start + self.schedule.batch])[0]
        return self._collate(part[: max(1, probe.TOKENS // self.lengths[part[-1]])])

    def _plan(self) -> list[list[int]]:
        visited, steps = self._visited(self.epoch), self.per_epoch[self.epoch]
        for events in self.events:
            plan = events.plan(self, range(len(self.encodings)) if visited is None else visited, steps=steps)
            if plan is not None:
                return plan
        random = batches.generator(self.settings.seed, self.epoch)
        return batches.epoch_batches(self.lengths, visited, schedule=self.schedule, random=random)[:steps]

    def _visited(self, epoch: int) -> Sequence[int] | None:
        visited: Sequence[int] | None = None
        for events in self.events:
            chosen = events.indices(epoch, len(visited or self.encodings), generator=batches.generator(self.settings.seed, epoch, purpose=1))
            if chosen is not None:
                visited = list(chosen) if visited is None else [visited[i] for i in chosen]
        return visited

    def _run_epoch(self, skip: int) -> None:
        plan = self._plan()
        self.model.train()
        if not skip:
            self.epoch_loss, self.epoch_targets, self.epoch_examples = 0.0, 0, 0
        started, saved, examples, tokens = time.perf_counter(), time.perf_counter(), 0, 0
        for at, indices in enumerate(plan[skip:], start=skip):
            self._step(indices)
            examples, tokens = examples + len(indices), tokens + sum(self.lengths[i] for i in indices)
            self._report(time.perf_counter() - started, at + 1 - skip, {"examples_per_s": examples, "tokens_per_s": tokens})
            if self.keeps and at + 1 < len(plan) and together.agreed(time.perf_counter() - saved >= self.settings.checkpoint_every_s):
                checkpoints.save(self, cursor=at + 1)
                saved = time.perf_counter()
        self._end_epoch()

    def _step(self, indices: list[int]) -> None:
        losses, targets = 0.0, 0
        micro = self._micro_batches(together.share(indices))
        whole, idle = len(micro) == 1 and together.count() == 1, shards.idle_passes(self, len(micro))
        for part in micro:
            self.indices = part
            loss, count = self.loss(self._collate(part))
            with adamw.moving(self, whole=whole):
                self.accelerator.backward(loss / count if whole else loss)
            losses, targets = losses + float(loss.detach()), targets + count
        shards.idle(self, indices[:1], passes=idle)
        losses, targets = together.total(losses, targets)
        if not math.isfinite(losses):
            raise Diverged(
                f"{self.settings.name}: the loss is {losses} at step {self.step + 1} of {self.total}, learning rate {self._rate():.2g}; "
                "try a lower one, as in schedule(lr=...)"
            )
        if not whole:
            together.average(self.parameters.values(), targets, added=self.settings.shard)
        self._update()
        self.epoch_loss += losses
        self.epoch_targets += targets
        self.epoch_examples += len(indices)
        self.examples += len(indices)

    def _micro_batches(self, indices: list[int]) -> list[list[int]]:
        size = self.schedule.micro_batch or max(1, len(indices))  # one of several processes may have none
        slices = [indices[i : i + size] for i in range(0, len(indices), size)]
        whole = self.schedule.micro_batch or self.accelerator.device.type != "cpu" or any(events.whole_batches for events in self.events)
        cut = functools.partial(batches.parts, lengths=self.lengths, tokens=self.tokens, packed=packing.applies(self))
        return slices if whole and not self.tokens else [part for piece in slices for part in cut(piece)]

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """(summed loss with every modifier's share, number of targets) of one batch on the device."""
        for events in self.events:
            batch = events.inputs(self, batch)
        with probe.autocast(self.pace), self.split.passing(self.indices, batch), cross_entropy.skipped(self.output):
            outputs = self._forward(**packing.inputs(self, batch))
        loss, count = cross_entropy.of(self.task.kind, outputs, batch=batch, output=self.output, within=probe.autocast(self.pace))
        for events in self.events:
            loss = events.loss(self, batch, outputs=outputs, loss=loss)
        return loss, count

    def learn(self, name: str, parameter: nn.Parameter) -> None:
        """Lets a modifier's own parameter learn along: trained and in checkpoints like the model's, and not a part of the model."""
        self.parameters[name] = parameter
        self.optimizer.add_param_group({"params": [parameter], "weight_decay": self.schedule.weight_decay * (parameter.dim() > 1), "share": 1.0})

    def _update(self) -> None:
        adamw.at_rate(self)
        if self.schedule.clip:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.schedule.clip)
        for events in self.events:
            events.before_step(self)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for events in self.events:
            events.after_step(self)

    def _rate(self) -> float:
        """lr(t): linear warm-up over a share of all steps, then the chosen decay to zero."""
        lr, warm = float(self.schedule.lr or 0.0), math.ceil(self.schedule.warmup * self.total)
        if self.step < warm:
            return lr * (self.step + 1) / warm
        done = (self.step - warm) / max(1, self.total - warm)
        return lr * {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "none": 1.0}[self.schedule.decay]

    def _end_epoch(self) -> None:
        for events in self.events:
            events.epoch_ends(self)
        record = {"loss": self.epoch_loss / max(1, self.epoch_targets), "examples": float(self.epoch_examples)}
        if len(self.task.validation):
            record["validation_score"] = together.told(self._validate())
            best = None if self.best_epoch < 0 else self.history[self.best_epoch]["validation_score"]
            if best is None or not self._worse(record["validation_score"], best):
                self.improved = self.improved if record["validation_score"] == best else self.epoch
                self.best_epoch = self.epoch  # the later of two as good: its rate had decayed further
                self.best = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.history.append(record)
        self.epoch += 1
        if self.keeps and self.epoch < self._epochs:
            checkpoints.save(self, cursor=0)

    def _worse(self, score: float, than: float) -> bool:
        return score > than if self.task.better == "lower" else score < than

    def _validate(self) -> float:
        own = next((found for events in self.events if (found := events.score(self)) is not None), None)
        if own is not None:
            return own
        answers = functools.partial(predict, self.model, self.task, pace=self.pace)
        found = together.spread(self.features.watched, answers, whole=self.settings.shard)
        return score(self.task, found, rows=self.task.validation[: watched_of(self.task)])

    def _report(self, seconds: float, done: int, counts: dict[str, int]) -> None:
        if self.settings.report:
            rates = {name: n / max(seconds, 1e-9) for name, n in counts.items() if name != "tokens_per_s" or "input_ids" in self.encodings[0]}
            left = (self.total - self.step) * seconds / done
            self.settings.report({"epoch": self.epoch + 1, "epochs": self._epochs, "step": self.step, "steps": self.total,
                                  "loss": self.epoch_loss / max(1, self.epoch_targets), "left_s": left, **rates})  # fmt: skip

    def _collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.collate([self.encodings[i] for i in indices])

    def collate(self, encodings: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of encodings on the device."""
        width = batches.width([self.task.kind.length(e) for e in encodings], most=self.longest)
        return _to_device(self.task.kind.collate(encodings, _processor(self.model), width=width), self.accelerator.device)


def watched_of(task: Task) -> int:
    """How many validation examples choose the epoch: a quarter of the training examples (a twelfth of their cost), within `WATCHED`.

    With 256 of them one standard error is 2.3 points at 83 %, more than two epochs differ.
    """
    least, most = WATCHED
    return min(len(task.validation), most, max(least, len(task.train) // 4))


def predict(model: nn.Module, task: Task, *, rows: Any, pace: probe.Pace | None = None, batch: int = 64) -> list[Any]:
    """One prediction per row or block (`Kind.predict`), in their order; the model computes in evaluation mode."""

    def answers(inputs: dict[str, Tensor], outputs: Any) -> list[Any]:
        return task.kind.predict(model, inputs, outputs=outputs, processor=_processor(model))

    return read(model, task, rows=rows, answers=answers, pace=pace, batch=batch)


def read(
    model: nn.Module, task: Task, *, rows: Any, answers: Callable[[dict[str, Tensor], Any], list[Any]], pace: probe.Pace | None = None, batch: int = 64
) -> list[Any]:
    """What `answers` finds in each batch and the model's outputs for it, a value per row (or example of a `features.Split`) or block, in their order."""
    split = rows if isinstance(rows, features.Split) else features.Split(model, encode(task, rows, model=model))
    encodings = split.encodings
    lengths = [task.kind.length(e) for e in encodings]
    most = max(lengths, default=0)
    found: list[Any] = [None] * len(encodings)  # language modeling has blocks, not rows
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    together = batches.by_length(lengths, batch)
    keeping = memory.kept_between_calls() if len(together) > 1 else contextlib.nullcontext()
    with keeping, torch.inference_mode(), probe.autocast(pace):
        for indices in [part for whole in together for part in batches.parts(whole, lengths)] if device.type == "cpu" else together:
            width = batches.width([lengths[i] for i in indices], most=most)
            inputs = _to_device(task.kind.collate([encodings[i] for i in indices], _processor(model), width=width), device)
            with split.passing(indices, inputs):
                outputs = model(**task.kind.inputs(inputs))
            for i, answer in zip(indices, answers(inputs, outputs), strict=True):
                found[i] = answer
    model.train(was_training)
    return found


def encode(task: Task, rows: Any, *, model: nn.Module) -> list[dict[str, Any]]:
    """The encodings of rows for this model, as its readout has them."""
    reader = seams.readout(model)
    if reader is not None:
        return reader.encode(task, rows, processor=_processor(model), max_length=max_length(model), config=model.config)
    return task.encode(rows, _processor(model), max_length=max_length(model), config=model.config)


def flops_per_example(model: nn.Module, task: Task) -> float | None:
    """FLOPs of one training example, forward and backward, at the median length; what learns is what `requires_grad`."""
    batch, size = _middle(model, task, task.train[:256])
    reading = flops.step(lambda: task.kind.loss(model(**task.kind.inputs(batch)), batch)[0], model)
    return None if reading.value is None else reading.value / size


def forward_flops(model: nn.Module, task: Task) -> float | None:
    """FLOPs of one training example, forward alone, at the median length."""
    batch, size = _middle(model, task, task.train[:256])
    reading = flops.forward(lambda: model(**task.kind.inputs(batch)), model)
    return None if reading.value is None else reading.value / size


def _middle(model: nn.Module, task: Task, rows: Any) -> tuple[dict[str, Tensor], int]:
    """A batch of up to eight rows around the median length, and how many they are."""
    rows = sorted(encode(task, rows, model=model), key=task.kind.length)
    middle = rows[max(0, len(rows) // 2 - 4) : len(rows) // 2 + 4]
    return _to_device(task.kind.collate(middle, _processor(model)), next(model.parameters()).device), len(middle)


def max_length(model: nn.Module) -> int | None:
    """How many tokens the model reads at most: its processor's limit, else its positions."""
    limits = [getattr(_processor(model), "model_max_length", None), getattr(model.config, "max_position_embeddings", None), virtual_tokens.room(model)]
    return min((n for n in limits if isinstance(n, int) and 0 < n < 1_000_000), default=None)


def _processor(model: nn.Module) -> Any:
    return surgery.state(model).processor


def _to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in batch.items()}


def _load(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
