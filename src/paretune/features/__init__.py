"""Frozen features: what nothing that learns has touched is computed once per example, kept, and read in later epochs.

    logits = g(f(x)), g learns:   z = f(x) once, without dropout;   every later pass computes g(z)

Where f ends is said in `cuts.py`. The features lie on shelves in the folder of the phase's work, in bf16 where the phase computes in bf16, and are
found again by a training that was killed; without a folder they are in memory.

Shapes: B rows, T tokens, D features.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from paretune import processors, seams, store
from paretune.errors import StoreError
from paretune.events import Events
from paretune.features import cuts
from paretune.features.cuts import Cut
from paretune.features.shelves import Shelf, nbytes
from paretune.meters import flops
from paretune.step import probe
from paretune.units import show

if TYPE_CHECKING:
    from paretune.training import Loop

FOLDER = "features"  # in the folder of a phase's work
SHARE = 0.5  # of the free memory may be taken where there is no folder


class Split:
    """A split's encodings, with what is kept of them; without a cut nothing is, and every pass is a whole one."""

    def __init__(self, model: nn.Module, encodings: list[dict[str, Any]], cut: Cut | None = None) -> None:
        self.model, self.encodings, self.cut = model, encodings, cut
        self.shelf: Shelf | None = None
        if cut is not None:
            self.lengths = cut.lengths(encodings)
            self.most = self.lengths if cut.positions == "all" else [1] * len(encodings)  # rows of each example
            self.frozen, self.around = cuts.frozen(model, cut), cuts.frozen(model, cut, around=True)
            self.parameters = list(model.parameters())
            self.stamp = self._stamp()

    def _stamp(self) -> list[Any]:
        """Which parameters learn, and of each other one a number that changes with its values."""
        return [True if p.requires_grad else p._version for p in self.parameters]

    @contextlib.contextmanager
    def passing(self, indices: Sequence[int], batch: dict[str, Tensor]) -> Iterator[None]:
        """Within the block the model is called on a batch of these examples: f has no dropout, and is not computed where it is kept; else its output is kept.

        Once something has changed what was frozen, passes are whole, as without a cut.
        """
        if self.cut is not None and self._stamp() != self.stamp:
            self.cut = self.shelf = None
        if self.cut is None:
            yield
            return
        known = self.shelf is not None and self.shelf.holds(indices)
        with contextlib.ExitStack() as undo:
            undo.enter_context(cuts.without_dropout(self.around if known else self.frozen))
            if known:
                undo.enter_context(cuts.given(self.model, self.cut, z=self._read(indices, self.tokens(batch))))
            elif self.shelf is not None:
                undo.enter_context(cuts.answered(self.model.get_submodule(self.cut.path), functools.partial(self._keep, indices)))
            yield

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """T of a batch, padding included."""
        return batch["input_ids"].shape[1] if "input_ids" in batch else max(self.lengths)

    def _read(self, indices: Sequence[int], tokens: int) -> Tensor:
        """z (B, T, D) as it is kept."""
        assert self.cut is not None and self.shelf is not None
        kept = self.shelf.stacked(indices).to(self.parameters[0].device)
        return self.cut.spread(kept, [self.lengths[i] for i in indices], tokens=tokens)

    def _keep(self, indices: Sequence[int], compute: Callable[[], Any]) -> Any:
        """Keeps what the module answers; the pass goes on with what was kept of it, as later ones will."""
        assert self.cut is not None and self.shelf is not None
        z = cuts.states(compute())
        rows = self.cut.rows(z, [self.lengths[i] for i in indices])
        for i, matrix in zip(indices, rows.split([self.most[i] for i in indices]), strict=True):
            self.shelf.put(i, matrix)
        return self.cut.answer(self._read(indices, z.shape[1]))


