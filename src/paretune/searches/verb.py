"""From what a user asks of a search to what was found: the study, the journal and the searcher over one results folder; and workers that take part."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from paretune import backbones, runs, store, tasks
from paretune.errors import BackboneError, DataError, StoreError
from paretune.methods.modifiers.schedule import Schedule
from paretune.options import Options
from paretune.pareto import budgets
from paretune.searches import aims as aiming
from paretune.searches import halving, journal, on_ray, space, spec, transfer
from paretune.searches.aims import Aims
from paretune.searches.bench import Live
from paretune.searches.found import Found
from paretune.searches.journal import Entry, Journal
from paretune.searches.searcher import Effort, Searcher
from paretune.searches.space import Space
from paretune.searches.spec import Spec
from paretune.searches.study import Study, the_only
from paretune.tasks import Task

ASKED, STUDY = "search.json", "study.db"  # in the results folder


def searched(task: Task, *, backbone: str, asked: dict[str, str | None], out: Path, resume: bool, options: Options) -> Found:
    """Searches until budget, trials or space end, and reads what was found; see `flow.search`.

    Args:
        asked: `space`, `budget` and `under` as texts.
    """
    if options.training.max_train:
        task = task.subset(options.training.max_train, seed=0)
    wanted = _spec(task, backbone=backbone, asked=asked, out=out, options=options)
    runs.set_threads(options)
    _effort(wanted), _space(wanted)
    if _limits_changed(out, wanted, resume=resume):
        return Found(Journal(out / journal.FILE).entries(), _aims(task, wanted), _rungs(task, options)[-1], out)
    if options.searching.earlier:
        wanted = dataclasses.replace(wanted, starts=_starts(out, options.searching.earlier, wanted=wanted, task=task))
    _remember(out, wanted, resume=resume)
    url = options.searching.storage or f"sqlite:///{(out / STUDY).absolute()}"
    searcher = _searcher(wanted, task, out=out, url=url, options=options)
    searcher.study.remember(dataclasses.asdict(wanted), shared=wanted.account is None)
    if options.searching.on == "ray":
        on_ray.trials(url, study=searcher.study.name, out=out, compute=options.compute)
    searcher.run()
    if wanted.account is None:  # a copy of the account, for who reads the folder alone
        searcher.journal.copy(out / journal.FILE)
    return Found(searcher.journal.entries(), searcher.aims, searcher.rungs[-1], out)


@dataclasses.dataclass(frozen=True)
class Here:
    """Where a worker finds what the search names; None: where the search says."""

    data: str | None = None
    backbone: str | None = None


def joined(url: str, *, study: str | None, here: Here, out: Path, options: Options) -> list[Entry]:
    """Takes part in a search that was begun elsewhere, until it leaves no trial; the trials of this process.

    Args:
        study: its name, where the storage holds several.
        out: a results folder of this machine: the search's own, or another one.
        options: `compute` and `report`; the others are the search's.

    Raises:
        StoreError: where there is no such search, or several.
        DataError, BackboneError: where data or backbone here are not those of the search.
    """
    searcher = joining(url, study=study, here=here, out=out, options=options)
    searcher.trials()
    return [e for e in searcher.journal.entries() if e.owner == journal.me()]


def joining(url: str, *, study: str | None, here: Here, out: Path, options: Options) -> Searcher:
    """The searcher of a process that takes part."""
    wanted = Spec(**the_only(url, study))
    build = {**wanted.build, "source": here.data} if here.data else wanted.build
    task = tasks.rebuild({"build": build})
    if task.fingerprint != wanted.task_fingerprint:
        raise DataError(f"{build['source']} is other data here than the search's (its fingerprint is {task.fingerprint[:12]}, not {wanted.task_fingerprint[:12]}); "
                        "copy the data, and name it with --data")  # fmt: skip
    places = here.backbone.split(",") if here.backbone else wanted.backbones
    weights = [backbones.find(place).weights_sha256 for place in places]
    if weights != list(wanted.weights_sha256):
        other = next((place for place, sha256 in zip(places, weights, strict=False) if sha256 not in wanted.weights_sha256), ",".join(places))
        raise BackboneError(f"{other} has other weights here than the search's; copy the backbone, and name it with --backbone, several in the search's order")
    options = wanted.options(options)
    runs.set_threads(options)
    return _searcher(wanted, task, out=out, url=url, options=options, places=places)


def _searcher(wanted: Spec, task: Task, *, out: Path, url: str, options: Options, places: Sequence[str] = ()) -> Searcher:
    found, effort = _aims(task, wanted), _effort(wanted)
    name = f"{task.name} {wanted.id}"
    study = Study(url, name=name, better=found.better, limits=found.bounds, seed=effort.seed)
    if wanted.account is None:
        from paretune.searches.table import TableLines

        account = Journal(TableLines(url, study=name))
    else:
        account = Journal(Path(wanted.account))
    drawn, options = _space(wanted), _in_batches(options, task)
    known = dict(zip(wanted.backbones, places or wanted.backbones, strict=True))
    bench = Live(task, space=drawn, backbones=known, out=out, options=options, costs=found.costs)
    return Searcher(drawn, bench, study=study, journal=account, aims=found, rungs=_rungs(task, options), effort=effort)


def _in_batches(options: Options, task: Task) -> Options:
    """The options with the batch of all training rows, so that a rung with a part of them is trained alike."""
    given = options.training
    sized = Schedule(batch=given.batch, **({"epochs": given.epochs} if given.epochs else {})).sized(task)
    return dataclasses.replace(options, training=dataclasses.replace(given, batch=sized.batch))


def _rungs(task: Task, options: Options) -> tuple[int, ...]:
    given = _in_batches(options, task).training
    return halving.rungs(len(task.train), epochs=given.epochs or Schedule().epochs, batch=given.batch or 1)


def _spec(task: Task, *, backbone: str, asked: dict[str, str | None], out: Path, options: Options) -> Spec:
    known = [backbones.find(name) for name in dict.fromkeys(backbone.split(","))]
    names = tuple(str(Path(found.name).absolute()) if Path(found.name).is_dir() else found.name for found in known)
    account = None if options.searching.storage else str((out / journal.FILE).absolute())
    return Spec(
        asked["space"] or "auto", asked["budget"], asked["under"], _costs(task, asked["under"]), names, tuple(found.weights_sha256 for found in known),
        spec.portable(task.build), task.fingerprint, home=f"{journal.me()['host'].partition(' ')[0]}:{out.absolute()}", account=account, **spec.kept(options),
    )  # fmt: skip


def _starts(out: Path, earlier: str, *, wanted: Spec, task: Task) -> list[dict[str, Any]]:
    """The draws to begin with; of a search that goes on, those it began with."""
    if (out / ASKED).is_file():
        return list(store.read_json(out / ASKED).get("starts", []))
    return transfer.starts(Path(earlier), space=_space(wanted), aims=_aims(task, wanted))


def _space(wanted: Spec) -> Space:
    configs = [AutoConfig.from_pretrained(backbones.find(name).source) for name in wanted.backbones]
    return space.read(wanted.space, layers=min(getattr(config, "num_hidden_layers", space.LAYERS) for config in configs), backbones=wanted.backbones)


def _effort(wanted: Spec) -> Effort:
    return Effort(aiming.spendable(wanted.budget) if wanted.budget else {}, wanted.trials, wanted.confirm, wanted.seed, tuple(wanted.starts))


def _costs(task: Task, under: str | None) -> tuple[str, ...]:
    limits = budgets.parse(under, task.metric).limits if under else ()
    return tuple(limit.quantity.name for limit in limits if limit.quantity.name != "score") or (aiming.DEFAULT,)


def _aims(task: Task, wanted: Spec) -> Aims:
    return Aims(task.metric, tuple(wanted.costs), budgets.parse(wanted.under, task.metric) if wanted.under else None, len(task.validation))


def _limits_changed(out: Path, wanted: Spec, *, resume: bool) -> bool:
    """Is this the search of the folder, asked for a model within other limits? That takes no new trial."""
    if not (resume and wanted.under and (out / ASKED).is_file() and (out / journal.FILE).is_file()):
        return False
    known = store.read_json(out / ASKED)
    return known.get("under") != wanted.under and all(known.get(name) == value for name, value in wanted.identity.items() if name != "costs")


def _remember(out: Path, wanted: Spec, *, resume: bool) -> None:
    """Keeps what a search was asked; only the same search goes on in a folder.

    Raises:
        StoreError: where another search was begun there, or this one and `resume` is not set.
    """
    file, asked = out / ASKED, {**wanted.identity, "under": wanted.under}
    if file.is_file():
        known = store.read_json(file)
        other = next((name for name, value in asked.items() if known.get(name) != value), None)
        if other:
            raise StoreError(f"{out} holds a search of which the {other} differs ({known.get(other)!r}, not {asked[other]!r}); choose another --out")
        if not resume:
            raise StoreError(f"{out} holds a search that was begun before; add --resume to go on with it, or choose another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        store.write_json(file, {**asked, "starts": wanted.starts})
