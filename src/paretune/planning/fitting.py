"""Memory of a training step, counted on single examples, and how a step is cut to fit a limit of it.

    peak(n, T) = resident + 12 P + max(4 P, s(n, T))         s(n, T) = f + n (a T + b T²)

for n examples of T tokens at once and P numbers that learn: Adam's two states and the best epoch's copy (12 bytes each), gradients (4 bytes), and s, what
the forward and backward pass holds, one gradient at a time. Where a step is cut into parts, the gradients of one stay while the next is computed:
4 P + s(n, T); where it moves weights within the pass (`step.adamw`), they are never all there: s(n, T).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paretune import batches, surgery, training
from paretune.errors import BudgetError
from paretune.events import Events
from paretune.meters import memory
from paretune.step import adamw, packing, probe
from paretune.step.probe import Pace
from paretune.units import show

GRADIENT_B, KEPT_B = 4, 12  # bytes for each number that learns: its gradient; Adam's two moments and the best epoch's value
SLACK = 1.05  # what the allocator holds beyond what it is asked for
KERNEL_B, KERNELS = 0.66e6, 1024  # in bf16 on a CPU oneDNN keeps a kernel for each shape of product, at most so many; the size is fitted to docs/plan.md
CODE_B = 50e6  # of libraries, read into memory when steps are the first to run it (40 MB in 19 steps of MiniLM in fp32), and buffers that stay


@dataclasses.dataclass(frozen=True)
class Appetite:
    """Bytes that one forward and backward pass holds at the highest: `fixed + n (per_token T + per_pair T²)`, for n examples of T tokens."""

    fixed: float
    per_token: float
    per_pair: float

    def of(self, n: int, length: int) -> float:
        """Of n examples, each padded to `length`."""
        return self.fixed + n * (self.per_token * length + self.per_pair * length**2)

    def of_part(self, lengths: Sequence[int], *, packed: bool) -> float:
        """Of examples of these lengths that pass through together: padded to the longest, or packed, and then only blocks of attention are padded."""
        if not packed:
            return self.of(len(lengths), max(lengths))
        blocks = [(len(texts), longest) for texts, longest in packing.groups(lengths)]
        row = math.ceil(sum(n * longest for n, longest in blocks) / packing.ROUND) * packing.ROUND
        return self.fixed + self.per_token * row + self.per_pair * sum(n * longest**2 for n, longest in blocks)

    def __or__(self, other: Appetite) -> Appetite:
        """No less than either."""
        return Appetite(max(self.fixed, other.fixed), max(self.per_token, other.per_token), max(self.per_pair, other.per_pair))


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a step fits: at most so many tokens pass through the model at once (a longer example alone), and whether activations are computed again."""

    tokens: int
    checkpointing: bool
    peak_mb: float  # expected
    limit_mb: float
    within: bool = False  # are steps whole, so that they move weights within their pass?

    def describe(self) -> str:
        """One line for people."""
        how = "activations are computed again in the backward pass" if self.checkpointing else "no gradient checkpointing"
        how += ", each gradient is let go when its weight has moved" if self.within else ""
        return f"to fit {self.limit_mb:,.0f} MB: at most {self.tokens:,} tokens at once, {how}; about {self.peak_mb:,.0f} MB are expected (an estimate)"


