"""Which number format and attention kernel train fastest here: measured on the model and a batch of its own data.

bf16 is over twice as fast as fp32 with AMX or AVX512-BF16 and slower without, and which attention kernel wins depends on
the length; so it is tried, as far as that can pay. The choice is made once per process, model shape and length, and recorded with the run.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from paretune import anatomy, seams
from paretune.meters import clock, system
from paretune.methods.modifiers.schedule import Schedule
from paretune.step import cross_entropy, mapped, narrow, packing, short_attention
from paretune.step.dropout import cheap as cheap_dropout

TOKENS = 1024  # at most so many are in the batch that is timed
SHARE = 0.05  # of a phase's passes may go into finding a faster kernel
FEWEST = 3  # passes that tell two kernels apart, a model's slow first one among them
FAR = 1.5  # a pace that was so many times slower than the fastest is not tried again
AHEAD = 1.1  # times as fast as the likeliest pace another has to be: noise must not decide which numbers a seed gives
ROWS, WIDEST = 256, 1024  # of the product that tells the number formats apart: at most so many tokens and features
BF16_AHEAD, FP32_AHEAD = 1.2, 2.0  # by so much a format's matrix products must be ahead to be taken without a pass in the other: what lies between products
# is faster in bf16 as well, so that a pass gains more by it than they do
SHORT = 512  # tokens up to which our attention is the likelier one to win, and is tried first; beyond it the model's own, unless attention drops weights
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "drop_prob")  # shares kept as plain numbers


@dataclasses.dataclass(frozen=True)
class Pace:
    """How the computation runs."""

    dtype: str = "fp32"  # or "bf16": computed in, under autocast; parameters that learn stay fp32
    attention: str = ""  # transformers' name of the attention implementation; empty leaves the model's own


_CHOSEN: dict[tuple, Pace] = {}


def choose(model: nn.Module, kind: Any, *, batch: dict[str, Tensor], schedule: Schedule, passes: float) -> Pace:
    """The fastest pace for this phase, by forward and backward passes on one batch.

    The number format is the one whose matrix products are ahead, as a product of the model's commonest shape says, or, where that does not tell, the
    faster in passes of the model. Of the attention kernels the likeliest is taken, unless the phase is so long that a twentieth of its passes can try the others,
    and what was near once more.

    An explicit `schedule(dtype=...)` is taken as it is, with the model's own attention. A schedule that packs has attention that packs (`packing`).

    Args:
        passes: how many passes like this batch the phase will take.
    """
    if schedule.dtype != "auto":
        return Pace(schedule.dtype, packing.name(_attentions(model)[0]) if schedule.pack else "")
    first = next((v for v in batch.values() if v.dim() > 1), next(iter(batch.values())))
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    attending = frozenset(repr(p.method) for _, _, seam in seams.seams_of(model) for _, _, p in seam.patches() if p.attends)
    key = (type(model), str(first.device), torch.get_num_threads(), len(first), _bucket(first), learning, attending, schedule.dropout, schedule.pack,
           int(passes).bit_length())  # fmt: skip
    if key not in _CHOSEN:
        ours = first[0].numel() <= SHORT or (schedule.dropout and _drops_weights(model))
        likely = sorted(_attentions(model), key=lambda kernel: (kernel == short_attention.NAME) != ours)
        kernels = [packing.name(kernel) if schedule.pack else kernel for kernel in likely]
        state = torch.get_rng_state()
        timed = functools.partial(step_seconds, model, kind, batch=batch, dropout=schedule.dropout)
        _CHOSEN[key] = fastest(timed, formats=_formats(model, first), kernels=kernels, passes=passes)
        torch.set_rng_state(state)
    return _CHOSEN[key]


def forget() -> None:
    """Forgets what was chosen and timed, as a new process would: the next phase times anew."""
    _CHOSEN.clear()
    system.fastest_dtype.cache_clear()


def fastest(timed: Callable[..., float], *, formats: Sequence[str], kernels: Sequence[str], passes: float) -> Pace:
    """The pace of least `timed(pace=...)`, as far as finding it pays; of formats and kernels the likeliest is first, and stays where none is `AHEAD`.

    A model's very first pass is slow whatever its pace, so the first trial is repeated at once.
    """
    affordable = SHARE * passes if len(kernels) > 1 else 0.0  # passes
    if len(formats) == 1 and affordable < FEWEST:
        return Pace(formats[0], kernels[0])
    seconds: dict[Pace, float] = {}
    spent = 0.0

    def tried(pace: Pace) -> None:
        nonlocal spent
        took = timed(pace=pace)
        spent += took
        seconds[pace] = min(took, seconds.get(pace, took))

    def pays() -> bool:
        """Is there time for one more pass?"""
        return spent + (least := min(seconds.values())) <= affordable * least

    def best(likeliest: Pace) -> Pace:
        found = min(seconds, key=seconds.__getitem__)
        return found if AHEAD * seconds[found] < seconds[likeliest] else likeliest

    for dtype in (formats[0], *formats):
        tried(Pace(dtype, kernels[0]))
    faster = best(Pace(formats[0], kernels[0])).dtype
    for pace in (Pace(faster, kernel) for kernel in kernels[1:]):
        if pays():
            tried(pace)
    for pace in [p for p, took in seconds.items() if took < FAR * min(seconds.values())]:
        if pays():
            tried(pace)
    return best(Pace(faster, kernels[0]))


def _bucket(first: Tensor) -> int:
    """The size of an example, up to the next power of two: within a factor of two the choice is the same."""
    return max(1, first.numel() // len(first)).bit_length()


def _formats(model: nn.Module, first: Tensor) -> list[str]:
    """The number formats worth a pass of the model: on a CPU the one whose products are ahead, or both; bf16 first."""
    if first.device.type != "cpu":
        return ["bf16", "fp32"] if first.device.type == "cuda" and torch.cuda.is_bf16_supported() else ["fp32"]
    weights = (m._parameters.get("weight") for m in model.modules() if anatomy.is_linear(m))
    shapes = collections.Counter(tuple(min(size, WIDEST) for size in w.shape) for w in weights if w is not None)
    if not shapes:
        return ["bf16", "fp32"]
    shape = max(shapes, key=lambda shape: shapes[shape] * math.prod(shape))
    ratio = system.fastest_dtype(shapes=(shape,), rows=min(ROWS, first.numel()), limit_s=0.0).ratio
    return ["bf16"] if ratio > BF16_AHEAD else ["fp32"] if ratio * FP32_AHEAD < 1 else ["bf16", "fp32"]


def _attentions(model: Any) -> list[str]:
    own = getattr(model.config, "_attn_implementation", None) or ""
    ours = [short_attention.NAME] if next(model.parameters()).device.type == "cpu" else []
    return [own, "eager", *ours] if own == "sdpa" else [own]


def _drops_weights(model: nn.Module) -> bool:
    """Does attention drop weights? SDPA has no kernel on a CPU that does, and writes all of them out, in more passes than ours."""
    return any(True for module in model.modules() if anatomy.calls_attention(type(module)) for _ in dropouts(module.modules()))


def step_seconds(model: nn.Module, kind: Any, *, batch: dict[str, Tensor], pace: Pace, dropout: bool) -> float:
    """Seconds (`clock.ticks`) of one forward and backward pass at a pace; no gradient is kept and no parameter moves."""
    was_training, now = model.training, clock.ticks(next(model.parameters()).device.type)
    with paced(model, pace, dropout=dropout):
        with autocast(pace):
            output = cross_entropy.projection(model, kind, batch=batch)
        model.train()
        started = now()
        with autocast(pace), cross_entropy.skipped(output):
            outputs = model(**packing.laid_out(kind.inputs(batch), pace.attention))
        loss, _ = cross_entropy.of(kind, outputs, batch=batch, output=output, within=autocast(pace))
        gradients = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, gradients, allow_unused=True)
        float(next(g for g in grads if g is not None).sum())  # waits for the device
        elapsed = now() - started
    model.train(was_training)
    return elapsed


@contextlib.contextmanager
def autocast(pace: Pace | None) -> Iterator[None]:
    """The number format of the computation inside the block, on the processor and on a card: a machine with a card may train on its processor."""
    with contextlib.ExitStack() as both:
        if pace is not None and pace.dtype != "fp32":
            for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                both.enter_context(torch.autocast(device, torch.bfloat16))
        yield


@contextlib.contextmanager
def paced(model: nn.Module, pace: Pace, *, dropout: bool = True) -> Iterator[None]:
    """The model at this pace inside the block; afterwards every bit of it is as before, but for what learned."""
    undo = contextlib.ExitStack()
    with undo:
        own = getattr(model.config, "_attn_implementation", None)
        if pace.attention and pace.attention != own:
            model.set_attn_implementation(pace.attention)
            undo.callback(model.set_attn_implementation, own)
        if pace.attention == "eager":  # what calls fused attention by itself, as a window does, is written out, too
            undo.enter_context(sdpa_kernel(SDPBackend.MATH))
        if pace.attention.startswith(packing.PREFIX):
            undo.enter_context(packing.rows(model))
        if pace.dtype == "bf16":
            undo.enter_context(_working_copies(model))
            undo.enter_context(narrow.stream(model))
        undo.enter_context(cheap_dropout(model) if dropout else _without_dropout(model))
        yield


@contextlib.contextmanager
def _working_copies(model: nn.Module) -> Iterator[None]:
    """Frozen linear weights in bf16, cast once instead of at every step; the fp32 truth comes back."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    kept: list[tuple[nn.Parameter, Tensor]] = []
    files = mapped.Mapped()
    for module in model.modules():
        weight = module._parameters.get("weight") if anatomy.is_linear(module) else None
        if weight is not None and not weight.requires_grad and owners[id(weight)] == 1 and weight.dtype == torch.float32:
            kept.append((weight, weight.data))
            weight.data = weight.data.to(torch.bfloat16)
            files.let_go(kept[-1][1])
    try:
        yield
    finally:
        for weight, data in kept:
            weight.data = data


def dropouts(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, str, float]]:
    """(module, the attribute that holds it, its share) of each dropout in these modules that drops anything."""
    for module in modules:
        for name in ("p",) if isinstance(module, nn.Dropout) else DROPOUTS:
            value = getattr(module, name, None)
            if isinstance(value, float) and value:
                yield module, name, value


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    changed = list(dropouts(model.modules()))
    for module, name, _ in changed:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
