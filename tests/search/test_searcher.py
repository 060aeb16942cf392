"""The searcher over recorded figures: it never spends past its budget, counts everything, goes cheap to expensive, and goes on after a kill."""

from __future__ import annotations

import collections
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from pool import RUNGS, Pool, child, searcher

from paretune.errors import BudgetError, StoreError
from paretune.pareto import budgets
from paretune.searches import study as studies
from paretune.searches import transfer
from paretune.searches.aims import Aims
from paretune.searches.found import Found, break_even
from paretune.searches.journal import Journal, total
from paretune.searches.searcher import Effort
from paretune.searches.space import read


def entries(folder: Path, kind: str = "trial") -> list:
    return [e for e in Journal(folder / "trials.jsonl").entries() if e.kind == kind]


def told(folder: Path) -> list[tuple[str, int, str]]:
    return [(e.recipe, e.rows, e.state) for e in entries(folder)]


@pytest.mark.parametrize(("fixed_s", "budget_s", "begins"), [
    (0.0, 1e6, 0),  # a trial on few rows costs a ninth
    (6.0, 1e6, 0),  # 7 of 15 s
    (9.0, 1e6, -1),  # nearly all of it is not training
    (9.0, 100.0, 0),  # and yet: nine on all rows cannot be paid
])  # fmt: skip
def test_it_begins_on_few_rows_where_these_are_cheap_or_all_are_dear(tmp_path, fixed_s, budget_s, begins):
    it = searcher(tmp_path, Pool(), budget={"train_s": budget_s})
    it._first = lambda rows: {"train_s": fixed_s + 9.0 * rows / RUNGS[-1], "train_cpu_s": 0.0, "train_energy_j": 0.0}
    assert it._least() == RUNGS[begins]


@pytest.mark.parametrize("seconds", [25.0, 60.0])
@pytest.mark.parametrize("slow", [1.0, 4.0])
def test_it_never_spends_past_its_budget(tmp_path, seconds, slow):
    """Half of the recipes take so many times longer than they should: they are cut, and what they spent is counted."""
    bench = Pool(slow=lambda recipe: slow if "ffn" in recipe else 1.0, fails=lambda recipe: "r=4," in recipe)
    searcher(tmp_path, bench, budget={"train_s": seconds, "train_energy_j": 4.5 * seconds}, seed=1).run()
    every = Journal(tmp_path / "trials.jsonl").entries()
    spent = total(every)
    assert spent["train_s"] <= seconds and spent["train_energy_j"] <= 4.5 * seconds
    assert spent["train_energy_j"] >= 0.4 * 4.5 * seconds or seconds < 60  # and it uses what it may; of little, much is kept for the end
    assert all(e.spent["train_s"] > 0 for e in every)  # whatever became of it
    assert entries(tmp_path, "timing") and len(told(tmp_path)) == len({(r, n) for r, n, _ in told(tmp_path)})
    assert {(e.recipe, e.rows) for e in entries(tmp_path)} == {(r, n) for r, n, seed in bench.told if seed == 1}
    assert any(e.rows == RUNGS[-1] and e.state == "complete" for e in entries(tmp_path))  # enough was kept for all rows


def test_a_trial_that_is_longer_than_what_is_left_is_cut_and_paid(tmp_path):
    searcher(tmp_path, Pool(slow=lambda recipe: 40.0), budget={"train_s": 30.0}, confirm=0).run()
    cut = [e for e in entries(tmp_path) if e.state == "cut"]
    assert cut and all(e.spent["train_s"] > 1 and "no train_s is left" in e.reason for e in cut)
    assert total(Journal(tmp_path / "trials.jsonl").entries())["train_s"] <= 30.0


def test_a_budget_that_reaches_for_nothing_is_refused_with_what_is_needed(tmp_path):
    bench = Pool()
    with pytest.raises(BudgetError, match=r"train_s=8 does not reach .* are needed"):
        searcher(tmp_path, bench, budget={"train_s": 8.0}).run()
    assert not bench.told
    with pytest.raises(BudgetError, match="needs an end"):
        Effort({})


