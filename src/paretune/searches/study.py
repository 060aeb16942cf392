"""What to try next: our own small interface, and Optuna behind it.

The study keeps every proposal in SQLite or PostgreSQL, so that a killed search goes on, and several processes share one. The sampler is made anew
for each proposal, from the seed and the number of answers so far: a search that was killed proposes what it would have proposed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from paretune.errors import StoreError
from paretune.searches import journal
from paretune.searches.space import Space, Suggest

STARTUP = 10  # proposals at random before a model is made of the answers
MOST_GP = 200  # beyond, a Gaussian process takes longer than it gains
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
        sampler: "gp", "tpe" or "random"; see `sampler_for`.
        seed: the same seed and the same answers give the same proposals.

    Raises:
        StoreError: where Optuna is not installed, or the storage cannot be opened.
    """

    def __init__(self, url: str | None, *, name: str = "search", better: Sequence[str], sampler: str, seed: int = 0) -> None:
        self.optuna, self.sampler, self.seed = _optuna(), sampler, seed
        directions = ["maximize" if way == "higher" else "minimize" for way in better]
        if url is not None and not url.startswith(("sqlite:", "postgresql")):
            raise StoreError(f"storage {url!r} is of no kind that survives a killed process here; give sqlite:///file.db or postgresql://user@host/name")
        with _calm():
            try:
                self.study = self.optuna.create_study(storage=url, study_name=name, directions=directions, load_if_exists=True)
            except (_database_error(), self.optuna.exceptions.OptunaError, ImportError, ValueError) as error:
                raise StoreError(f"storage {url!r} cannot be opened ({str(error).splitlines()[0]}); give another, or move a damaged file away") from error
        self._open: dict[int, Any] = {}

    def propose(self, draw: Callable[[Suggest], str], *, fixed: Mapping[str, Any] | None = None) -> Proposal:
        """The next draw; of the parameters in `fixed` as they stand there.

        Raises:
            Incompatible: for a draw that is no recipe; it is answered as failed.
        """
        with _calm():
            self.study.sampler = self._sampler()
            if fixed:
                self.study.enqueue_trial(dict(fixed))
            trial = self.study.ask()
            trial.set_user_attr("owner", journal.me())
            self._open[trial.number] = trial
            try:
                recipe = draw(trial)
            except ValueError:
                self.fail(trial.number)
                raise
            return Proposal(trial.number, recipe, dict(trial.params))

    def answer(self, number: int, values: Sequence[float], *, limits: Mapping[str, float] | None = None) -> None:
        """The values of a proposal; of each limit by how much it is missed (0 or less where it is kept)."""
        trial = self._open.pop(number)
        with _calm():
            for name, excess in (limits or {}).items():
                trial.set_constraint(name, excess)
            self.study.tell(trial, list(values))

    def fail(self, number: int) -> None:
        """A proposal that has no values: failed, or cut."""
        with _calm():
            self.study.tell(self._open.pop(number), state=self.optuna.trial.TrialState.FAIL)

    def bury(self) -> int:
        """Fails the proposals that a killed process left open; how many they were."""
        now, zombies = datetime.datetime.now(), []
        for trial in self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.RUNNING,)):
            owner = trial.user_attrs.get("owner")
            old = trial.datetime_start is not None and (now - trial.datetime_start).total_seconds() > NEW_S
            if trial.number not in self._open and (not journal.alive(owner) if owner else old):
                zombies.append(trial.number)
        for number in zombies:
            self.study.set_user_attr(f"killed {number}", True)
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
        return len(zombies)

    def _sampler(self) -> Any:
        states = self.optuna.trial.TrialState
        killed = sum(key.startswith("killed ") for key in self.study.user_attrs)
        answered = len(self.study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL))) - killed
        seed = int(hashlib.sha256(f"{self.seed} {answered}".encode()).hexdigest()[:8], 16)
        samplers = self.optuna.samplers
        if self.sampler == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=STARTUP, warn_independent_sampling=False)
        if self.sampler == "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True, group=True, warn_independent_sampling=False)
        return samplers.RandomSampler(seed=seed)


def sampler_for(space: Space, trials: int | None) -> str:
    """A Gaussian process for few trials in a space whose holes are all in every draw; else the tree-structured estimator."""
    return "gp" if space.flat and trials is not None and trials <= MOST_GP else "tpe"


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
