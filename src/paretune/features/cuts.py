"""Cuts: where the part of a model ends that a training phase leaves alone, and passes that begin there.

    logits = g(f(x)), g learns:   f ends where the base model answers, or with the last layer whose output needs no gradient

Autograd says which layers those are, so that a cut is right for every adapter. It is taken only if the model, given nothing but the rows of z = f(x) that
would be kept, answers a few examples as it did before.

Shapes: B rows, T tokens, D features; R rows that are kept of a batch, one or all tokens of each example.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paretune import anatomy
from paretune.errors import Incompatible
from paretune.step import probe

if TYPE_CHECKING:
    from paretune.training import Loop

POSITIONS = ("first", "last", "all")  # the tokens of an example that may be needed


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where f ends: the module `path` answers with z, and the modules `skipped` before it, at the level of layers, do nothing."""

    path: str
    skipped: tuple[str, ...]
    positions: str  # first, last or all: the tokens of which z is needed
    answer: Callable[[Tensor], Any]  # z (B, T, D) in the form in which the module answers
    width: int  # D
    tokens: int | None  # T where every example has as many (images, sound); None: as its encoding says
    dtype: torch.dtype  # of z inside the model

    def lengths(self, encodings: Sequence[dict[str, Any]]) -> list[int]:
        """How many tokens each example has."""
        return [self.tokens or len(e["input_ids"]) for e in encodings]

    def mask(self, lengths: Sequence[int], tokens: int) -> Tensor:
        """(B, T): which tokens are kept."""
        at, n = torch.arange(tokens), torch.tensor(lengths)[:, None]
        return {"first": at.expand(len(lengths), -1) == 0, "last": at == n - 1, "all": at < n}[self.positions]

    def rows(self, z: Tensor, lengths: Sequence[int]) -> Tensor:
        """What is kept (R, D) of z (B, T, D)."""
        return z[self.mask(lengths, z.shape[1]).to(z.device)]

    def spread(self, rows: Tensor, lengths: Sequence[int], *, tokens: int) -> Tensor:
        """z (B, T, D) out of what was kept: one token stands in all places; else padding is zero."""
        rows = rows.to(self.dtype)
        if self.positions != "all":
            return rows[:, None].expand(-1, tokens, -1)
        return rows.new_zeros(len(lengths), tokens, self.width).masked_scatter(self.mask(lengths, tokens)[..., None].to(rows.device), rows)


