"""What to try next: our own small interface, and Optuna behind it.

The study keeps every proposal in SQLite or PostgreSQL, so that a killed search goes on, and several processes share one. The sampler is made anew
for each proposal, from the seed and the number of proposals so far: a search that was killed proposes what it would have proposed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paretune.errors import StoreError, all_of
from paretune.searches import journal, surrogate
from paretune.searches.holes import Suggest
from paretune.searches.surrogate import Answer

STARTUP = 10  # proposals at random before a tree-structured estimator is made of the answers
FEW = 4  # answers to proposals at random before a Gaussian process is
MOST_GP = 200  # proposals; beyond, a Gaussian process takes longer than it gains
SPEC = "search"  # the study's attribute that says what the search is
NEW_S = 60.0  # a proposal without an owner is this old at most; older ones were left by a killed process


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A draw from the space, to be answered."""

    number: int
    recipe: str
    params: dict[str, Any]


class Study:
    """Proposals and answers under one name.

    Args:
        url: `sqlite:///...` or `postgresql://...`; None keeps it in this process, for replays.
        better: of each answered value, "lower" or "higher".
        sampler: "gp" (a Gaussian process), "tpe" (a tree-structured Parzen estimator), "random", or "auto": the first for so long as answers are few.
        seed: the same seed and the same answers give the same proposals.

    Raises:
        StoreError: where Optuna is not installed, or the storage cannot be opened.
    """

    def __init__(self, url: str | None, *, name: str = "search", better: Sequence[str], limits: Sequence[float] = (), sampler: str = "auto", seed: int = 0) -> None:
        self.optuna, self.name, self.sampler, self.seed, self.better = _optuna(), name, sampler, seed, better
        self.limits = [self._loss(limit, i) if math.isfinite(limit) else math.inf for i, limit in enumerate(limits or [math.inf] * len(better))]
        directions = ["maximize" if way == "higher" else "minimize" for way in better]
        if url is not None:
            _refuse_unkept(url)
        with _calm():
            try:
                self.study = self.optuna.create_study(storage=url and _storage(url), study_name=name, directions=directions, load_if_exists=True)
            except (_database_error(), self.optuna.exceptions.OptunaError, ImportError, ValueError) as error:
                raise StoreError(f"storage {url!r} cannot be opened ({str(error).splitlines()[0]}); give another, or move a damaged file away") from error
        self._open: dict[int, Any] = {}

    def remember(self, spec: Mapping[str, Any], *, shared: bool) -> None:
        """Keeps what the search is, for those who join it.

        Raises:
            StoreError: where it was begun in another results folder and the storage is no file of one.
        """
        known = self.study.user_attrs.get(SPEC)
        if shared and known is not None and known["home"] != spec["home"]:
            raise StoreError(f"the storage holds this search already, begun in {known['home']}; take part with `paretune worker`, or --resume it there")
        if known != spec:
            self.study.set_user_attr(SPEC, dict(spec))

    def propose(self, draw: Callable[[Suggest], str], *, fixed: Mapping[str, Any] | None = None, aim: Mapping[str, Any] | None = None) -> Proposal:
        """The next draw; of the parameters in `fixed` as they stand there. `aim` has other values for some of these, with which the answers matter.

        Raises:
            Incompatible: for a draw that is no recipe; it is answered as failed.
        """
        with _calm():
            self.study.sampler = _fixing(self._sampler(), self._modeled(draw, fixed or {}, aim or {}))
            trial = self.study.ask()
            trial.set_user_attr("owner", {**journal.me(), "asked": time.time()})
            self._open[trial.number] = trial
            try:
                recipe = draw(trial)
            except ValueError:
                self.fail(trial.number)
                raise
            return Proposal(trial.number, recipe, dict(trial.params))

    def answer(self, number: int, values: Sequence[float], *, limits: Mapping[str, float] | None = None, seconds: float = 1.0) -> None:
        """The values of a proposal; of each limit by how much it is missed (0 or less where it is kept)."""
        trial = self._open.pop(number)
        with _calm(), contextlib.suppress(self.optuna.exceptions.UpdateFinishedTrialError):  # others took this process for killed
            trial.set_user_attr("seconds", seconds)
            for name, excess in (limits or {}).items():
                trial.set_constraint(name, excess)
            self.study.tell(trial, list(values), skip_if_finished=True)

    def fail(self, number: int) -> None:
        """A proposal that has no values: failed, or cut."""
        with _calm():
            self.study.tell(self._open.pop(number), state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def bury(self, at_work: Sequence[Mapping[str, Any]] = ()) -> int:
        """Fails the proposals that a killed process left open; how many they were.

        Args:
            at_work: the processes whose trials are; of those of this machine it is known here.
        """
        zombies = []
        for trial in self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.RUNNING,)):
            if trial.number not in self._open and not _owned(trial, [_process(owner) for owner in at_work]):
                zombies.append(trial.number)
        for number in zombies:
            self.study.set_user_attr(f"killed {number}", True)
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)
        return len(zombies)

    def _modeled(self, draw: Callable[[Suggest], str], fixed: Mapping[str, Any], aim: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values that are fixed, and where a Gaussian process proposes, its others."""
        trials = self.study.get_trials(deepcopy=False)
        answered = [trial for trial in trials if trial.values is not None]
        if self._kind(len(trials)) != "gp" or len(answered) < FEW or not surrogate.leaves_open(draw, fixed):
            return fixed
        losses = [[self._loss(value, i) for i, value in enumerate(trial.values)] for trial in answered]
        answers = [Answer(t.params, y, t.user_attrs.get("seconds", 1.0)) for t, y in zip(answered, losses, strict=True)]
        return surrogate.best(draw, answers, tried=[t.params for t in trials], fixed=fixed, aim=aim, limits=self.limits, seed=self._fresh_seed())

    def _loss(self, value: float, i: int) -> float:
        """An objective for the model, lower is better; costs by their logarithm: what is halved counts the same whatever it was."""
        if self.better[i] == "higher":
            return -value
        return math.log(value) if value > 0 else value

    def _kind(self, proposed: int) -> str:
        return ("gp" if proposed < MOST_GP else "tpe") if self.sampler == "auto" else self.sampler

    def _fresh_seed(self) -> int:
        killed = sum(key.startswith("killed ") for key in self.study.user_attrs)
        proposed = len(self.study.get_trials(deepcopy=False)) - killed  # those of other processes at work too, so that no two draw alike
        return int(hashlib.sha256(f"{self.seed} {proposed}".encode()).hexdigest()[:8], 16)

    def _sampler(self) -> Any:
        samplers, seed = self.optuna.samplers, self._fresh_seed()
        if self._kind(len(self.study.get_trials(deepcopy=False))) == "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True, group=True, warn_independent_sampling=False)
        return samplers.RandomSampler(seed=seed)


def _fixing(sampler: Any, fixed: Mapping[str, Any]) -> Any:
    """The sampler with some values given. Optuna's queue of given values would hand them to any process that asks."""
    together, alone = sampler.sample_relative, sampler.sample_independent

    def sample_relative(study: Any, trial: Any, space: Mapping[str, Any]) -> dict[str, Any]:
        drawn = together(study, trial, space)
        return {**drawn, **{name: value for name, value in fixed.items() if name in drawn}}

    def sample_independent(study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return fixed[name] if name in fixed else alone(study, trial, name, distribution)

    sampler.sample_relative, sampler.sample_independent = sample_relative, sample_independent
    return sampler


def _owned(trial: Any, at_work: Sequence[tuple[Any, ...]]) -> bool:
    """Is the process that asked for this proposal still at it?"""
    owner = trial.user_attrs.get("owner")
    if owner is None:
        return trial.datetime_start is None or time.time() - trial.datetime_start.timestamp() < NEW_S
    if journal.at_home(owner):
        return journal.alive(owner)
    return _process(owner) in at_work or time.time() - owner["asked"] < NEW_S


def _process(owner: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(owner[name] for name in ("host", "pid", "started"))


def _storage(url: str) -> Any:
    """Optuna's, connected as the account is. Where another process makes the tables at the same moment, one looks again."""
    from paretune.searches.table import connecting

    for pause_s in (0.2, 1.0):
        try:
            return importlib.import_module("optuna.storages").RDBStorage(url, engine_kwargs=connecting(url))
        except _database_error():
            time.sleep(pause_s)
    return importlib.import_module("optuna.storages").RDBStorage(url, engine_kwargs=connecting(url))


def the_only(url: str, name: str | None) -> dict[str, Any]:
    """What the search in a storage is; of several the one of that name.

    Raises:
        StoreError: where there is none, or several and no name; nothing is made there.
    """
    optuna = _optuna()
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        raise StoreError(f"storage {url!r}: there is no such file; `paretune search` makes study.db in its results folder, or what its --storage names")
    _refuse_unkept(url)
    with _calm():
        try:
            found = {study.study_name: study.user_attrs for study in optuna.get_all_study_summaries(_storage(url)) if SPEC in study.user_attrs}
        except (_database_error(), optuna.exceptions.OptunaError, ImportError, ValueError) as error:
            raise StoreError(f"storage {url!r} cannot be opened ({str(error).splitlines()[0]}); give that of a search") from error
    if name is None and len(found) == 1:
        name = next(iter(found))
    if name not in found:
        raise StoreError(f"storage {url!r} holds {all_of(map(repr, found)) if found else 'no search'}; name one with --study")
    return dict(found[name][SPEC])


def _refuse_unkept(url: str) -> None:
    if not url.startswith(("sqlite:", "postgresql")):
        raise StoreError(f"storage {url!r} is of no kind that survives a killed process here; give sqlite:///file.db or postgresql://user@host/name")


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ModuleNotFoundError:
        raise StoreError("a search needs Optuna, which is not installed: pip install 'paretune[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _database_error() -> type[Exception]:
    """What the library under Optuna raises of a database that cannot be reached or read."""
    found: type[Exception] = importlib.import_module("sqlalchemy.exc").SQLAlchemyError
    return found


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Without Optuna's notes that a part of it is experimental; pyproject.toml pins the versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
