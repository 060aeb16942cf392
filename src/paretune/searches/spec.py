"""What a search is, as another process needs it to take part: it is kept beside the proposals, in the study."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from paretune import store
from paretune.options import Metering, Options, Training

IDENTITY = ("space", "costs", "backbones", "weights_sha256", "task_fingerprint", "seed")  # a search with other ones is another search
FILES = ("source", "validation", "test")  # of the arguments of `pt.task`


@dataclasses.dataclass(frozen=True)
class Spec:
    """What was asked, and of which data and backbones; plain values, so that it can be written down."""

    space: str
    budget: str | None
    under: str | None
    costs: tuple[str, ...]  # what the score is set against
    backbones: tuple[str, ...]
    weights_sha256: tuple[str, ...]
    build: dict[str, Any]  # the arguments of `pt.task`
    task_fingerprint: str
    seed: int
    trials: int | None
    confirm: int
    training: dict[str, Any]
    metering: dict[str, Any]
    home: str  # the machine and results folder in which it began and ends
    account: str | None  # the file of its account, where that is not in the study's database
    starts: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # draws that are tried first, from another search

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this search."""
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in IDENTITY}

    @property
    def id(self) -> str:
        """A name of the identity."""
        return store.identity(self.identity)

    def options(self, options: Options) -> Options:
        """The search's own training and metering on another machine, whose processor and progress are as given."""
        return dataclasses.replace(options, training=Training(**self.training), metering=Metering(**self.metering))


def kept(options: Options) -> dict[str, Any]:
    """The part of the options that all workers share."""
    return {
        "seed": options.searching.seed, "trials": options.searching.trials, "confirm": options.searching.confirm,
        "training": dataclasses.asdict(options.training), "metering": dataclasses.asdict(dataclasses.replace(options.metering, log=None)),
    }  # fmt: skip


def portable(build: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `pt.task` with files by their whole paths, so that a process in another folder finds them."""
    return {name: str(Path(value).absolute()) if name in FILES and value and Path(value).exists() else value for name, value in build.items()}