class Held(TorchDispatchMode):
    """Bytes of the tensors made in the block that are alive, now and at the highest; a view of what was there before is none."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, call: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self._meet(tree_leaves((args, kwargs)), old=True)
        made = call(*args, **(kwargs or {}))
        self._meet(tree_leaves(made), old=False)
        return made

    def _meet(self, values: Iterable[Any], *, old: bool) -> None:
        for tensor in values:
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, 0 if old else storage.nbytes()
            if key not in self._known:
                self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._forget(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size


def held_b(model: nn.Module, kind: Any, *, batch: dict[str, Tensor], pace: Pace, dropout: bool = True) -> int:
    """Bytes of tensors at the highest in a forward and backward pass over this batch, working copies included; each gradient is let go at once."""
    was_training, learning = model.training, [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in learning]
    try:
        with torch.random.fork_rng(), Held() as held, probe.paced(model, pace, dropout=dropout):
            model.train()
            with probe.autocast(pace):
                outputs = model(**kind.inputs(batch))
            kind.loss(outputs, batch)[0].backward()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return held.peak


def appetite(model: nn.Module, kind: Any, *, encodings: Sequence[Any], collate: Callable[..., dict[str, Tensor]], pace: Pace, dropout: bool = True) -> Appetite:
    """What a step of this model holds, counted on one and on two examples of middle length and on a long one.

    Args:
        encodings: of training rows; the middle one and the longest are taken.
        collate: makes a batch of a list of them.
    """
    ordered = sorted(encodings, key=kind.length)
    middle, longest = ordered[len(ordered) // 2], ordered[-1]
    one, two, far = (held_b(model, kind, batch=collate(es), pace=pace, dropout=dropout) for es in ([middle], [middle] * 2, [longest]))
    fixed, each = max(0, 2 * one - two), two - one
    near_t, far_t = kind.length(middle), kind.length(longest)
    if far_t == near_t:
        return Appetite(fixed, each / near_t, 0.0)
    per_pair = max(0.0, ((far - fixed) / far_t - each / near_t) / (far_t - near_t))
    return Appetite(fixed, (far - fixed) / far_t - per_pair * far_t, per_pair)


def peak_b(resident_b: float, *, learning: int, held: float, parts: bool, within: bool = False) -> float:
    """Bytes at the highest in a training phase.

    Args:
        resident_b: before it, with model and examples there.
        learning: numbers that learn.
        held: bytes of a forward and backward pass.
        parts: is a step cut into several?
        within: does a step that is not move weights within its pass?
    """
    gradients = GRADIENT_B * learning * (parts or not within)
    return resident_b + KEPT_B * learning + SLACK * (held + gradients if parts else max(held, gradients))


def kernels_b(loop: training.Loop, counts: int, *, dtype: str) -> float:
    """Bytes of the kernels that products of so many different counts of tokens leave in memory: forward, backward for inputs, and for what learns."""
    if dtype != "bf16" or loop.accelerator.device.type != "cpu":
        return 0.0
    tables = {id(m.weight) for m in loop.model.modules() if isinstance(m, nn.Embedding)}
    maps = {tuple(p.shape) for p in loop.model.parameters() if p.dim() == 2 and id(p) not in tables}
    taught = {tuple(p.shape) for p in loop.parameters.values() if p.dim() == 2 and id(p) not in tables}
    in_head = surgery.in_head(loop.model)
    through = maps if any(not in_head(name) for name in loop.parameters) else ()
    return KERNEL_B * min(KERNELS, counts * (len(maps) + len(through) + len(taught)))


def checkpoint_b(loop: training.Loop, *, best: bool) -> float:
    """Bytes of a checkpoint of this training: what learns, the optimizer's states, what events keep, and the `best` epoch's values; with AdamW 16 a weight."""
    weights = sum(p.numel() * p.element_size() for p in loop.parameters.values())
    states = [value for state in loop.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    kept = [tensor for events in loop.events for tensor in events.state().values()]
    return weights * (1 + best) + float(sum(t.numel() * t.element_size() for t in (*states, *kept)))


def features_b(loop: training.Loop, *, rows: int, watched: int) -> float:
    """Bytes of the frozen features that a training on so many rows keeps, of those it watches, too; by its first rows'."""
    shelf = loop.split.shelf
    return 0.0 if shelf is None else (shelf.values.nbytes + shelf.rows.nbytes) / len(loop.encodings) * (rows + watched)


def shapes(lengths: Sequence[int]) -> int:
    """How many shapes batches of examples of these lengths have, about: whole parts of each width, and what is left of a step."""
    return 2 * len({batches.width([length], most=max(lengths)) for length in set(lengths)})


