"""Readouts of a head: the embeddings that its last map reads, and class vectors as rows of that map's own weight.

    z = what the head's last map reads (D),   logits = W z + b,   row k of W (C, D) and b (C) from the mean of class k's z

So a later phase may tune the vectors, and a class is added as a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune import anatomy, hub, processors, seams, surgery, training
from paretune.anatomy import Site
from paretune.errors import DataError, Incompatible
from paretune.methods.adapters.head import Features, Head
from paretune.roles import Examples, Readout
from paretune.seams import READOUT, Patch
from paretune.tasks import Task
from paretune.tasks.kinds.base import head_config, pad, tokenize


class ClassVectors(Readout):
    """What `prototypes` and `imprint` share: a method says how a class's mean embedding becomes its vector."""

    unit: ClassVar[bool] = False  # are embeddings brought to length one before they are averaged?
    zero_shot = False  # are the vectors made without training rows?
    pooling: str

    @property
    def reads_every_row(self) -> bool:
        return not self.zero_shot

    def vectors(self, means: Tensor) -> tuple[Tensor, Tensor | None]:
        """(W (C, D), b (C) or None) from the classes' mean embeddings (C, D)."""
        raise AssertionError(f"{self!r} does not say what a class vector is")

    def sites(self, model: nn.Module) -> list[Site]:
        return Head(pooling=self.pooling).sites(model)

    def unused(self, model: nn.Module) -> list[str]:
        return Head(pooling=self.pooling).unused(model)

    def patch(self, site: Site) -> Patch:
        return Offset(site) if site.place == "offset" else Features(site, "last")

    def check(self, model: nn.Module, examples: Examples) -> None:
        """Refuses what cannot be fitted, before anything changes."""
        task, path = examples.task, last_map(model)
        if not task.kind.one_label:
            raise Incompatible(f"{self!r}: a class vector stands for the one label of a row, and {task.name} is a {task.kind.name} task")
        if any(adapter != READOUT for adapter, _, _ in patches(model, path)):
            raise Incompatible(f"{self!r}: {path} is adapted itself, and so reads no plain embedding; leave that adapter's wider features out")
        absent = set() if self.zero_shot else set(task.labels) - set(task.train.column(task.columns["label"]))
        if absent:
            raise DataError(f"{task.name}: the class {min(absent)!r} has no training row, so it has no mean; give it one or more")

    def means(self, model: nn.Module, examples: Examples) -> tuple[Tensor, int]:
        """(the classes' mean embeddings (C, D), how many training examples they are of)."""
        task = examples.task
        classes = torch.tensor([task.labels.index(label) for label in task.train.column(task.columns["label"])])
        z = embed(model, task, rows=task.train, unit=self.unit)
        one = F.one_hot(classes, len(task.labels)).to(z)  # (N, C)
        return one.T @ z / one.sum(0)[:, None], len(z)  # c_k = mean of its z

    def fit(self, model: nn.Module, examples: Examples) -> int:
        self.check(model, examples)
        sites = self.sites(model)
        install(model, self, sites=sites)
        means, n = self.means(model, examples)
        weight, bias = self.vectors(means)
        write(model, weight, bias=bias, readout=self)
        return n


class Offset(Patch):
    """A bias (C) behind a map that has none of its own."""

    wraps = True

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) + self.bias


def install(model: nn.Module, readout: Readout, *, sites: Sequence[Site]) -> None:
    """Puts a readout's patches on a model, in the place of an earlier readout's. Its values are its own from here on, and nothing learns."""
    surgery.settle(model)
    surgery.freeze(model)
    for _, module, seam in seams.seams_of(model):
        if READOUT in seam._modules:
            del seam._modules[READOUT]
            seams.close_if_empty(module)
    for site in sites:
        surgery.install(model, READOUT, method=readout, site=site)
    hub.refresh(model)


def last_map(model: nn.Module) -> str:
    """The path of the head's last linear map, from which the logits come.

    Raises:
        Incompatible: for a model without a task's head.
    """
    inside = f"{model.base_model_prefix}."  # a pooler inside the base model
    outside = [path for path in anatomy.head(model) if not path.startswith(inside)]
    maps = [f"{path}.{n}".rstrip(".") for path in outside for n, m in model.get_submodule(path).named_modules() if anatomy.is_linear(m)]
    if not maps:
        raise Incompatible(f"{type(model).__name__} has no task head whose weights could be class vectors; load it for a classification task")
    return maps[-1]


def patches(model: nn.Module, path: str) -> list[tuple[str, str, Patch]]:
    """(adapter, method key, patch) of what works at a module."""
    seam = seams.seam_of(model.get_submodule(path))
    return [] if seam is None else [(a, k, p) for a, k, p in seam.patches() if not isinstance(p, seams.Selected)]


