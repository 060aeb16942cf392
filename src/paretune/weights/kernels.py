"""Which kernel multiplies with packed weights: timed once per process, format, shape and thread count, and chosen by the number of tokens.

A kernel on the codes themselves wins where reading the weights is what takes time, so for few tokens; a product in bf16 wins where
the processor has units for it, so for many. How many that is depends on the processor and on the shape, and nothing is assumed: each
way a format has (`Packing.ways`) is timed at a few counts of tokens, in turn, with the caches swept in between, as another layer's weights
would sweep them. All ways give the same product within the format's tolerance, and one process takes one way for one count.
"""

from __future__ import annotations

import bisect
import contextlib
import contextvars
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch

from paretune.meters import memory

if TYPE_CHECKING:
    from paretune.weights.packed import PackedLinear, Packing

Way = Callable[[Tensor], Tensor]  # (..., I) to (..., O)

TOKENS = (1, 8, 32, 128, 512)  # what is timed; another count takes the choice of the nearest of these, as a ratio
BORDERS = [math.sqrt(a * b) for a, b in zip(TOKENS, TOKENS[1:], strict=False)]
WORTH = 0.95  # a way other than the first must take less than this share of the first one's time
SMALLEST = 2**14  # weights of a map that is worth a probe
ROUNDS = 15
LIMIT_S = 0.05  # of all rounds but the first, for one count of tokens
FAR = 2.0  # a way that took so many times as long as the fastest is not tried again
SWEEP = 2**20  # floats, 4 MB: more than the caches of one core hold

_CHOSEN: dict[tuple, tuple[str, ...]] = {}  # the way for each of TOKENS
_FIRST = contextvars.ContextVar("first", default=False)  # is every format to take its first way?


@dataclasses.dataclass(frozen=True)
class Slowdown:
    """How many times as long as a float map a packed one takes for so many tokens, and by which way: in fp32, and with inputs in bf16."""

    tokens: int
    fp32: float
    fp32_way: str
    bf16: float
    bf16_way: str


@contextlib.contextmanager
def first_ways() -> Iterator[None]:
    """Inside the block every format multiplies in its first way, which is its own arithmetic: no clock decides what the answers are."""
    token = _FIRST.set(True)
    try:
        yield
    finally:
        _FIRST.reset(token)


def product(module: PackedLinear, x: Tensor) -> Tensor:
    """x (..., I) times the packed weight, plus the bias: (..., O) in the format of x, the fastest way for so many tokens.

    While a model trains, is calibrated or counted, in `first_ways`, and for small maps, it is the format's first way: no clock decides what is learned.
    """
    ways = module.method.ways(module, x.dtype)
    if module.training or module.watch is not None or _FIRST.get() or len(ways) == 1 or math.prod(module.shape) < SMALLEST or not x.numel():
        return next(iter(ways.values()))(x)
    table = choices(module, x.dtype)
    return ways[table[nearest(x.numel() // module.in_features)] if table else next(iter(ways))](x)


def nearest(tokens: int) -> int:
    """The place in TOKENS of the count that is nearest, as a ratio."""
    return bisect.bisect(BORDERS, tokens)


def choices(module: PackedLinear, dtype: torch.dtype) -> tuple[str, ...]:
    """The name of the way for each of TOKENS, with inputs of a number format; empty while another mode, such as a FLOP counter, watches."""
    key = (module.packed_by, module.shape, dtype, torch.get_num_threads())
    if key not in _CHOSEN:
        if _python_dispatch._get_current_dispatch_mode() is not None:
            return ()
        with memory.kept_between_calls():
            _CHOSEN.setdefault(key, tuple(_fastest(_times(module, dtype, n)) for n in TOKENS))
        module.forget()  # what the ways keep that were not chosen
    return _CHOSEN[key]


@memory.kept_between_calls()
def slowdowns(method: Packing, *, shape: tuple[int, int] = (3072, 768), tokens: Sequence[int] = TOKENS) -> list[Slowdown]:
    """What a format costs here for each count of tokens, beside fp32 and bf16 maps with weights (O, I) of this shape.

    Each figure is a ratio of least times, in turn, on the threads that torch has now: CPU time on one, wall time on several, which wants a quiet
    machine. About a fifth of a second a format.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Linear(shape[1], shape[0]).requires_grad_(False).eval()
    module: PackedLinear = method.empty(plain).eval()  # type: ignore[assignment]
    module.pack(plain)
    half = copy.deepcopy(plain).bfloat16()
    found = []
    for n in tokens:
        cells = {}
        for name, dtype, floats in (("fp32", torch.float32, plain), ("bf16", torch.bfloat16, half)):
            times = _times(module, dtype, n, beside={"": floats})
            base = times.pop("")
            way = _fastest(times)
            cells |= {name: times[way] / base, f"{name}_way": way}
        found.append(Slowdown(n, **cells))
    return found


def _fastest(times: dict[str, float]) -> str:
    first, best = next(iter(times)), min(times, key=times.__getitem__)
    return best if times[best] < WORTH * times[first] else first


def _times(module: PackedLinear, dtype: torch.dtype, tokens: int, *, beside: dict[str, Way] | None = None) -> dict[str, float]:
    """The least seconds of each way for so many tokens, in turn, and of other maps beside them."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter  # other processes disturb CPU time less, and one thread's is the whole
    with torch.inference_mode(False), torch.no_grad():  # what a way keeps may be used outside inference mode, too
        sweep = torch.zeros(SWEEP)
        x = torch.linspace(-3, 3, tokens * module.in_features).view(tokens, module.in_features).to(dtype)
        ways = {**module.method.ways(module, dtype), **(beside or {})}
        least = {name: math.inf for name in ways if ways[name](x) is not None}  # the first call prepares
        until = time.perf_counter() + LIMIT_S
        for done in range(ROUNDS):
            if done and time.perf_counter() > until:
                break
            for name in [n for n in ways if least[n] < FAR * min(least.values()) or least[n] == math.inf]:
                sweep.add_(1)
                begun = clock()
                ways[name](x)
                least[name] = min(least[name], clock() - begun)
    return least
