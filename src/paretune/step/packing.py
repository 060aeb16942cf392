"""Packing: the texts of a batch stand in one row, and each attends to itself alone.

    (B, T, D)  --first layer-->  (1, N, D)  --last layer-->  (B, T, D),    N = Σ_k b_k t_k of blocks of texts, k = 1, 2, ...
    A = softmax(s Q Kᵀ + b),   A_jk = 0 where tokens j and k belong to different texts

Maps, norms and dropout work on N tokens and not on B·T. A block is b texts of like length, t the longest; blocks are such that padding in them and what
one more call of the attention costs are least together. Attention is computed within blocks, which lie in the row as they are, by the kernel that the
pace names. Embeddings and rotary positions are made before the first layer, where texts stand apart, and behind the last layer they do again:
positions begin anew with each text, and heads and losses read what they always read.
Krell et al. 2021, Efficient Sequence Packing without Cross-contamination, arXiv:2107.02027.

The layout of a row travels as a keyword through the model to its attention calls. That it arrives there, and that the answers are those
of the texts apart, is tried on a few examples before a training begins.

Shapes: B texts, T tokens of the longest, N places of the row, H heads, D features of a token or head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from paretune import anatomy, attention, seams
from paretune.attention import efficient
from paretune.errors import Incompatible
from paretune.events import Events
from paretune.step import short_attention

if TYPE_CHECKING:
    from paretune.training import Loop

LAYOUT = "paretune_layout"  # the keyword
PREFIX = "paretune_packed_"  # of our functions in transformers' table, before the name of the kernel that computes the blocks
KERNELS = ("eager", "sdpa", short_attention.NAME)
ROUND = 64  # a row's length is a multiple of it: in bf16 on a CPU each new length costs oneDNN a kernel for each map
CALL = 4  # tokens that take as long as one more call of the attention in each layer does
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # what a sum in another order makes of an answer in fp32


@dataclasses.dataclass(frozen=True)
class Move:
    """Rows of one matrix as rows of another: row p is row `source[p]`, or filling; rows `real` are no filling, and stand there once."""

    source: Tensor
    real: Tensor

    @classmethod
    def of(cls, source: Tensor, is_real: Tensor) -> Move:
        """With a truth for each row."""
        return cls(source, is_real.nonzero()[:, 0])

    def __call__(self, x: Tensor) -> Tensor:
        """The rows of x (rows, features) so moved."""
        return _Moved.apply(x, self.source, self.real)


class _Moved(torch.autograd.Function):
    """y = x[source]; filling passes no gradient, so that the gradient is moved back and never summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(source, real)
        ctx.rows = len(x)
        return x.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        source, real = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, gradient.shape[1]).index_copy_(0, source[real], gradient[real]), None, None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a padded batch becomes a row, and back."""

    shape: tuple[int, int]  # (B, T)
    pack: Move  # B·T -> N
    unpack: Move  # N -> B·T
    blocks: tuple[tuple[Tensor, int], ...]  # the texts (b) of a block, and the length (t) of the longest; the row ends with filling

    @classmethod
    def of(cls, mask: Tensor) -> Layout:
        """Of a batch with this mask (B, T): 1 on real tokens, 0 on padding."""
        shape, is_real = tuple(mask.shape), mask.flatten().bool()
        blocks = tuple((torch.tensor(texts, device=mask.device), longest) for texts, longest in groups(mask.sum(1).tolist()))
        cells = torch.arange(mask.numel(), device=mask.device).view(shape)
        inside = torch.cat([cells[texts, :longest].flatten() for texts, longest in blocks])  # the cells of the batch that stand in the row
        place = torch.zeros_like(is_real, dtype=torch.long)
        place[inside] = torch.arange(len(inside), device=mask.device)
        filled = -len(inside) % ROUND
        row = Move.of(F.pad(inside, (0, filled)), F.pad(is_real[inside], (0, filled)))
        return cls(shape, row, Move.of(place, is_real), blocks)

    def split(self, row: Tensor) -> list[Tensor]:
        """The blocks (b, H, t, D) of a row (1, H, N, D)."""
        sizes = [len(texts) * longest for texts, longest in self.blocks]
        parts = row[0].transpose(0, 1).split([*sizes, row.shape[2] - sum(sizes)])
        return [part.unflatten(0, (len(texts), longest)).transpose(1, 2) for (texts, longest), part in zip(self.blocks, parts, strict=False)]

    def join(self, blocks: Sequence[Tensor]) -> Tensor:
        """The row (1, N, H, D) of blocks (b, t, H, D)."""
        joined = torch.cat([block.flatten(0, 1) for block in blocks])
        return F.pad(joined, (0, 0, 0, 0, 0, -len(joined) % ROUND))[None]


def groups(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """(texts, length of the longest) of each block, so that Σ (b t + CALL) is least; texts of one length are never parted."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends = [i + 1 for i, text in enumerate(order) if i + 1 == len(order) or lengths[order[i + 1]] > lengths[text]]
    best = {0: (0, 0)}  # of the first so many texts: the least cost, and where the last block begins
    for end in ends:
        best[end] = min((cost + (end - start) * lengths[order[end - 1]] + CALL, start) for start, (cost, _) in best.items())
    found, end = [], len(order)
    while end:
        start = best[end][1]
        found.append((order[start:end], lengths[order[end - 1]]))
        end = start
    return found[::-1]


