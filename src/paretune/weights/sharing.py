"""Layers that share one set of parameters: trained as one, stored once, and tied again when they are loaded."""

from __future__ import annotations

from torch import nn

from paretune.errors import Incompatible
from paretune.roles import Method, Trail
from paretune.seams import CHILD


def tie(leader: nn.Module, follower: nn.Module) -> None:
    """Lets one layer compute with the parameters of another of its kind; adapters on it stay its own."""
    modules = dict(follower.named_modules())
    for name, parameter in leader.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if CHILD not in name.split(".") and leaf in getattr(modules.get(owner), "_parameters", ()):  # T5's first layer has a table that the others read there
            modules[owner]._parameters[leaf] = parameter
    for layer in (leader, follower):
        layer.__dict__["shares_parameters"] = True


def sever(follower: nn.Module) -> None:
    """Takes the parameters off a freshly built layer that will be tied: none is loaded or initialized for it."""
    for name, module in follower.named_modules():
        module._is_hf_initialized = True  # transformers' mark, by which it leaves a module alone
        if CHILD not in name.split("."):
            for leaf in module._parameters:
                module._parameters[leaf] = None


def shared_layers(model: nn.Module) -> dict[str, str]:
    """path of each layer that computes with another's parameters -> path of the first that has them."""
    first: dict[int, str] = {}
    found = {}
    for path, module in model.named_modules():
        if "shares_parameters" in module.__dict__:
            key = id(next(module.parameters()))
            if key in first:
                found[path] = first[key]
            else:
                first[key] = path
    return found


def declare(model: nn.Module) -> None:
    """Tells transformers, by the attribute it looks for, which tensors it need not save twice."""
    found = shared_layers(model)
    for path, module in model.named_modules():
        if "shares_parameters" in module.__dict__:
            names = [name for name, _ in module.named_parameters() if CHILD not in name.split(".")]
            module.__dict__["_tied_weights_keys"] = {name.replace(".", r"\.") + "$": name for name in names} if path in found else {}


def require_unshared(method: Method, trail: Trail) -> None:
    """Refuses a method that would give each layer codes of its own, behind one that let layers share their parameters."""
    if trail.shared:
        raise Incompatible(f"{method!r}: {trail.shared} left layers that share their parameters, and codes cannot be shared; use cast, or leave {trail.shared} out")


def require_own_layers(model: nn.Module, *, by: Method) -> None:
    """Refuses, on a model, what `require_unshared` refuses in a recipe."""
    follower = next(iter(shared_layers(model)), None)
    if follower is not None:
        raise Incompatible(f"{by!r}: {follower} shares its parameters with another layer, and codes cannot be shared; use cast, or leave share_layers out")