def embed(model: nn.Module, task: Task, *, rows: Any, unit: bool = False) -> Tensor:
    """The embeddings z (N, D) of rows, fp32; with `unit` each z / |z|."""
    with seams.bypassed(model, last_map(model)):  # so the logits are z
        found = training.read(model, task, rows=rows, answers=lambda _, outputs: list(outputs.logits.float()))
    z = torch.stack(found)
    return F.normalize(z, dim=-1) if unit else z


def write(model: nn.Module, weight: Tensor, *, bias: Tensor | None, readout: Readout) -> None:
    """Makes W (C, D) and b (C) those of the head's last map; b stands in a patch where the map has none."""
    path = last_map(model)
    old = model.get_submodule(path)
    own = getattr(old, "bias", None) is not None
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=own, device=weight.device, dtype=model.dtype)
    with torch.no_grad():
        new.weight.copy_(weight)
        if own:
            new.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    surgery.replace(model, [(path, new.requires_grad_(old.weight.requires_grad))])
    if bias is not None and not own:
        offset = _offset(model, path) or surgery.install(model, READOUT, method=readout, site=Site(place="offset", path=path, out_features=len(bias)))
        offset.hold({"bias": bias.to(model.dtype)})
    hub.refresh(model)


def _offset(model: nn.Module, path: str) -> Patch | None:
    return next((p for _, _, p in patches(model, path) if isinstance(p, Offset)), None)


def add_class(model: nn.Module, name: str, *, texts: Sequence[str], readout: ClassVectors | None = None) -> nn.Module:
    """Teaches a model one more class from a few texts; the scores of the others stay as they are.

    Args:
        model: with a fitted `prototypes` or `imprint`.
        name: the new label; it becomes the last one of `model.config.id2label`.
        texts: examples of the class, or descriptions of it where the other classes come from descriptions.
        readout: how a class vector is made, for a plain model whose folder does not say.

    Raises:
        Incompatible: for a model without such a readout.
        DataError: for a known name, or no texts.
    """
    readout = readout or seams.readout(model)
    if not isinstance(readout, ClassVectors):
        raise Incompatible("add_class: the model has no readout with class vectors; fit one first, as in pt.shrink(model, pt.Prototypes(), task)")
    labels = [model.config.id2label[i] for i in range(len(model.config.id2label))]
    if name in labels:
        raise DataError(f"add_class: there is a class {name!r} already, beside {len(labels) - 1} others; give a new name")
    if isinstance(texts, str) or not texts:
        raise DataError(f"add_class: a list of one or more texts was expected for the class {name!r}, not {texts!r}")
    old = model.get_submodule(last_map(model))
    offset = _offset(model, last_map(model))
    before = getattr(old, "bias", None) if offset is None else offset.bias
    weight, bias = readout.vectors(_mean(model, texts, unit=readout.unit))
    _add_beneath(model, readout, texts=texts)
    write(model, _with(old.weight, weight), bias=bias if before is None else _with(before, bias), readout=readout)
    for field, value in head_config([*labels, name]).items():
        setattr(model.config, field, value)
    model.num_labels = len(labels) + 1
    return model


def _add_beneath(model: nn.Module, readout: ClassVectors, *, texts: Sequence[str]) -> None:
    """Gives the new class a row in the values, too, that the head's last map has with other adapters at work: the vector by what those compute."""
    seam, active = seams.seam_of(model.get_submodule(last_map(model))), surgery.state(model).active
    kept = [(a, p) for a, _, p in seam.patches() if isinstance(p, seams.Selected)] if seam is not None else []
    for adapter, patch in kept:
        surgery.switch(model, *(active[: active.index(adapter)] if adapter in active else (adapter,)))
        vectors = dict(zip(("weight", "bias"), readout.vectors(_mean(model, texts, unit=readout.unit)), strict=True))
        surgery.switch(model, *active)
        for name in patch.names:
            patch._buffers[name] = _with(patch._buffers[name], vectors[name])


def _with(values: Tensor, row: Tensor | None) -> Tensor:
    """Values by class with those of one more; zeros where it has none."""
    return torch.cat([values.detach(), values.new_zeros(1, *values.shape[1:]) if row is None else row.to(values)])


def _mean(model: nn.Module, texts: Sequence[str], *, unit: bool) -> Tensor:
    """The mean embedding (1, D) of texts."""
    tokenizer = processors.get(model)
    batch = pad(tokenize(tokenizer, [list(texts)], max_length=training.max_length(model)), tokenizer)
    with torch.no_grad(), seams.bypassed(model, last_map(model)):
        z = model.eval()(**{k: v.to(model.device) for k, v in batch.items()}).logits.float()
    return (F.normalize(z, dim=-1) if unit else z).mean(0, keepdim=True)
