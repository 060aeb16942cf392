"""Folding adapters into the weights of the backbone, and bringing the very tensors of before back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paretune import hub, seams
from paretune.errors import Incompatible, all_of, one_of
from paretune.seams import Seam, Selected, State, seams_of, state


def merge(model: nn.Module) -> None:
    """Writes all active adapters into the backbone's weights, computed in fp32; `unmerge` brings the originals back.

    Raises:
        Incompatible: where nothing is attached, or an adapter cannot be folded; the model is then as it was.
    """
    check(model)
    packed = next((path for path, module, _ in seams_of(model) if hasattr(module, "dequantized")), None)
    if packed is not None:
        raise Incompatible(f"merge: {packed} holds codes, to which nothing can be added; shrink(model, Merge()) dequantizes them first and leaves bf16")
    here = state(model)
    here.before = (dict(here.adapters), here.active)
    for path, module, seam in seams_of(model):
        _fold(here, path, module, seam)
        here.unmerged[path] = seam
        seams.close_seam(module)
        seams.keep_own(module, seam)
    here.adapters, here.active = {}, ()
    hub.refresh(model)


def attempt(model: nn.Module) -> tuple[str, ...]:
    """Merges what is attached, where that loses nothing; else the model is as it was. Says which in a sentence, or nothing where there is nothing to fold.

    Nothing is lost where `merge` takes all of it and the weights are fp32, so that a sum is not rounded to fewer bits.
    """
    of_patches = [p.method for _, _, seam in seams_of(model) for a, _, p in seam.patches() if not isinstance(p, Selected) and a not in seams.OWN]
    if not of_patches:
        return ()
    methods = all_of(dict.fromkeys(map(repr, of_patches)))
    try:
        check(model)
        _refuse_narrow(model)
        merge(model)
    except Incompatible as error:
        return (f"{methods}: left apart, as trained, since {str(error).removeprefix('merge: ').partition(';')[0]}",)
    return (f"{methods}: merged into the weights, summed up in fp32",)


def _refuse_narrow(model: nn.Module) -> None:
    narrow = next((n for n, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    if narrow is not None:
        raise Incompatible(f"merge: {narrow} is in {str(model.get_parameter(narrow).dtype).removeprefix('torch.')}, to which a sum would be rounded")


def check(model: nn.Module) -> None:
    """Raises what `merge` raises, but for packed weights, and changes nothing."""
    here = state(model)
    if not here.active:
        raise Incompatible("merge: no adapter is active on the model; attach one and train it first")
    idle = [n for n in here.adapters if n not in here.active]
    if idle:
        raise Incompatible(f"merge folds all attached adapters, and {one_of(idle)} is not active; switch it on or remove it")
    for methods in here.adapters.values():
        for method in methods:
            if not method.foldable:
                raise Incompatible(f"merge: {method!r} is no change of the weights and cannot be folded; leave merge out, the model saves with it")
    _refuse_tied(model)


def _refuse_tied(model: nn.Module) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path, module, seam in seams_of(model):
        if any(not isinstance(p, Selected) and not p.wraps for _, _, p in seam.patches()) and isinstance(getattr(module, "weight", None), Tensor):
            if getattr(module, "paretune_fixed", False):
                raise Incompatible(f"merge: {module.packed_by} has fixed the form of the weight of {path}, which a sum would not keep; leave merge out")
            shared = owners.get(id(module.weight), [])
            if len(shared) > 1:
                raise Incompatible(f"merge: {path}.weight is tied to {one_of(n for n in shared if not n.startswith(path + '.'))}; merging would change both")


@torch.no_grad()
def _fold(here: State, path: str, module: nn.Module, seam: Seam) -> None:
    patches = [p for adapter, _, p in seam.patches() if not isinstance(p, Selected) and adapter not in seams.OWN]
    for tensor, value in (seams.effective(module, patches) if patches else {}).items():
        parameter = getattr(module, tensor)
        here.merged.append((path, tensor, parameter.data))
        parameter.data = value


def unmerge(model: nn.Module) -> None:
    """Undoes `merge` exactly: the weights of before, and the adapters attached and active.

    Raises:
        Incompatible: where no merge can be undone (none was made, or the model was saved and loaded since).
    """
    here = state(model)
    if here.before is None:
        raise Incompatible("unmerge: no merge of this model is remembered; load the backbone and the adapter again")
    for path, tensor, original in here.merged:
        getattr(model.get_submodule(path), tensor).data = original
    for path, seam in here.unmerged.items():
        module = model.get_submodule(path)
        works = bool(seam.captures) or any(not isinstance(p, Selected) for _, _, p in seam.patches())
        seams.hand_over(seam, module, working=works)
    here.adapters, here.active = here.before
    here.merged, here.unmerged, here.before = [], {}, None
    hub.refresh(model)


def forget(model: nn.Module) -> None:
    """Gives up the memory by which `unmerge` works."""
    here = state(model)
    here.merged, here.unmerged, here.before = [], {}, None