def worst(found: Appetite, lengths: Sequence[int], *, batch: int, tokens: int) -> float:
    """Bytes that the hungriest part of any step holds, where at most `tokens` pass through at once, or one example."""
    return max(found.of(max(1, min(batch, tokens // max(1, length))), length) for length in set(lengths))


def resident_b(device: torch.device) -> float:
    """Bytes that this process has in memory, with what first steps will leave there; on a card what torch has allocated there."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss + CODE_B


def encodings_b(encodings: Sequence[dict[str, Any]]) -> float:
    """Bytes of encodings: lists, and the numbers in them that Python does not share."""
    lists = [value for encoding in encodings for value in encoding.values()]
    return float(sum(sys.getsizeof(v) + 32 * sum(type(x) is int and x > 256 for x in v) if isinstance(v, list) else sys.getsizeof(v) for v in lists))


class Fitting(Events):
    """Stands among a phase's modifiers and cuts its steps to a limit; `cut` is what it chose."""

    def __init__(self, limit_mb: float) -> None:
        self.limit_mb, self.cut = limit_mb, None

    def events(self, loop: training.Loop) -> Events:
        """Chooses, before anything is computed.

        Raises:
            BudgetError: where nothing fits, with the least memory possible.
        """
        self._cut(loop)
        return self

    def _cut(self, loop: training.Loop) -> None:
        self.cut = choose(loop, self.limit_mb)
        loop.tokens = self.cut.tokens
        if loop.settings.report:
            loop.settings.report({"said": self.cut.describe()})
        if self.cut.checkpointing:
            loop.model.activation_checkpointing_enable({"use_reentrant": False})

    def pace(self, loop: training.Loop, pace: Pace) -> Pace:
        """No other; by now it is known whether batches can be cut, and whether something reads all gradients.

        Raises:
            BudgetError: where a modifier needs whole batches.
        """
        if any(events.whole_batches for events in loop.events):
            raise BudgetError(f"{loop.settings.name}: it takes whole batches, which no limit of memory can cut; leave the limit out, or give a smaller --batch")
        if self.cut is not None and self.cut.within and adamw.needs_all(loop):
            if self.cut.checkpointing:
                loop.model.activation_checkpointing_disable()
            self._cut(loop)
        return pace


def choose(loop: training.Loop, limit_mb: float) -> Cut:
    """The largest part of a step that fits, or the whole step where that lets gradients go; with gradient checkpointing only where none fits without.

    Raises:
        BudgetError: where not even single examples fit, with the least memory possible.
    """
    learning = sum(p.numel() for p in loop.parameters.values())
    counts = KERNELS if loop.schedule.pack else shapes(loop.lengths)
    kernels = 0.0 if loop.schedule.dtype == "fp32" else kernels_b(loop, counts, dtype="bf16")
    least = float("inf")
    batch, whole = _largest(loop)
    most = min(whole, batches.CACHED if loop.accelerator.device.type == "cpu" else sys.maxsize)

    def within(tokens: int) -> bool:
        return tokens >= whole and not loop.schedule.micro_batch and not adamw.needs_all(loop)

    for checkpointing in (False, True):
        if checkpointing and not getattr(loop.model, "supports_gradient_checkpointing", False):
            break
        found = _hungriest(loop, checkpointing=checkpointing)
        before = resident_b(loop.accelerator.device)  # after the first passes, whose buffers stay

        def peak_mb(tokens: int, found: Appetite = found, start: float = before + kernels) -> float:
            passing = packing.places(tokens) if loop.schedule.pack else tokens
            held = worst(found, loop.lengths, batch=batch, tokens=passing)
            return peak_b(start, learning=learning, held=held, parts=not within(tokens), within=True) / 1e6

        shortest = min(loop.lengths)
        steps = [tokens for tokens in (most >> k for k in range(most.bit_length())) if tokens >= shortest] or [most]
        steps += [whole] * (most < whole and within(whole))
        fits = next((tokens for tokens in steps if peak_mb(tokens) <= limit_mb), None)
        if fits is not None:
            return Cut(fits, checkpointing, peak_mb(fits), limit_mb, within(fits))
        least = min(least, *map(peak_mb, steps))
    hint = ", or set schedule(clip=0), with which each gradient of a whole step goes at once" * bool(loop.schedule.clip)
    hint += ", or take --dtype fp32, which keeps fewer kernels" * (loop.schedule.dtype != "fp32")
    raise BudgetError(
        f"{loop.settings.name}: {show(limit_mb * 1e6, 'B')} of memory are too little; {show(least * 1e6, 'B')} are the least, with one example at a time and "
        f"gradient checkpointing, {show(before, 'B')} of them before training begins and {show(kernels, 'B')} for kernels; "
        f"give more, shorten the texts with max_length, train fewer weights{hint}"
    )


def _largest(loop: training.Loop) -> tuple[int, int]:
    """(examples of the largest step, tokens that pass through in it at most)."""
    schedule, longest = loop.schedule, max(loop.lengths)
    if schedule.tokens is None:
        return schedule.batch, longest * schedule.batch
    examples = schedule.tokens // min(loop.lengths) + 1
    return examples, schedule.tokens + longest if schedule.pack else examples * longest


def _hungriest(loop: training.Loop, *, checkpointing: bool) -> Appetite:
    """Over the number formats that the probe will try, with plain attention, which holds the most."""
    attention = "eager" if getattr(loop.model.config, "_attn_implementation", None) == "sdpa" else ""
    formats = [loop.schedule.dtype] if loop.schedule.dtype != "auto" else ["fp32", "bf16"]
    with checkpointed(loop.model) if checkpointing else contextlib.nullcontext():
        found = [
            appetite(loop.model, loop.task.kind, encodings=loop.encodings, collate=loop.collate, pace=Pace(dtype, attention), dropout=loop.schedule.dropout)
            for dtype in formats
        ]
    return found[0] if len(found) == 1 else found[0] | found[1]


@contextlib.contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """The model with gradient checkpointing inside the block."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


@contextlib.contextmanager
def within(model: Any, limit_mb: float | None) -> Iterator[list[Fitting]]:
    """What joins a phase's modifiers inside the block: nothing without a limit; afterwards the model checkpoints no more."""
    if limit_mb is None:
        yield []
        return
    try:
        with memory.given_back_at_once():
            yield [Fitting(limit_mb)]
    finally:
        if getattr(model, "supports_gradient_checkpointing", False):
            model.activation_checkpointing_disable()
