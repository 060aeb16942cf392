"""Where an adapter touches a model: the seam, which holds all patches of one module, and what is attached to a whole model.

A seam is a child module named `paretune` of the module it patches, so the backbone's state-dict keys stay as they are
and adapter tensors are extra keys: `<module>.paretune.<adapter>.<method>.<tensor>`. The module itself only changes its
class, to a subclass that asks the seam; `isinstance`, `deepcopy` and `DataParallel` see the same module as before.

Shapes: B rows, T positions, D features of a block, I and O features of a linear map.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paretune import anatomy, attention
from paretune.anatomy import Site
from paretune.patches import Patch, Selected

if TYPE_CHECKING:
    from paretune.roles import Adapter

CHILD = "paretune"
READOUT = "readout"  # the name under which a readout's patches stand; they belong to the head, and no switch turns them off
RANGES = "steps"  # the name of the step sizes that `qat` learned; they belong to the weights, and no switch turns them off
ATTENTION = "efficient"  # the name of attention by other means (`attention/efficient.py`); it belongs to the model, and no switch turns it off
OWN = (READOUT, RANGES, ATTENTION)  # what belongs to the model or its head, and to no adapter


class Seam(nn.Module):
    """All patches at one module, by adapter and method; runs the active ones in the order of attachment."""

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.rows: tuple[str | None, ...] | None = None  # one adapter's name per row of the batch, or None for all
        self.captures: tuple[tuple[str, str], ...] = ()  # (adapter, key): this module's input is kept for a block's parallel adapter

    def patches(self, adapters: Sequence[str] | None = None) -> Iterator[tuple[str, str, Patch]]:
        """(adapter, method key, patch) of the given adapters, or of all."""
        for adapter, group in self._modules.items():
            if adapters is None or adapter in adapters:
                for key, patch in group._modules.items():  # type: ignore[union-attr]
                    if isinstance(patch, Patch):
                        yield adapter, key, patch

    def shared(self, adapters: Sequence[str] | None = None) -> Iterator[tuple[str, str, nn.Module]]:
        """(adapter, key, module) of what the patches of a method share; it is kept at the seam of the whole model."""
        for adapter, group in self.named_children():
            if adapters is None or adapter in adapters:
                yield from ((adapter, key, module) for key, module in group.named_children() if not isinstance(module, Patch))

    def ranges(self) -> Patch | None:
        """The patch that brings the module's effective weight onto a grid of codes, if there is one."""
        return next((patch for _, _, patch in self.patches([RANGES])), None)

    def add(self, adapter: str, key: str, *, patch: nn.Module) -> None:
        """Puts a patch (or what patches share) in; a second one of a method gets a number."""
        group = self._modules.get(adapter)
        if group is None:
            group = nn.Module()
            self.add_module(adapter, group)
        number = sum(1 for k in group._modules if re.fullmatch(rf"{key}(_\d+)?", k))
        group.add_module(f"{key}_{number + 1}" if number else key, patch)

    def attending(self, adapters: Sequence[str | None] | None = None) -> list[Patch]:
        """The patches that act in the module's attention call, innermost first: of the given adapters, or of all that are at work."""
        names = self._serving() if adapters is None else adapters
        return [p for group in ((ATTENTION,), names) for _, _, p in self.patches(group) if p.attends]  # type: ignore[arg-type]

    def _serving(self) -> tuple[str, ...]:
        return self.active if self.rows is None else tuple(dict.fromkeys(n for n in self.rows if n is not None))

    def run(self, forward: Any, args: tuple, *, kwargs: dict[str, Any]) -> Any:
        """The module's own bound forward with its active patches around it."""
        names = self._serving()
        for adapter, key in self.captures:
            if adapter in names:
                _waiting.inputs[key] = _first_input(args, kwargs)
        working = [(adapter, patch) for adapter, _, patch in self.patches((*names, *OWN))]
        if any(adapter in OWN or not patch.plain for adapter, patch in working):
            forward, kwargs, working = self._arranged(forward, args, kwargs)
        elif len(working) == 1 and self.rows is None and (y := working[0][1].whole(_first_input(args, kwargs), forward.__self__)) is not None:
            return y
        return self._patched(working, forward, args, kwargs) if working else forward(*args, **kwargs)

    def _arranged(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any], list[tuple[str, Patch]]]:
        """The forward with the patches in and around it that act otherwise than on what it takes and gives; its keywords; the patches that are left."""
        names = self._serving()
        patches = [(a, p) for a, _, p in self.patches(names) if not isinstance(p, Selected)]
        ranges = self.ranges()  # codes hold W + BA, so that what folds is summed up before it is rounded
        inside = [p for _, p in patches if p.reweighs or ranges is not None and not (p.wraps or p.attends) and p.method.foldable]
        if inside or ranges is not None:
            forward = _reweighed(forward, inside, ranges)
        for around in self._wrapping(names):
            forward = functools.partial(around, forward)
        if self.attending():
            kwargs = {**kwargs, attention.INPUT: _first_input(args, kwargs)}
        return forward, kwargs, [(a, p) for a, p in patches if not (p.wraps or p.attends or p in inside)]

    def _wrapping(self, names: Sequence[str]) -> Iterator[Callable[..., Any]]:
        """What goes around the call: each patch; or, where rows have adapters of their own, the patches of a method together. A readout is outermost."""
        yield from (patch.around for _, _, patch in self.patches([ATTENTION]) if patch.wraps)
        patches = [(a, k, p) for a, k, p in self.patches(names) if p.wraps]
        readout = [patch.around for _, _, patch in self.patches([READOUT])]
        if self.rows is None:
            yield from (*(patch.around for _, _, patch in patches), *readout)
            return
        for key in dict.fromkeys(key for _, key, _ in patches):
            of = {adapter: patch for adapter, k, patch in patches if k == key}
            yield next(iter(of.values())).among([None if name is None else of.get(name) for name in self.rows])
        yield from readout

    def _patched(self, working: list[tuple[str, Patch]], forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        x = _first_input(args, kwargs)
        inputs = [x]  # what each patch sees, from the outermost inwards
        for _, patch in reversed(working):
            inputs.append(patch.enter(inputs[-1]))
        if inputs[-1] is not x:
            args, kwargs = _with_first_input(args, kwargs, inputs[-1])
        out = forward(*args, **kwargs)
        y = out[0] if isinstance(out, tuple) else out
        waiting = _waiting.inputs
        for (adapter, patch), x in zip(working, reversed(inputs[:-1]), strict=True):
            y = self._applied(adapter, patch, waiting.get(capture_key(patch.site), x) if waiting else x, y)
        for _, patch in working if waiting else ():
            waiting.pop(capture_key(patch.site), None)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def _applied(self, adapter: str, patch: Patch, x: Tensor, y: Any) -> Any:
        call = functools.partial(_on_rows_of, self.rows, adapter, patch) if self.rows is not None else patch
        rows = None if patch.site is None else patch.site.rows
        if rows is None:
            return call(x, y)
        if contiguous(rows):
            start, stop = rows[0], rows[-1] + 1
            return torch.cat([y[..., :start], call(x, y[..., start:stop]).to(y.dtype), y[..., stop:]], -1)
        index = torch.tensor(rows, device=y.device)
        return y.index_copy(-1, index, call(x, y.index_select(-1, index)).to(y.dtype))  # the part (B, T, O of the part)


def effective(module: nn.Module, patches: Sequence[Patch], *, ranges: Patch | None = None) -> dict[str, Tensor]:
    """The module's weight and bias (where it changes) with the patches in them, summed in fp32, as the module stores them.

    Patches that reweigh say what the map is, and come first; the others act on its input and output. Apart from that
    the order is that of attachment. With `ranges` the sum is rounded to its grid of codes.
    """
    stored, bias = anatomy.weight(module), getattr(module, "bias", None)  # (O, I), (O)
    weight, shift = stored.float(), None if bias is None else bias.float()
    for patch in sorted(patches, key=lambda p: not p.reweighs):
        rows = None if patch.site is None or patch.site.rows is None else torch.tensor(patch.site.rows, device=weight.device)
        part = slice(None) if rows is None else rows
        d_weight, d_bias = patch.delta(weight[part], None if shift is None else shift[part])
        weight = _plus(weight, d_weight, rows)  # W ← W + ΔW
        shift = shift if d_bias is None or shift is None else _plus(shift, d_bias, rows)  # b ← b + Δb
    weight = weight if ranges is None else ranges.on_grid(weight)
    found = {"weight": (weight.T if anatomy.is_transposed(module) else weight).to(stored.dtype).contiguous()}
    return found if bias is None or shift is bias else {**found, "bias": shift.to(bias.dtype)}


def _plus(whole: Tensor, change: Tensor, rows: Tensor | None) -> Tensor:
    return whole + change if rows is None else whole.index_add(0, rows, change)


def _reweighed(plain: Callable[..., Any], patches: Sequence[Patch], ranges: Patch | None) -> Callable[..., Any]:
    """The same forward on a stand-in that has the effective values; the module itself stays as it is, for other threads to run."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _on_stand_in(plain, patches, ranges, args, kwargs)

    return forward


@torch.compiler.disable  # it would not know the stand-in for a module
def _on_stand_in(plain: Callable[..., Any], patches: Sequence[Patch], ranges: Patch | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    module = plain.__self__  # type: ignore[attr-defined]
    base = base_of(module)
    stand_in = base.__new__(base)
    kind = module.weight.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        stand_in.__dict__.update(module.__dict__ | effective(module, patches, ranges=ranges))
    return types.MethodType(plain.__func__, stand_in)(*args, **kwargs)  # type: ignore[attr-defined]


def contiguous(rows: tuple[int, ...]) -> bool:
    """Are the features next to each other? (They are distinct and in order.)"""
    return rows[-1] - rows[0] + 1 == len(rows)


def _on_rows_of(rows: tuple[str | None, ...], adapter: str, patch: Patch, x: Tensor, y: Tensor) -> Tensor:
    """The patch on the rows that ask for its adapter; a batch of k times as many rows (beams) repeats each k times."""
    repeat = y.shape[0] // len(rows)
    assert repeat * len(rows) == y.shape[0], f"{len(rows)} adapters were named for a batch of {y.shape[0]} rows"
    mine = torch.tensor([i * repeat + k for i, name in enumerate(rows) if name == adapter for k in range(repeat)], device=y.device)
    return y.index_copy(0, mine, patch(x.index_select(0, mine), y.index_select(0, mine)).to(y.dtype))


def _first_input(args: tuple, kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _with_first_input(args: tuple, kwargs: dict[str, Any], x: Any) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (x, *args[1:]), kwargs
    return args, {next(iter(kwargs)): x, **dict(list(kwargs.items())[1:])}


# A parallel adapter reads the input of its block's first module and writes to the output of its last. Between the two,
# within one forward pass of one thread (DataParallel runs one thread per replica), the input waits here.
class _Waiting(threading.local):
    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}


_waiting = _Waiting()


def capture_key(site: Site | None) -> str:
    """Under which name a block's input waits; the empty text for a site that reads its own module's input."""
    return "" if site is None or site.source in (None, site.path) else f"{site.source}>{site.path}"


class Adapted:
    """Mixed in front of a module's class while the module has working patches."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        seam: Seam = self._modules[CHILD]  # type: ignore[attr-defined]
        return seam.run(super().forward, args, kwargs=kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: int) -> Any:  # the subclass has no importable name; copying and pickling rebuild it
        return _rebuild, (type(self).__bases__[-1],), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__


@functools.cache
def _adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    front = (attention.Attending, Adapted) if anatomy.calls_attention(base) else (Adapted,)
    return type(base.__name__, (*front, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _adapted_class(base)
    return cls.__new__(cls)


def seam_of(module: nn.Module) -> Seam | None:
    """The seam of a module, if it has one."""
    return module._modules.get(CHILD)  # type: ignore[return-value]


def open_seam(module: nn.Module, *, working: bool) -> Seam:
    """The module's seam, made if there is none; `working` if a patch of it acts in the forward pass."""
    seam = seam_of(module)
    if seam is None:
        seam = Seam()
        module.add_module(CHILD, seam)
    if working and not isinstance(module, Adapted):
        module.__class__ = _adapted_class(type(module))
    return seam


def hand_over(seam: Seam, module: nn.Module, *, working: bool) -> None:
    """Gives a module the seam that another had, or it itself before."""
    open_seam(module, working=working)
    module._modules[CHILD] = seam


def base_of(module: nn.Module) -> type[nn.Module]:
    """The module's own class, adapted or not."""
    return type(module).__bases__[-1] if isinstance(module, Adapted) else type(module)


def close_seam(module: nn.Module) -> None:
    """Takes the seam off and gives the module its class back."""
    del module._modules[CHILD]
    module.__class__ = base_of(module)


def close_if_empty(module: nn.Module) -> None:
    """Closes a seam that holds nothing."""
    seam = seam_of(module)
    if seam is not None and not seam._modules and not seam.captures:
        close_seam(module)


def keep_own(module: nn.Module, seam: Seam) -> None:
    """Lets the module go on, without the rest of its closed seam, with what belongs to the model and to no adapter."""
    for name in OWN:
        group = seam._modules.get(name)
        if group is not None:
            open_seam(module, working=True)._modules[name] = group


def drop_ranges(module: nn.Module) -> None:
    """Takes the ranges off that a module's codes now have."""
    del module._modules[CHILD]._modules[RANGES]  # type: ignore[union-attr]
    close_if_empty(module)


def drop(model: nn.Module, group: str) -> None:
    """Takes all patches of one name off."""
    for _, module, seam in seams_of(model):
        if group in seam._modules:
            del seam._modules[group]
        close_if_empty(module)


def is_adapters(parameter: str) -> bool:
    """Is the parameter of this name an adapter's or a readout's, and not the model's own or its attention's?"""
    return f".{CHILD}." in f".{parameter}" and not is_attention(parameter)


def is_attention(parameter: str) -> bool:
    """Does the parameter of this name belong to attention by other means?"""
    return f".{CHILD}.{ATTENTION}." in f".{parameter}"


def readout(model: nn.Module) -> Any | None:
    """The readout whose patches stand on the model; None where there is none."""
    return next((patch.method for _, _, seam in seams_of(model) for _, _, patch in seam.patches([READOUT])), None)


@contextlib.contextmanager
def bypassed(model: nn.Module, path: str) -> Iterator[None]:
    """Within the block an identity stands in the module's place, so that what the module would read comes out."""
    owner, _, name = path.rpartition(".")
    holder = model.get_submodule(owner)
    module = holder._modules[name]
    holder._modules[name] = nn.Identity()
    try:
        yield
    finally:
        holder._modules[name] = module


@dataclasses.dataclass
class State:
    """What is attached to a model; lives on the model as `_paretune`."""

    adapters: dict[str, tuple[Adapter, ...]] = dataclasses.field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: list[tuple[str, str, Tensor]] = dataclasses.field(default_factory=list)  # module, parameter, original
    unmerged: dict[str, Seam] = dataclasses.field(default_factory=dict)  # module -> the seam it had before the merge
    processor: Any = None  # the tokenizer or image processor that travels with the model
    tokenizer: dict[str, str] | None = None  # name and fingerprint of the processor, or of the one that the file of its adapters tells of
    before: tuple[dict[str, tuple[Adapter, ...]], tuple[str, ...]] | None = None  # adapters and active before the merge


def state(model: nn.Module) -> State:
    """What is attached to the model."""
    if "_paretune" not in model.__dict__:
        model.__dict__["_paretune"] = State()
    return model.__dict__["_paretune"]


def seams_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Seam]]:
    """(path, module, seam) of every module that has one."""
    for path, module in list(model.named_modules()):
        seam = seam_of(module)
        if isinstance(seam, Seam):
            yield path, module, seam


def shared_by(model: nn.Module, adapter: str, *, method: Adapter) -> nn.Module | None:
    """What the patches of an adapter's method share, if they share anything."""
    seam = seam_of(model)
    return next((m for _, _, m in seam.shared([adapter]) if m.method == method), None) if seam else None


@torch.no_grad()
def settle(model: nn.Module, adapters: Sequence[str]) -> None:
    """Lets the patches of these adapters give up their training form, all patches of one method at once."""
    groups: dict[tuple[str, Any], list[Patch]] = {}
    for _, _, seam in seams_of(model):
        for adapter, _, patch in seam.patches(adapters):
            if not isinstance(patch, Selected) and not patch.settled:
                groups.setdefault((adapter, patch.method), []).append(patch)
    for (_, method), patches in groups.items():
        for patch, tensors in zip(patches, method.settle(patches), strict=True):
            if tensors:
                patch.hold(tensors)


def sweep(model: nn.Module) -> None:
    """Takes away what no patch shares any more, and seams that hold nothing."""
    used = {id(patch.shared) for _, _, seam in seams_of(model) for _, _, patch in seam.patches()}
    for _, module, seam in seams_of(model):
        for adapter, key, shared in list(seam.shared()):
            if id(shared) not in used:
                del seam._modules[adapter]._modules[key]
        for adapter in [a for a, group in seam.named_children() if not group._modules]:
            del seam._modules[adapter]
        close_if_empty(module)