def places(tokens: int) -> int:
    """N for texts of so many tokens, at most: k different lengths have k (k + 1) / 2 tokens or more, and padding is worth fewer than k calls."""
    return tokens + CALL * math.isqrt(2 * tokens) + ROUND


def name(kernel: str) -> str:
    """What the attention is called that computes the blocks of a row by this kernel."""
    return PREFIX + (kernel or "eager")


def laid_out(inputs: dict[str, Any], attention: str) -> dict[str, Any]:
    """A model's inputs, with their layout where the attention is one of ours."""
    return inputs | {LAYOUT: Layout.of(inputs["attention_mask"])} if attention.startswith(PREFIX) else inputs


def check(loop: Loop) -> None:
    """Tries packing, where the schedule asks for it, on a short, a middle and a long example, in evaluation mode.

    Raises:
        Incompatible: where it is not exact, or something looks into a pass and would find a row there.
    """
    if not loop.schedule.pack:
        return
    why = _refused(loop) or ("" if _same(loop) else f"{type(loop.model).__name__} does not answer them as it answers the texts apart")
    if why:
        raise Incompatible(f"schedule(pack=True): texts cannot stand in one row, for {why}; leave pack out")


def _refused(loop: Loop) -> str:
    model, reader = loop.model, seams.readout(loop.model)
    if "input_ids" not in loop.encodings[0]:
        return f"{loop.task.name} has {loop.task.kind.noun}, and no texts"
    if isinstance(loop.encodings[0]["input_ids"][0], list):
        return f"an example of {loop.task.name} is several texts"
    if looks := [
        type(e).__module__.rpartition(".")[2] for e in loop.events if not e.looks_on and (type(e).inputs is not Events.inputs or type(e).loss is not Events.loss)
    ]:
        return f"{looks[0]} has a loss or inputs of its own"
    if reader is not None and reader.speaks:
        return f"{reader!r} reads several passes for an answer"
    if len({ref.stack for ref in anatomy.layers(model)}) > 1:
        return f"{type(model).__name__} is an encoder with a decoder"
    if any(isinstance(m, attention.Attending) and m._modules[attention.NAME].attending() for m in model.modules()):  # type: ignore[union-attr]
        return "something acts inside the attention"
    if efficient.on_latents(model):
        return "its layers compute on latents, and not on tokens"
    if not any(anatomy.calls_attention(type(m)) for m in model.modules()):
        return f"{type(model).__name__} computes attention in its own code"
    own = model.config._attn_implementation or "eager"  # type: ignore[union-attr]
    return "" if own in KERNELS else f"no blocks are computed by attention {own!r}"


