"""The only file that replaces, wraps or restores modules of a model (what it does at one module is in `seams.py`).

Verbs: attach, switch, rows, remove, settle, merge, unmerge, replace. Backbone values change in `merge` only (and there
can be brought back exactly); parameters that an adapter selects are trained in place, and their originals kept beside.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from paretune import anatomy, hub, seams
from paretune.anatomy import Site
from paretune.errors import Incompatible, did_you_mean, one_of
from paretune.folding import forget, merge, unmerge  # noqa: F401 - verbs of surgery, too
from paretune.roles import Adapter
from paretune.seams import CHILD, Patch, Seam, Selected, State, seams_of, state  # noqa: F401

HEAD = "head_weights"  # the method key under which an adapter keeps its own head


def attach(model: nn.Module, methods: Sequence[Adapter], *, name: str = "default", on_top: bool = False, head: bool = True) -> list[str]:
    """Puts adapters on the model under one name; only they (and, with `head`, the task's head) learn from here on.

    Args:
        model: any supported transformers model; it stays the same object.
        methods: the adapters of one training phase.
        name: how `switch`, `rows` and `remove` call them.
        on_top: keep what is active below; else the new adapters are the only active ones.
        head: the adapters have a trained head of their own.

    Returns:
        Names of the parameters that learn, as in `named_parameters`.

    Raises:
        Incompatible: for a name in use, or a method that this model cannot take; the model is then as it was.
    """
    here = state(model)
    _check_name(name, here)
    refuse_ranges(model, "a further adapter")
    plan = [(m, m.sites(model), m.selection(model)) for m in methods]  # every refusal happens before the first change
    if not on_top:
        switch(model)
    freeze(model)
    patches = []
    for method, sites, selected in plan:
        share(model, name, method=method)
        patches.append([install(model, name, method=method, site=site) for site in sites])
        select(model, name, key=method.spelling(), parameters=selected)
    if head:
        select(model, name, key=HEAD, parameters=head_parameters(model))
    here.adapters[name] = tuple(methods)
    _activate(model, (*here.active, name))
    for method, own in zip(methods, patches, strict=True):
        method.start(model, own)
    for parameter in _idle(model, methods):
        model.get_parameter(parameter).requires_grad_(False)
    return [n for n, p in model.named_parameters() if p.requires_grad]


def _idle(model: nn.Module, methods: Sequence[Adapter]) -> list[str]:
    """Parameters that no gradient reaches, because an attached adapter goes around them."""
    here = state(model)
    at_work = [*(m for n in here.active for m in here.adapters[n]), *methods, *filter(None, [seams.readout(model)])]
    around = [path for method in at_work for path in method.unused(model)]
    return [n for n, _ in model.named_parameters() if n.startswith(tuple(f"{path}." for path in around))] if around else []


def refuse_ranges(model: nn.Module, what: str) -> None:
    """Refuses a change of the weights between `qat` and the codes, which shall be the very weights of training."""
    found = next((r for _, _, seam in seams_of(model) if (r := seam.ranges())), None)
    if found is not None:
        raise Incompatible(f"{found.method!r} has learned step sizes for the weights as they are, which {what} would change; pack them first, or leave it out")


def _check_name(name: str, here: State) -> None:
    if name in here.adapters:
        raise Incompatible(f"adapter {name!r} is on the model already; remove it first or choose another name")
    if not name.isidentifier() or hasattr(Seam(), name) or name in seams.OWN:
        raise Incompatible(f"adapter name {name!r}: a name is letters, digits and underscores, and none of torch's own, nor {one_of(seams.OWN)}")


def share(model: nn.Module, name: str, *, method: Adapter) -> None:
    """Puts what the patches of a method share at the seam of the whole model, where no dropped layer takes it along."""
    if seams.shared_by(model, name, method=method):
        return
    with _for_values(model):
        module = method.shared(model)
    if module is not None:
        module.method = method
        module.to(next(model.parameters()).device).train(model.training)
        seams.open_seam(model, working=False).add(name, f"{method.spelling()}_shared", patch=module)


def install(model: nn.Module, name: str, *, method: Adapter, site: Site, key: str | None = None) -> Patch:
    """Puts one patch of a method at one site; `attach` does it for all, and checks first."""
    with _for_values(model):
        patch = method.patch(site)
    module = model.get_submodule(site.path)
    patch.method = method
    patch.borrow(seams.shared_by(model, name, method=method))
    patch.to(next(model.parameters()).device).train(module.training)
    seams.open_seam(module, working=True).add(name, key or method.spelling(), patch=patch)
    waits = seams.capture_key(site)
    if waits:
        source = seams.open_seam(model.get_submodule(site.source), working=True)
        source.captures = tuple(dict.fromkeys((*source.captures, (name, waits))))
    return patch


def _for_values(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Makes modules without values for a model without values; else on the CPU, so that first values are the same on every device."""
    device = next(model.parameters()).device
    return device if device.type == "meta" else contextlib.nullcontext()


def select(model: nn.Module, name: str, *, key: str, parameters: Sequence[str]) -> None:
    """Lets existing parameters learn under an adapter's name; one that it has already is left alone."""
    by_module: dict[str, list[str]] = {}
    for parameter in parameters:
        module, _, tensor = parameter.rpartition(".")
        by_module.setdefault(module, []).append(tensor)
    for path, tensors in by_module.items():
        module = model.get_submodule(path)
        seam = seams.open_seam(module, working=False)
        taken = {n for a, _, p in seam.patches([name]) if isinstance(p, Selected) for n in p.names}
        tensors = [t for t in tensors if t not in taken]
        for tensor in tensors:
            getattr(module, tensor).requires_grad_(True)
        if tensors:
            seam.add(name, key, patch=Selected(module, tensors))


def head_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of the task's head; empty where the model has none."""
    inside = tuple(f"{path}." for path in anatomy.head(model))
    return [n for n, _ in model.named_parameters() if n.startswith(inside) and f".{CHILD}." not in n] if inside else []


def newest(model: nn.Module) -> tuple[Adapter, ...]:
    """The active adapters that were attached last, which are those that learn; none on a plain model."""
    here = state(model)
    return tuple(m for m in here.adapters[here.active[-1]] if isinstance(m, Adapter)) if here.active else ()


def freeze(model: nn.Module) -> None:
    """Nothing learns any more; what is attached stays attached and active."""
    model.requires_grad_(False)


def thaw(model: nn.Module) -> None:
    """Lets what is active learn again, and nothing else: a loaded model is frozen."""
    freeze(model)
    for _, module, seam in seams_of(model):
        here = [p for _, _, p in (*seam.patches(state(model).active), *seam.shared(state(model).active))]
        for parameter in (t for p in here for t in ([getattr(module, n) for n in p.names] if isinstance(p, Selected) else p.parameters())):
            parameter.requires_grad_(True)
    for name in _idle(model, ()):
        model.get_parameter(name).requires_grad_(False)


def switch(model: nn.Module, *names: str) -> None:
    """Makes these adapters the active ones, in the order of attachment; with no name, the model is its backbone.

    Raises:
        Incompatible: for a name that is not attached.
    """
    here = state(model)
    for name in names:
        _known(name, here)
    _activate(model, tuple(n for n in here.adapters if n in names))


def _known(name: str, here: State) -> None:
    if name not in here.adapters:
        have = one_of(here.adapters) if here.adapters else "none"
        raise Incompatible(f"adapter {name!r} is not on the model{did_you_mean(name, here.adapters)}; attached: {have}")


def _activate(model: nn.Module, names: tuple[str, ...]) -> None:
    here = state(model)
    for _, module, seam in seams_of(model):
        present = [a for a in here.adapters if a in seam._modules]
        for adapter in reversed([a for a in present if a in seam.active]):  # last on, first off
            _swap(module, seam, adapter)
        for adapter in [a for a in present if a in names]:
            _swap(module, seam, adapter)
        seam.active = names
        seam.rows = None
    here.active = names
    hub.refresh(model)


def _swap(module: nn.Module, seam: Seam, adapter: str) -> None:
    for _, _, patch in seam.patches([adapter]):
        if isinstance(patch, Selected):
            patch.swap(module)


@contextlib.contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within the block, row i of a batch goes through adapter `names[i]` (None: the backbone).

    Raises:
        Incompatible: for an adapter that does more than add to an output, or trains a head or other weights in place.
    """
    here = state(model)
    refuse_ranges(model, "an adapter for each row")
    before = here.active
    for name in dict.fromkeys(n for n in names if n is not None):
        _known(name, here)
        method = next((m for m in here.adapters[name] if not m.additive), None)
        if method is not None:
            raise Incompatible(f"{method!r} cannot serve single rows of a batch: it does more than add to an output; use switch")
        if any(isinstance(p, Selected) for _, _, seam in seams_of(model) for _, _, p in seam.patches([name])):
            raise Incompatible(
                f"adapter {name!r} trains weights of the model in place (head, norms) and cannot serve single rows; attach it without them, or use switch"
            )
    switch(model)
    try:
        for _, _, seam in seams_of(model):
            seam.rows = tuple(names)
        yield model
    finally:
        switch(model, *before)


def remove(model: nn.Module, name: str) -> None:
    """Takes adapters off; every tensor they selected has its original value again.

    Raises:
        Incompatible: for a name that is not attached.
    """
    here = state(model)
    _known(name, here)
    active = tuple(n for n in here.active if n != name)
    _activate(model, ())
    del here.adapters[name]
    for _, module, seam in seams_of(model):
        seam.captures = tuple((a, k) for a, k in seam.captures if a != name)
        if name in seam._modules:
            del seam._modules[name]
        seams.close_if_empty(module)
    _activate(model, active)


def settle(model: nn.Module) -> None:
    """Ends a phase: trained values are the model's own from here on, and patches give up their training form.

    The originals of selected parameters and the memory of a merge are dropped.

    Raises:
        Incompatible: for an adapter that is not active and has trained weights of its own, which would no longer fit.
    """
    here = state(model)
    idle = [n for n in here.adapters if n not in here.active]
    for _, _, seam in seams_of(model):
        for adapter, key, patch in seam.patches(idle):
            if isinstance(patch, Selected) and key != HEAD:
                raise Incompatible(
                    f"adapter {adapter!r} is not active and has weights of its own, which a change of the model would outdate; remove it first"
                )
    forget(model)
    seams.settle(model, (*here.active, seams.RANGES))
    for _, _, seam in seams_of(model):
        for adapter, key, patch in list(seam.patches(here.active)):
            if isinstance(patch, Selected):
                del seam._modules[adapter]._modules[key]
    seams.sweep(model)
    hub.refresh(model)


def replace(model: nn.Module, made: Iterable[tuple[str, nn.Module]]) -> None:
    """Puts each new module in the place of the one at its path; a seam moves over to it.

    Args:
        model: stays the same object.
        made: (path, new module), taken one by one: a generator's next is made when what the one before replaced may have gone.

    Raises:
        Incompatible: for another kind of module where a patch computes with the weight of the old one.
    """
    for path, new in made:
        _replace(model, path, new)
    hub.refresh(model)


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    old = model.get_submodule(path)
    seam = seams.seam_of(old)
    if seam is not None:
        if not isinstance(new, seams.base_of(old)) and any(p.reweighs for _, _, p in seam.patches()):
            raise Incompatible(f"a patch at {path} computes with its weight, which {type(new).__name__} keeps in another form; merge first")
        works = isinstance(old, seams.Adapted)
        seams.close_seam(old)
        seams.hand_over(seam, new, working=works)
    if "resized" in old.__dict__:  # the sizes that the config does not say
        new.__dict__["resized"] = {**old.__dict__["resized"], **new.__dict__.get("resized", {})}
    new.train(old.training)
    setattr(model.get_submodule(parent), child, new)


def count(model: nn.Module) -> tuple[int, int]:
    """(parameters that learn without the head, parameters of the head that learn); works on the meta device."""
    head = in_head(model)
    kept = {f"{path}.weight": m.resized["kept"] for path, m in model.named_modules() if getattr(m, "paretune_sparse", False)}  # zeros do not learn
    sizes = [(head(n), kept.get(n, p.numel())) for n, p in model.named_parameters() if p.requires_grad]
    return sum(size for inside, size in sizes if not inside), sum(size for inside, size in sizes if inside)


def in_head(model: nn.Module) -> Callable[[str], bool]:
    """Tells of a parameter's name whether it belongs to the task's head."""
    head = tuple(f"{path}." for path in anatomy.head(model))
    return lambda name: bool(head) and name.startswith(head)


def moved(model: nn.Module, prefixes: dict[str, str]) -> None:
    """Tells the patches that modules have new paths (old prefix -> new prefix), after layers were dropped."""

    def new(path: str) -> str:
        prefix = next((p for p in prefixes if f"{path}.".startswith(p)), None)
        return path if prefix is None else (prefixes[prefix] + path[len(prefix) :]).removesuffix(".")

    for _, _, seam in seams_of(model):
        seam.captures = tuple((a, ">".join(map(new, key.split(">")))) for a, key in seam.captures)
        for _, _, patch in seam.patches():
            if patch.site is not None:
                source = None if patch.site.source is None else new(patch.site.source)
                patch.site = dataclasses.replace(patch.site, path=new(patch.site.path), source=source)