def test_the_same_seed_gives_the_same_trials_also_after_a_kill(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("whole", "again", "killed")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(studies, "STARTUP", 3)
    for folder in folders[:2]:
        searcher(folder, Pool(), trials=6, sampler="tpe").run()
    assert told(folders[0]) == told(folders[1])
    for after in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            searcher(folders[2], Pool(after=after), trials=6, sampler="tpe", kept=True).run()
        _forget_owner(folders[2])
    searcher(folders[2], Pool(), trials=6, sampler="tpe", kept=True).run()
    finished = [t for t in told(folders[2]) if t[2] == "complete"]
    assert collections.Counter(finished) == collections.Counter(told(folders[0]))  # none lost, none twice
    assert sum(state == "killed" for _, _, state in told(folders[2])) == 3


def _forget_owner(folder: Path) -> None:
    """As if the process that was interrupted had been killed: it is this one, and lives on."""
    mine, nobody = f'"pid": {os.getpid()}', '"pid": 999999999'
    file = folder / "trials.jsonl"
    file.write_text(file.read_text().replace(mine, nobody))
    base = sqlite3.connect(folder / "study.db")
    with base:
        base.execute("update trial_user_attributes set value_json = replace(value_json, ?, ?)", (mine, nobody))
    base.close()


def test_what_is_tried_twice_costs_once(tmp_path):
    bench = Pool()
    space = 'lora(r=2, targets={attention, "attention", \'attention\'})'  # three spellings of one recipe
    searcher(tmp_path, bench, trials=9, space=space, rungs=(900,), confirm=0).run()
    assert len(bench.told) == len(told(tmp_path)) == 1


def test_a_space_that_is_known_ends_the_search(tmp_path):
    bench = Pool()
    searcher(tmp_path, bench, trials=50, space="lora(r={1, 2, 4, 8})", rungs=(900,), confirm=0).run()
    assert {r for r, _, _ in bench.told} == {r for r in read("lora(r={1, 2, 4, 8})").every()}


def test_many_see_few_rows_and_few_see_all(tmp_path):
    searcher(tmp_path, Pool(), trials=18, sampler="random").run()
    count = collections.Counter(e.rows for e in entries(tmp_path))
    assert count[100] == 18 and 6 <= count[300] <= 9 and 2 <= count[900] <= 3  # a third goes up, and some that were of the best third at their time
    low = {e.recipe: e.score for e in entries(tmp_path) if e.rows == 100}
    assert max(low, key=low.get) in {e.recipe for e in entries(tmp_path) if e.rows == 900}


def test_the_chosen_are_trained_again_with_fresh_seeds_and_measured_together(tmp_path):
    bench = Pool()
    it = searcher(tmp_path, bench, trials=12, rungs=(900,), confirm=2)
    it.run()
    front = it.aims.front(it._done(900))
    again = {(e.recipe, e.seed) for e in entries(tmp_path, "confirm")}
    assert again == {(e.recipe, seed) for e in front[:3] for seed in (1, 2)}
    assert bench.measured == [[e.run for e in entries(tmp_path, "confirm")]]
    it.run()  # nothing is left to be done
    assert len(bench.measured) == 1 and {(e.recipe, e.seed) for e in entries(tmp_path, "confirm")} == again


def test_what_keeps_no_limit_goes_no_further(tmp_path):
    aims = Aims("accuracy", ("stored_mb",), budgets.parse("stored_mb=30", "accuracy"), 400)
    searcher(tmp_path, Pool(), trials=18, aims=aims).run()
    assert all("int8" in e.recipe for e in entries(tmp_path) if e.rows > 100)
    assert any("int8" not in e.recipe for e in entries(tmp_path))


def test_the_frontier_grows_along_the_curve(tmp_path):
    it = searcher(tmp_path, Pool(), trials=12, rungs=(900,), confirm=0)
    it.run()
    found = Found(it.journal.entries(), it.aims, 900, tmp_path)
    shares = [share for _, share in found.curve()]
    assert shares == sorted(shares) and 0 < shares[-1] <= 1
    assert found.gained()["per_1000_train_s"] == pytest.approx(1000 * shares[-1] / found.spent["train_s"])
    assert found.spent == total(it.journal.entries())


def test_break_even_is_what_was_spent_over_what_each_inference_saves():
    assert break_even(1000.0, 0.3, against=0.8).value == 2000
    assert break_even(1.0, 0.5, against=0.5).value is None and "never" in break_even(1.0, 0.5, against=0.5).reason
    assert break_even(None, 0.3, against=0.8).value is None


def test_a_failed_trial_is_not_tried_again(tmp_path):
    bench = Pool(fails=lambda recipe: True)
    searcher(tmp_path, bench, trials=4, rungs=(900,), confirm=1).run()
    assert len(bench.told) == 4 and {e.state for e in entries(tmp_path)} == {"failed"}
    assert not entries(tmp_path, "confirm")


def test_trials_that_cost_the_budgeted_thing_without_a_meter_are_refused(tmp_path):
    class Silent(Pool):
        def timing(self, recipe):
            spent, forecast = super().timing(recipe)
            return {**spent, "train_energy_j": None}, forecast

    with pytest.raises(BudgetError, match="nothing here measures train_energy_j"):
        searcher(tmp_path, Silent(), budget={"train_energy_j": 100.0}).run()


@pytest.mark.parametrize("kind", ["postgresql", pytest.param("sqlite", marks=pytest.mark.all)])
def test_workers_share_budget_and_trials_and_one_is_killed(tmp_path, kind, request):
    """Three processes on one study: the search spends no more than it may, loses nothing, and does nothing twice."""
    asked = {"budget": {"train_s": 150.0, "train_energy_j": 700.0}, "trials": 5, "space": "lora(r=[1..20], targets={attention, ffn})"}
    shared = request.getfixturevalue("postgresql") if kind == "postgresql" else f"sqlite:///{tmp_path}/search.db"

    class Slow(Pool):
        """As long at it that others come in between."""

        def work(self, recipe, rows, *, seed, watch):
            time.sleep(0.03)
            return super().work(recipe, rows, seed=seed, watch=watch)

    def one(k: int) -> None:
        bench = Slow(slow=lambda recipe: 3.0 if "ffn" in recipe else 1.0)
        if k == 0:
            bench.work = lambda *args, **more: time.sleep(60)  # and is killed in its first trial
        searcher(tmp_path, bench, shared=shared, **asked).trials()

    journal = searcher(tmp_path, Pool(), shared=shared, **asked).journal
    pids, ends = [child(lambda: one(0))], time.monotonic() + 60
    while not any(e.kind == "trial" for e in journal.entries()) and time.monotonic() < ends:
        time.sleep(0.02)
    pids += [child(lambda k=k: one(k)) for k in (1, 2)]
    while len({e.owner["pid"] for e in journal.entries()}) < 3 and time.monotonic() < ends:
        time.sleep(0.02)
    os.kill(pids[0], signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    it = searcher(tmp_path, Pool(), shared=shared, **asked)
    it.run()
    found = it.journal.entries()
    assert len({e.owner["pid"] for e in found if e.state != "killed"}) >= 3
    assert all(total(found)[name] <= most for name, most in asked["budget"].items()) and total(found)["train_s"] > 10
    assert [e.owner["pid"] for e in found if e.state == "killed"] == [pids[0]] and not any(e.alive for e in found)
    done = [(e.kind, e.recipe, e.rows, e.seed) for e in found if e.kind != "timing" and e.state != "killed"]
    assert len(done) == len(set(done))
    killed = next(e for e in found if e.state == "killed")
    assert (killed.recipe, killed.rows) in {(recipe, rows) for _, recipe, rows, _ in done}
    assert len({e.recipe for e in found if e.kind == "trial"}) == 5 and any(e.kind == "measure" for e in found)


def test_trials_are_no_more_than_asked_of_several(tmp_path):
    pids = [child(lambda: searcher(tmp_path, Pool(), trials=5, kept=True, space="lora(r=[1..64])", rungs=(900,)).trials()) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert len({e.recipe for e in entries(tmp_path)}) == len(entries(tmp_path)) == 5


def test_the_frontier_of_an_earlier_search_is_tried_first(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir(), large.mkdir()
    it = searcher(small, Pool(), trials=12, rungs=(90,), confirm=0)
    it.run()
    front = [e.recipe for e in it.aims.front(it._done(90))]
    wider = "lora(r={1, 2, 4, 8, 16, 32, 64}, targets={attention, ffn}) | {none, merge | int8, int8}"
    drawn = transfer.starts(small, space=read(wider), aims=it.aims)
    assert [read(wider).draw(transfer.Known(params)) for params in drawn[: len(front)]] == front and len(drawn) == transfer.MOST
    other = searcher(large, Pool(), trials=10, space=wider, starts=drawn)
    other.run()
    assert list(dict.fromkeys(e.recipe for e in entries(large) if e.rows == RUNGS[0]))[: len(drawn)] == [read(wider).draw(transfer.Known(p)) for p in drawn]
    assert len({e.recipe for e in entries(large)}) == 10  # and then others
    narrow = transfer.starts(small, space=read("lora(r={1, 2}, targets={attention, ffn}) | {none, merge | int8}"), aims=it.aims)
    assert all(params["lora.r"] in ("1", "2") for params in narrow)
    with pytest.raises(StoreError, match="none of the"):
        transfer.starts(small, space=read("prefix(length=[1..4])"), aims=it.aims)
    with pytest.raises(StoreError, match="holds no search"):
        transfer.starts(tmp_path, space=read(wider), aims=it.aims)