class Features:
    """What one training phase keeps: of its training examples, and of those that validation watches."""

    def __init__(self, loop: Loop, watched: list[dict[str, Any]]) -> None:
        self.loop, self.cut = loop, cuts.found(loop) if allowed(loop) else None
        self.train, self.watched = (Split(loop.model, encodings, self.cut) for encodings in (loop.encodings, watched))
        if self.cut is None:
            return
        quiet = ", without dropout (`schedule(cache=False)` keeps it)" if any(probe.dropouts(cuts.frozen(loop.model, self.cut))) else ""
        again = loop.schedule.epochs > 1 and loop.accelerator.num_processes == 1  # will what is kept be read?
        how = self._shelve(self.cut, torch.bfloat16 if loop.pace.dtype == "bf16" else torch.float32) if again else "in every epoch"
        if loop.settings.report and (again or quiet):
            loop.settings.report({"said": f"what is frozen below all that learns is computed {how}{quiet}"})

    def _shelve(self, cut: Cut, dtype: torch.dtype) -> str:
        """Makes room for what is kept, where there is any; says how often f is computed, and what it takes or would take to keep it."""
        splits, folder = {"train": self.train, "watched": self.watched}, self.loop.settings.folder
        size = sum(nbytes(split.most, width=cut.width, dtype=dtype) for split in splits.values())
        folder = folder and folder / FOLDER / self._name(cut, dtype)
        refused = _refused(folder, size)
        if refused is not None:
            return f"in every epoch (keeping it takes {show(size, 'B')}: {refused})"
        for name, split in splits.items():
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            split.shelf = Shelf(folder and folder / name, split.most, width=cut.width, dtype=dtype)
        return f"once per example, and kept ({show(size, 'B')})"

    def _name(self, cut: Cut, dtype: torch.dtype) -> str:
        """Names all that decides the features: weights, data, tokenizer, truncation, number format, attention kernel, depth."""
        model, here, digest = self.loop.model, seams.state(self.loop.model), hashlib.sha256()
        for name, tensor in model.state_dict().items():
            if name not in self.loop.parameters:
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return store.identity({
            "frozen": digest.hexdigest(), "data": self.loop.task.fingerprint, "processor": processors.fingerprint(processors.get(model)),
            "lengths": [self.train.lengths, self.watched.lengths], "dtype": str(dtype), "pace": [self.loop.pace.dtype, self.loop.pace.attention],
            "cut": cut.path, "positions": cut.positions, "config": model.config.to_json_string(), "attached": repr((here.adapters, here.active)),
            "readout": repr(seams.readout(model)),
        })  # fmt: skip

    def flops(self) -> float | None:
        """FLOPs, at most 0, that training passes did not take, those before a kill among them, by the median length; None where they cannot be counted."""
        shelf, model, inputs = self.train.shelf, self.loop.model, self.loop.task.kind.inputs
        if shelf is None or self.cut is None:
            return 0.0
        order = sorted(range(len(self.train.encodings)), key=self.loop.lengths.__getitem__)
        middle = order[max(0, len(order) // 2 - 4) : len(order) // 2 + 4]
        batch = self.loop.collate([self.train.encodings[i] for i in middle])
        whole = flops.forward(lambda: model(**inputs(batch)), model).value
        z = torch.zeros(len(middle), self.train.tokens(batch), self.cut.width, dtype=model.dtype, device=self.loop.accelerator.device)
        with cuts.given(model, self.cut, z=z):
            rest = flops.forward(lambda: model(**inputs(batch)), model).value
        return None if whole is None else -(whole - (rest or 0.0)) / len(middle) * max(0, self.loop.examples - shelf.count())


def clear(folder: Path | None) -> None:
    """Removes what a finished phase kept."""
    if folder is not None:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _refused(folder: Path | None, size: int) -> str | None:
    """Why so many bytes cannot be kept: no room on the disk, or, without a folder, in memory."""
    if folder is None:
        free = psutil.virtual_memory().available
        return None if size < SHARE * free else f"that is more than half of the {show(free, 'B')} of free memory"
    try:
        store.require_space(folder, 0.0 if folder.exists() else size / 1e6)
    except StoreError as error:
        return str(error)
    return None


def allowed(loop: Loop) -> bool:
    """May passes be cut? Not where the model is in shards, nor where a readout ranks answers, by many passes for an example, nor where a modifier
    changes the inputs or reads the pass for a loss of its own.
    """
    reader = seams.readout(loop.model)
    looked_into = any(type(e).inputs is not Events.inputs or type(e).loss is not Events.loss for e in loop.events if not e.looks_on)
    return loop.schedule.cache and not loop.settings.shard and not looked_into and not (reader is not None and reader.speaks)