def _same(loop: Loop) -> bool:
    """Are the answers of a row those of its texts apart?"""
    model, kind, was_training = loop.model, loop.task.kind, loop.model.training
    order = sorted(range(len(loop.lengths)), key=loop.lengths.__getitem__)
    batch = loop.collate([loop.encodings[i] for i in (order[0], order[len(order) // 2], order[-1])])
    own = model.config._attn_implementation  # type: ignore[union-attr]
    model.eval()
    try:
        with torch.no_grad(), rows(model):
            apart = kind.answered(model(**kind.inputs(batch)), batch)
            model.set_attn_implementation(name(own))  # type: ignore[operator]
            together = kind.answered(model(**laid_out(kind.inputs(batch), name(own))), batch)
    finally:
        model.set_attn_implementation(own)  # type: ignore[operator]
        model.train(was_training)
    return all(torch.allclose(a, b, **CLOSE) for a, b in zip(apart, together, strict=True))


def applies(loop: Loop) -> bool:
    """Do the texts of the loop's next pass stand in one row? Not where the features of what is frozen are kept, by text."""
    return loop.schedule.pack and loop.split.cut is None


def inputs(loop: Loop, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What the loop's model takes of a batch, with the layout of its row where texts stand in one."""
    given = loop.task.kind.inputs(batch)
    return laid_out(given, loop.pace.attention) if applies(loop) else given


# --- in the model ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def rows(model: nn.Module) -> Iterator[None]:
    """Within the block the layers see the row of a call that has a layout, and the rest of the model the texts apart."""
    layers = [model.get_submodule(ref.path) for ref in anatomy.layers(model)]
    with contextlib.ExitStack() as undo:
        undo.callback(layers[0].register_forward_pre_hook(_enter, with_kwargs=True).remove)
        for layer in layers:
            undo.callback(layer.register_forward_pre_hook(_positions, with_kwargs=True).remove)
        undo.callback(layers[-1].register_forward_hook(_leave, with_kwargs=True).remove)
        yield


def _enter(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if LAYOUT not in kwargs:
        return None
    layout, x = kwargs[LAYOUT], args[0] if args else kwargs["hidden_states"]
    if x.shape[:2] != layout.shape:
        raise Incompatible(f"schedule(pack=True): {x.shape[1]} tokens enter the layers, and the texts have {layout.shape[1]}; leave pack out")
    row = layout.pack(x.flatten(0, 1))[None]
    return ((row, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": row})


def _positions(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Rotations (1 or B, T, D), by text, become the row's."""
    if LAYOUT not in kwargs or not isinstance(kwargs.get("position_embeddings"), tuple):
        return None
    layout = kwargs[LAYOUT]
    return args, {**kwargs, "position_embeddings": tuple(layout.pack(x.expand(layout.shape[0], -1, -1).flatten(0, 1))[None] for x in kwargs["position_embeddings"])}


def _leave(layer: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
    if LAYOUT not in kwargs:
        return None
    layout, x = kwargs[LAYOUT], out if isinstance(out, Tensor) else out[0]
    apart = layout.unpack(x[0]).unflatten(0, layout.shape)
    return apart if isinstance(out, Tensor) else (apart, *out[1:])


def _packed_attention(kernel: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Of a row: its blocks, each by the kernel with its part of the padded batch's mask; of a call without a layout, the kernel."""
    layout, function = kwargs.pop(LAYOUT, None), anatomy.attention_function(type(module), kernel)
    if layout is None:
        return function(module, query, key, value, mask, **kwargs)
    each = zip(*(layout.split(x) for x in (query, key, value)), strict=True)
    parts = [_part(mask, texts, longest) for texts, longest in layout.blocks]
    return layout.join([function(module, *qkv, part, **kwargs)[0] for qkv, part in zip(each, parts, strict=True)]), None


def _part(mask: Tensor | None, texts: Tensor, longest: int) -> Tensor | None:
    """A block's part of a mask (1 or B, 1 or H, 1 or T, T)."""
    return None if mask is None else (mask if len(mask) == 1 else mask[texts])[:, :, :longest, :longest]


for _kernel in KERNELS:
    anatomy.register_attention(name(_kernel), functools.partial(_packed_attention, _kernel), masks=_kernel)
