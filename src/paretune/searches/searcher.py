"""The search itself: what is tried next, what may begin, what is cut, and what is trained again before it is reported.

    timing -> (a new recipe on few rows | a better one on more rows)* -> the best on all rows -> the chosen with fresh seeds -> measured together
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from paretune.errors import BudgetError, Incompatible, RecipeError
from paretune.searches import halving
from paretune.searches.aims import Aims
from paretune.searches.bench import Bench, Cut, Watch
from paretune.searches.forecast import MARGIN, Forecast, plus, times
from paretune.searches.holes import Seeded, Suggest
from paretune.searches.journal import SPENDABLE, Entry, Journal, Spent, Task, left, total, within
from paretune.searches.pulse import Pulse
from paretune.searches.space import Space
from paretune.searches.study import Proposal, Study

ROWS = "rows"  # the parameter of a proposal that says on how many training rows
REPEATS = 40  # proposals in a row that were tried before or do not compose; then the space counts as known
DEAR = 4  # proposals in a row that cost more than is left; then the budget counts as spent
CHOSEN = 3  # recipes of the frontier that are trained again
POLL_S = 1.0  # one waits for others so long before one looks again


@dataclasses.dataclass(frozen=True)
class Effort:
    """How far a search goes: what it may spend, how many recipes it tries at most, with how many fresh seeds it trains the chosen again."""

    budget: Mapping[str, float]
    trials: int | None = None
    confirm: int = 2
    seed: int = 0
    starts: tuple[Mapping[str, Any], ...] = ()  # draws that are tried first

    def __post_init__(self) -> None:
        if not self.budget and self.trials is None:
            raise BudgetError("a search needs an end: give it a budget, as in train_s=3600, or a number of trials, or both")


class Searcher:
    """One process at work on a search.

    Args:
        rungs: training rows, fewest first; the last are all.
    """

    def __init__(self, space: Space, bench: Bench, *, study: Study, journal: Journal, aims: Aims, rungs: tuple[int, ...], effort: Effort) -> None:
        self.space, self.bench, self.study, self.journal, self.aims = space, bench, study, journal, aims
        self.rungs, self.effort, self.fresh = rungs, effort, effort.confirm  # fresh: seeds of the end for which something is kept
        self._first: Callable[[int], Spent] | None = None
        self._given = 0  # starts that were proposed here
        self._looked = False  # for what killed processes left

    def run(self) -> None:
        """Until the budget, the trials or the space are used up.

        Raises:
            BudgetError: before anything is tried, where the budget does not reach for one recipe.
        """
        self.trials()
        if not self._done(self.rungs[-1]):
            self._straight_up()
        self._confirm()
        while self._others():  # they train or measure the chosen, or did until they were killed
            self._confirm()
        self._measure()

    def trials(self) -> None:
        """All trials that others leave: what a worker does. The end of a search is for its own folder."""
        while self.turn() or self._others():
            pass

    def turn(self) -> bool:
        """One trial; False where none can be begun now."""
        if self.journal.bury() or not self._looked:
            entries = self.journal.entries()
            self.study.bury([e.owner for e in entries if e.alive])
            self._looked = True
        if self.effort.budget and not self._done():
            self._time()
        return self._again() or self._up() or self._new()

    # --- what is tried ----------------------------------------------------------------------------------------------------------

    def _new(self) -> bool:
        """Tries a recipe that the study proposes, on the fewest rows; False at the end of trials, space or budget."""
        dear = 0
        for _ in range(REPEATS):
            if len(_tried(self.journal.entries())) >= min(self.space.size, math.inf if self.effort.trials is None else self.effort.trials):
                return False
            rows = self._least()
            proposal = self._propose({ROWS: rows, **self._start()})
            if proposal is not None and not self._known(proposal, rows):
                dear += 1
                if self._try(proposal, rows):
                    return True
            if dear == DEAR:
                break
        return False

    def _start(self) -> Mapping[str, Any]:
        """The next draw to start from that nobody tried; nothing, where all were."""
        tried = [e.params for e in self.journal.entries() if e.kind == "trial"]
        while self._given < len(self.effort.starts):
            self._given += 1
            if self.effort.starts[self._given - 1] not in tried:
                return self.effort.starts[self._given - 1]
        return {}

    def _up(self) -> bool:
        """Tries the best recipe of the highest rung that lets one go up, on the rows of the rung above."""
        entries = self._done()
        hopeless = self.aims.hopeless(entries, self.rungs[-1])
        for low, high in reversed(list(zip(self.rungs, self.rungs[1:], strict=False))):
            ranked = {e.recipe: e for e in self.aims.order([e for e in entries if e.rows == low])}
            above = [e.recipe for e in self.journal.entries() if e.rows == high and e.kind == "trial" and e.state != "killed"]
            hopeless_here = [*hopeless, *(e.recipe for e in ranked.values() if not self.aims.keeps(e))]
            recipe = halving.promotable(list(ranked), above, hopeless=hopeless_here)
            if recipe is not None and self._try_on(ranked[recipe], high):
                return True
        return False

    def _straight_up(self) -> None:
        """Where no recipe has seen all rows yet: the best one that can be paid does, if need be with what was kept for fresh seeds."""
        for kept_for_fresh_seeds in (self.effort.confirm, 0):
            self.fresh = kept_for_fresh_seeds
            for entry in self.aims.order(self._done()):
                if self._try_on(entry, self.rungs[-1]) and self._done(self.rungs[-1]):
                    return

    def _again(self) -> bool:
        """Takes up a trial whose process was killed; one that was killed twice is left."""
        entries = [e for e in self.journal.entries() if e.kind == "trial"]
        states = collections.defaultdict(list)
        for entry in entries:
            states[entry.recipe, entry.rows].append(entry.state)
        return any(states[e.recipe, e.rows] == ["killed"] and self._try_on(e, e.rows) for e in entries)

    def _others(self) -> bool:
        """Waits until a trial of another process ends, whatever became of it; False where no other is at work."""
        others = [e.number for e in self.journal.entries() if e.alive]
        while others and others == [e.number for e in self.journal.entries() if e.alive]:
            time.sleep(POLL_S)
        return bool(others)

    def _confirm(self) -> None:
        """Trains the chosen with fresh seeds: what was chosen for its score had luck in that score."""
        for k, entry in enumerate(self.aims.front(self._done(self.rungs[-1]))[:CHOSEN], start=1):
            for seed in range(self.effort.seed + 1, self.effort.seed + 1 + self.effort.confirm):
                self._do(Task("confirm", entry.recipe, self.rungs[-1], seed), keep=self._measuring(k))

    def _measure(self) -> None:
        """Measures what was trained again together; where that cannot be paid, the best of it."""
        done = {e.run: e.recipe for e in self.journal.entries() if e.kind == "confirm" and e.state == "complete"}
        recipes = list(dict.fromkeys(done.values()))
        for k in range(len(recipes), 0, -1):
            ids = [run for run, recipe in done.items() if recipe in recipes[:k]]
            task = Task("measure", params={"runs": ids})
            if not _free(task, self.journal.entries()):
                return
            with self._at_work(task, self._measuring(k), keep={}) as begun:
                if begun:
                    entry, watch = begun
                    try:
                        self.journal.end(dataclasses.replace(entry, state="complete", spent=self.bench.measure(ids, watch=watch)))
                    except Cut as cut:
                        self.journal.end(dataclasses.replace(entry, state="cut", spent=cut.spent, reason=str(cut)))
                    return

    # --- one trial --------------------------------------------------------------------------------------------------------------

    def _least(self) -> int:
        """Training rows that a new recipe is tried on: the fewest for which a trial costs at most half of one on all, as what is not training costs the same on few.
        Where the budget reaches for no more trials on all rows than begin below one of them, the fewest there are."""
        cost = self._first or (lambda rows: self._forecast().of("", rows))
        whole = cost(self.rungs[-1])
        if not within(times(whole, halving.ETA ** (len(self.rungs) - 1)), left(self.journal.entries(), self.effort.budget)):
            return self.rungs[0]
        return next(rows for rows in self.rungs if rows == self.rungs[-1] or within(cost(rows), times(whole, 0.5)))

    def _propose(self, fixed: Mapping[str, Any]) -> Proposal | None:
        """A proposal with some values fixed; None for a draw that is no recipe."""

        def draw(suggest: Suggest) -> str:
            suggest.suggest_int(ROWS, low=self.rungs[0], high=self.rungs[-1], log=True)
            return self.space.draw(suggest)

        try:
            return self.study.propose(draw, fixed=fixed, aim={ROWS: self.rungs[-1]})
        except Incompatible:
            return None

    def _try_on(self, entry: Entry, rows: int) -> bool:
        """The trial of a recipe that was drawn before, on these rows; False where that cannot be paid."""
        asked = plus(times(self._forecast().of(entry.recipe, rows), MARGIN), self._kept(entry.recipe, rows))
        if not within(asked, left(self.journal.entries(), self.effort.budget)):
            return False
        proposal = self._propose({**entry.params, ROWS: rows})
        return proposal is not None and not self._known(proposal, rows) and self._try(proposal, rows)

    def _known(self, proposal: Proposal, rows: int) -> bool:
        """Answers, at no cost, a proposal that comes to a run that was tried before, or that cannot be one."""
        try:
            key = self.bench.key(proposal.recipe, rows)
        except (Incompatible, RecipeError):
            self.study.fail(proposal.number)
            return True
        found = next((e for e in self.journal.entries() if e.kind == "trial" and e.key == key and e.state != "killed"), None)
        if found is not None:
            self._answer(proposal, found)
        return found is not None

    def _try(self, proposal: Proposal, rows: int) -> bool:
        params = {name: value for name, value in proposal.params.items() if name != ROWS}
        task = Task("trial", proposal.recipe, rows, self.effort.seed, params, self.bench.key(proposal.recipe, rows))
        done = self._do(task, keep=self._kept(proposal.recipe, rows))
        if done is None:
            self.study.fail(proposal.number)
            return False
        self._answer(proposal, done)
        return True

    def _answer(self, proposal: Proposal, entry: Entry) -> None:
        values = self.aims.values(entry) if entry.state == "complete" else [None]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            self.study.answer(proposal.number, known, limits=self.aims.limits(entry), seconds=entry.spent["train_s"] or 0.0)
        else:
            self.study.fail(proposal.number)

    def _do(self, task: Task, *, keep: Spent) -> Entry | None:
        """One trial from its beginning to its end; None where what it may take is not left."""
        with self._at_work(task, self._forecast().of(task.recipe, task.rows), keep=keep) as begun:
            if begun is None:
                return None
            entry, watch = begun
            outcome = self.bench.work(task.recipe, task.rows, seed=task.seed, watch=watch)
            return self.journal.end(dataclasses.replace(entry, **{f.name: getattr(outcome, f.name) for f in dataclasses.fields(outcome)}))

    # --- what may be spent ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _at_work(self, task: Task, asked: Spent, *, keep: Spent) -> Iterator[tuple[Entry, Watch] | None]:
        """An entry for what fits into the rest, less what is kept for later, and the watcher that cuts it there; None for what does not, or is done already."""
        budget = {name: limit - (keep.get(name) or 0.0) for name, limit in self.effort.budget.items()}
        entry = self.journal.begin(task, reserved=times(asked, MARGIN), budget=budget, may=lambda entries: self._may(task, entries))
        if entry is None:
            yield None
            return
        tail, reserved = self._forecast().tail(), [entry.reserved]
        with Pulse(self.journal, entry) as pulse:

            def watch(spent: Spent) -> None:
                pulse.spent = spent
                if pulse.lost:
                    raise Cut(pulse.lost, spent)
                needed = plus(spent, tail)
                if within(needed, {name: reserved[0].get(name) or 0.0 for name in budget}):
                    return
                more = self.journal.grow(entry, needed, budget=budget)
                if more is not None:
                    reserved[0] = more
                    return
                rest = left([e for e in self.journal.entries() if e.number != entry.number], budget)
                raise Cut(f"no {next(n for n in rest if not within(needed, {n: rest[n]}))} is left for the rest of it", spent)

            yield entry, watch

    def _may(self, task: Task, entries: Sequence[Entry]) -> bool:
        """Is the task still to be done, and if its recipe is a new one, may there be one more?"""
        tried = _tried(entries)
        return _free(task, entries) and (task.kind != "trial" or task.recipe in tried or len(tried) < (math.inf if self.effort.trials is None else self.effort.trials))

    def _kept(self, recipe: str, rows: int) -> Spent:
        """What the end of the search will take: the fresh seeds on all rows, before them a first training on all where there was none, and their measuring."""
        count = self.fresh + (rows < self.rungs[-1] and not self._done(self.rungs[-1]))
        forecast = self._forecast()
        return plus(times(forecast.of(recipe, self.rungs[-1]), count), self._measuring(min(1, self.fresh)))

    def _measuring(self, recipes: int) -> Spent:
        """What measuring so many recipes together will take: as in a trial where trials measure, else an estimate at the pace of all so far."""
        if not self.bench.measure_s:
            return times(self._forecast().tail(), recipes)
        spent = total(self.journal.entries())
        wall = spent["train_s"] or 0.0
        return {name: recipes * self.bench.measure_s * ((value or 0.0) / wall if wall else 0.0) for name, value in spent.items()}

    def _time(self) -> None:
        """The warm-up of a search with a budget: one recipe is timed, and what that took is counted; other processes use what was found."""
        timed = next((e for e in self.journal.entries() if e.kind == "timing" and e.state == "complete"), None)
        if timed is not None:
            self._first = self._first or _between(timed.cost["fixed"], timed.cost["whole"], rows=self.rungs[-1])
            return
        recipe = self._any()
        entry = self.journal.begin(Task("timing"), reserved={}, budget={})
        assert entry is not None, "nothing is asked of no budget"
        with Pulse(self.journal, entry):
            spent, self._first = self.bench.timing(recipe)
        found = {"fixed": self._first(0), "whole": self._first(self.rungs[-1])}
        self.journal.end(dataclasses.replace(entry, state="complete", spent=spent, cost=found))
        silent = [name for name in self.effort.budget if spent[name] is None]
        if silent:
            raise BudgetError(f"nothing here measures {silent[0]}, so no budget of it can be kept; state a power with --power idle=2W,busy=6W, or budget train_s")
        asked = plus(times(self._first(self.rungs[0]), MARGIN), self._kept(recipe, self.rungs[0]))
        if not within(asked, left(self.journal.entries(), self.effort.budget)):
            needed = plus(asked, total(self.journal.entries()))
            worst = max(self.effort.budget, key=lambda name: (needed[name] or 0.0) / self.effort.budget[name])
            raise BudgetError(
                f"a budget of {worst}={self.effort.budget[worst]:.4g} does not reach for one recipe on few rows and one on all with its fresh seeds: "
                f"{needed[worst]:.4g} are needed, by the timing of {recipe}; give more, or fewer rows with --max-train, or fewer seeds with --confirm"
            )

    def _any(self) -> str:
        """A recipe of the space that is one here, the same for every search of this seed."""
        suggest, why = Seeded(self.effort.seed), ""
        for _ in range(REPEATS):
            try:
                recipe = self.space.draw(suggest)
                self.bench.key(recipe, self.rungs[0])
            except (Incompatible, RecipeError) as error:
                why = str(error)
            else:
                return recipe
        raise Incompatible(f"{self.space.text!r}: of {REPEATS} draws none composes, as in {why}")

    def _forecast(self) -> Forecast:
        return Forecast(self.journal.entries(), self._first or (lambda rows: dict.fromkeys(SPENDABLE, 0.0)))

    def _done(self, rows: int | None = None) -> list[Entry]:
        """The finished trials, on so many rows or on any, whose objectives are all known."""
        found = [e for e in self.journal.entries() if e.kind == "trial" and e.state == "complete" and None not in self.aims.values(e)]
        return [e for e in found if rows is None or e.rows == rows]


def _tried(entries: Sequence[Entry]) -> set[str]:
    """The recipes that were tried, or are."""
    return {e.recipe for e in entries if e.kind == "trial" and e.state != "killed"}


def _free(task: Task, entries: Sequence[Entry]) -> bool:
    """Is this task neither done nor at work?"""

    def same(entry: Entry) -> bool:
        return (entry.kind, entry.recipe, entry.rows, entry.seed, entry.params.get("runs")) == (task.kind, task.recipe, task.rows, task.seed, task.params.get("runs"))

    return not any(same(entry) and (entry.state == "complete" or entry.alive) for entry in entries)


def _between(fixed: Spent, whole: Spent, *, rows: int) -> Callable[[int], Spent]:
    """What a number of rows takes, on the line from what none takes to what `rows` take."""
    return lambda n: {name: (fixed[name] or 0.0) + ((whole[name] or 0.0) - (fixed[name] or 0.0)) * n / rows for name in SPENDABLE}