def found(loop: Loop) -> Cut | None:
    """The latest cut from whose kept rows alone the model answers a few examples as before, in evaluation mode; None where there is none."""
    model, kind, was_training = loop.model, loop.task.kind, loop.model.training
    layers = _layers(model)
    if not layers or any(p.requires_grad for p in model.get_submodule(layers[0]).parameters()):
        return None  # as with adapters everywhere, for which a pass that tells autograd's own answer would be for nothing
    order = sorted(range(len(loop.encodings)), key=loop.lengths.__getitem__)
    some = [loop.encodings[i] for i in dict.fromkeys((order[0], order[len(order) // 2], order[-1]))]
    batch = loop.collate(some)
    model.eval()
    try:
        with torch.random.fork_rng(), probe.autocast(loop.pace):
            seen, answers = _seen(model, kind, batch)
            for path, skipped in _places(model, seen):
                for cut in _cuts(path, skipped, seen[path][0], batch):
                    if _same(answers, _resumed(model, kind, batch, cut, states(seen[path][0]), cut.lengths(some))):
                        return cut
    finally:
        model.train(was_training)
    return None


def _seen(model: nn.Module, kind: Any, batch: dict[str, Tensor]) -> tuple[dict[str, list[Any]], list[Tensor]]:
    """(by path what the base model and each layer put out, call by call; the answers)."""
    seen: dict[str, list[Any]] = {path: [] for path in (*_layers(model), _base(model)) if path}
    with contextlib.ExitStack() as undo:
        for path, outputs in seen.items():
            undo.callback(model.get_submodule(path).register_forward_hook(lambda _, args, out, outputs=outputs: outputs.append(out)).remove)
        answers = kind.answered(model(**kind.inputs(batch)), batch)
    return seen, [answer.detach() for answer in answers]


def _places(model: nn.Module, seen: dict[str, list[Any]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, the layers before it that are then not needed) of each place where f may end, the latest first."""
    base, layers = _base(model), _layers(model)
    if layers and base and len(seen[base]) == 1 and not states(seen[base][0]).requires_grad:
        yield base, ()
    if layers and all(len(seen[path]) == 1 for path in layers):  # ALBERT calls one layer many times
        below = [path for path in layers if not states(seen[path][0]).requires_grad]
        if below:
            yield below[-1], tuple(below[:-1])


def _cuts(path: str, skipped: tuple[str, ...], out: Any, batch: dict[str, Tensor]) -> Iterator[Cut]:
    """The cuts at a module by what it put out, from those that keep little; none where that is not a vector for each token of each example."""
    z, tokens = states(out), batch["input_ids"].shape if "input_ids" in batch else None
    pooled = getattr(out, "pooler_output", None)
    fits = z.dim() == 3 and (len(z) == len(next(iter(batch.values()))) if tokens is None else z.shape[:2] == tokens)
    if fits and (pooled is None or torch.equal(pooled, z[:, 0])):
        for positions in POSITIONS:
            yield Cut(path, skipped, positions, _form(out), z.shape[-1], z.shape[1] if tokens is None else None, z.dtype)


def _resumed(model: nn.Module, kind: Any, batch: dict[str, Tensor], cut: Cut, z: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The answers from what the cut keeps of z, in detail: all else that f gives is not a number."""
    x = cut.spread(cut.rows(z, lengths), lengths, tokens=z.shape[1])
    if cut.positions != "all":
        x = x.masked_fill(~cut.mask(lengths, z.shape[1])[..., None].to(z.device), torch.nan)
    with torch.no_grad(), given(model, cut, z=x, skipped=torch.full_like(x, torch.nan)):
        return kind.answered(model(**kind.inputs(batch)), batch)


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(left, right, strict=True))


def _layers(model: nn.Module) -> list[str]:
    """Paths of the layers, where they stand in one stack; else none."""
    try:
        refs = anatomy.layers(model)
    except Incompatible:  # a family that is not described
        return []
    return [ref.path for ref in refs] if len({ref.stack for ref in refs}) == 1 else []


def _base(model: nn.Module) -> str | None:
    """The path of the base model in a model with a head."""
    return next((path for path, module in model.named_children() if module is model.base_model), None)


def frozen(model: nn.Module, cut: Cut, *, around: bool = False) -> list[nn.Module]:
    """The modules that f is made of; with `around` those that are called even where z is given, such as embeddings before a cut at a layer."""
    inside = (*cut.skipped, cut.path)
    not_of_it = [*(path for path in _layers(model) if path not in inside and cut.path != _base(model)), *anatomy.head(model), *(inside if around else ())]
    start, ends = f"{_base(model)}." if _base(model) else "", tuple(f"{path}." for path in not_of_it)
    return [module for path, module in model.named_modules() if f"{path}.".startswith(start) and not f"{path}.".startswith(ends)]


# --- during a pass --------------------------------------------------------------------------------------------------------------


def states(out: Any) -> Tensor:
    """The hidden states among what a module puts out."""
    return out if isinstance(out, Tensor) else out[0]


def _form(out: Any) -> Callable[[Tensor], Any]:
    """z in the form of a module's output; what else it has is None, or of a base model's pooled output z of the first token."""
    if isinstance(out, Tensor):
        return lambda z: z
    if isinstance(out, tuple):
        others = (None,) * (len(out) - 1)
        return lambda z: (z, *others)
    kind, pooled = type(out), getattr(out, "pooler_output", None) is not None
    return lambda z: kind(last_hidden_state=z, **({"pooler_output": z[:, 0]} if pooled else {}))


@contextlib.contextmanager
def given(model: nn.Module, cut: Cut, *, z: Tensor, skipped: Tensor | None = None) -> Iterator[None]:
    """Within the block the cut's module answers z, and the layers before it z, too, or `skipped`, without computing."""
    with contextlib.ExitStack() as undo:
        for path in (*cut.skipped, cut.path):
            answer = cut.answer(z if path == cut.path or skipped is None else skipped)
            undo.enter_context(answered(model.get_submodule(path), lambda _, answer=answer: answer))
        yield


@contextlib.contextmanager
def answered(module: nn.Module, answer: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Within the block a module, with all patches on it, answers `answer(compute)`; `compute()` is its own answer."""
    own, before = module.forward, module.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return answer(lambda: own(*args, **kwargs))

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


@contextlib.contextmanager
def without_dropout(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block these modules compute as in evaluation mode, each for itself."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
