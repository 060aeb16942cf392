"""A search on this machine, with a tiny model: killed by -9 and taken up, its folder reported, its choice confirmed."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest
import tiny
from pool import child

import paretune as pt
from paretune import cli, store
from paretune.errors import BudgetError, Incompatible, StoreError
from paretune.meters import protocol, throughput
from paretune.meters.reading import Reading
from paretune.options import Metering, Options, Searching, Training
from paretune.pareto import ledger
from paretune.planning import allotment
from paretune.searches import halving
from paretune.searches.bench import Live
from paretune.searches.found import Found
from paretune.searches.journal import Journal, total
from paretune.searches.space import read

SPACE = "lora(r={1, 2}, targets={attention, linear}) | {none, int8}"
BUDGET = "train_s=900, train_energy_j=9000"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A tiny BERT, 90 rows in two rungs, and measuring windows so short that they take no time."""
    folder = tmp_path_factory.mktemp("search")
    tiny.model("bert", "base").save_pretrained(folder / "bert")
    tiny.tokenizer().save_pretrained(folder / "bert")
    rows = [(f"the {noun} was so {word} {i}", label) for i in range(15) for noun in ("movie", "book", "plot") for word, label in (("good", "yes"), ("bad", "no"))]
    with (folder / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halving, "LEAST", 20)
        patch.setattr(halving, "RUNGS", 2)
        patch.setattr(allotment, "PER_RUN_S", 0.5)
        patch.setitem(protocol.PROTOCOLS, "quick", dataclasses.replace(protocol.QUICK, window_s=0.02, window_n=5, idle_s=0.01))
        patch.setattr("paretune.inference.peak_memory", lambda folders: [Reading(1.0, "MB") for _ in folders])
        itself, most = protocol.same_against_same, throughput.best_throughput
        patch.setattr(protocol, "same_against_same", lambda call: itself(call, pairs=2, block_s=0.005))
        patch.setattr(protocol, "warm", lambda call, limit_s: 0)
        patch.setattr(throughput, "best_throughput", lambda run, largest, seconds, limit_s: most(run, largest=2, seconds=seconds / 30))
        yield folder


def task(place: Path) -> pt.Task:
    return pt.task(str(place / "data.csv"), text="text", label="label")


def options(**searching: object) -> Options:
    return Options(Training(epochs=1, batch=8, dtype="fp32"), metering=Metering(power="idle=2W,busy=6W"), searching=Searching(**{"trials": 4, "confirm": 1, **searching}))


@pytest.fixture(scope="module")
def searched(place: Path) -> tuple[Path, Found]:
    """A search that is killed by -9 in its second trial, and then goes on to its end."""
    out = place / "out"

    def search() -> Found:
        return pt.search(task(place), backbone=str(place / "bert"), space=SPACE, budget=BUDGET, under="stored_mb=40", out=out, resume=True, options=options())

    pid = os.fork()
    if not pid:
        try:
            search()
        finally:
            os._exit(0)
    journal = Journal(out / "trials.jsonl")
    ends = time.monotonic() + 120
    while time.monotonic() < ends and sum(e.kind == "trial" for e in journal.entries()) < 2:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return out, search()


def test_a_killed_search_goes_on_and_loses_and_repeats_no_finished_trial(searched):
    _, found = searched
    killed = [e for e in found.entries if e.state == "killed"]
    done = [(e.kind, e.recipe, e.rows, e.seed) for e in found.entries if e.state == "complete" and e.recipe]
    assert len(killed) == 1 and len(done) == len(set(done))
    assert (killed[0].recipe, killed[0].rows) in {(recipe, rows) for _, recipe, rows, _ in done}
    assert len({recipe for kind, recipe, *_ in done if kind == "trial"}) == 4


def test_it_spends_what_its_journal_says_and_no_more_than_it_may(searched):
    out, found = searched
    assert found.spent == total(Journal(out / "trials.jsonl").entries())
    assert 0 < found.spent["train_s"] <= 900 and 0 < found.spent["train_energy_j"] <= 9000
    trained = sum(run.record["cost"]["train_s"] for run in store.finished(out) if "int8" not in run.recipe)
    assert found.spent["train_s"] > trained  # opening, scoring and measuring are in it


def test_every_phase_is_in_the_ledger_once(searched):
    out, found = searched
    assert found.ledger.spent["train_flops"] == ledger.of([run.record for run in store.finished(out)]).spent["train_flops"]
    assert found.ledger.edh_flops == pytest.approx(found.ledger.spent["train_flops"])


def test_the_choice_is_among_what_was_confirmed_with_fresh_seeds_and_measured(searched):
    _, found = searched
    assert found.confirmed and found.best.cost.stored_mb <= 40
    assert {record["seed"] for record in found.front.records} == {1}
    assert all(record["cost"]["latency_p50_ms"] for record in found.front.records)
    assert all(len(pt.read_run(found.out / "runs" / e.run).record["phases"]) for e in found.entries if e.run)
    other = found.front.run(found.front.all[-1])
    assert found.break_even(other).value is None or found.break_even(other).value > 0


def test_models_that_are_made_alike_are_measured_once(place, tmp_path):
    def tried(recipe, rows):
        bench = Live(task(place), space=read(SPACE), backbones={"bert": str(place / "bert")}, out=tmp_path, options=options(), costs=("latency_p50_ms",))
        outcome = bench.work(recipe, rows, seed=0, watch=lambda spent: None)
        assert outcome.state == "complete", outcome.reason
        return pt.read_run(tmp_path / "runs" / outcome.run)

    first, *alike = [tried(*asked) for asked in (("lora(r=1) | merge", 30), ("lora(r=2) + schedule(lr=0.01) | merge", 30), ("lora(r=1) | merge", 60))]
    assert {run.record["cost_measured_on"] for run in (first, *alike)} == {first.id}
    assert {run.cost.latency_p50_ms for run in (first, *alike)} == {first.cost.latency_p50_ms} and first.cost.latency_p50_ms > 0
    assert len({run.cost.train_cpu_s for run in (first, *alike)}) == 3  # what training cost is each one's own
    assert "fresh process" in first.cost.reasons["peak_memory_mb"]
    for recipe in ("lora(r=1)", "lora(r=2)", "lora(r=1) | merge | int8"):
        other = tried(recipe, 30)
        assert other.record["cost_measured_on"] == other.id


def test_a_model_made_alike_for_another_task_is_measured_anew(place, tmp_path):
    (tmp_path / "longer.csv").write_text((place / "data.csv").read_text().replace("the ", "the very long and very winding "))
    ids = []
    for data in (place / "data.csv", tmp_path / "longer.csv"):
        given = {"space": read(SPACE), "backbones": {"bert": str(place / "bert")}, "out": tmp_path / "out", "options": options()}
        bench = Live(pt.task(str(data), text="text", label="label"), **given, costs=("latency_p50_ms",))
        made = pt.read_run(tmp_path / "out" / "runs" / bench.work("lora(r=1) | merge", 30, seed=0, watch=lambda spent: None).run)
        assert made.record["cost_measured_on"] == made.id
        ids.append((made.id, store.structure(made.model)))
    assert ids[0][0] != ids[1][0] and ids[0][1] == ids[1][1]


def test_it_chooses_among_backbones_and_measures_each(place, tmp_path):
    tiny.model("distilbert", "base").save_pretrained(place / "distilbert")
    tiny.tokenizer().save_pretrained(place / "distilbert")
    names = [str(place / name) for name in ("bert", "distilbert")]
    asked = {"backbone": ",".join(names), "space": "lora(r={1, 2})", "under": "latency_p50_ms=1e6", "out": tmp_path / "out"}
    found = pt.search(task(place), **asked, options=options(trials=4))
    tried = {e.recipe.partition(": ")[0] for e in found.entries if e.kind == "trial"}
    assert tried == set(names) and len({e.recipe for e in found.entries if e.kind == "trial"}) == 4
    records = [pt.read_run(folder.parent).record for folder in (tmp_path / "out" / "runs").glob("*/run.json")]
    assert {record["backbone"] for record in records} == set(names)
    assert len({(record["backbone"], record["cost"]["latency_p50_ms"]) for record in records if record["seed"] == 0}) == 4  # each of two models and ranks
    with pytest.raises(StoreError, match="the backbones differs"):
        pt.search(task(place), **{**asked, "backbone": names[0]}, resume=True, options=options(trials=4))


def test_a_finished_search_is_read_again_without_a_trial(searched, place):
    out, found = searched
    before = (out / "trials.jsonl").read_bytes()
    again = pt.search(task(place), backbone=str(place / "bert"), space=SPACE, budget=BUDGET, under="stored_mb=40", out=out, resume=True, options=options())
    assert again.best.id == found.best.id and (out / "trials.jsonl").read_bytes() == before


def test_other_limits_need_no_new_trial(searched, capsys):
    out, found = searched
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(out), "--under", "stored_mb=0.001"])
    assert ended.value.code == 0 and "nothing fits" in capsys.readouterr().out
    assert found.front.under(stored_mb=1000).id in {run.id for run in store.finished(out)}


def test_a_search_asked_for_other_limits_chooses_anew_without_a_trial(searched, place):
    out, found = searched
    before = (out / "trials.jsonl").read_bytes()
    given = {"backbone": str(place / "bert"), "space": SPACE, "budget": BUDGET, "out": out, "resume": True, "options": options()}
    tops = [e for e in found.entries if e.kind == "trial" and e.state == "complete" and e.rows == found.rows]
    for bound in sorted(e.cost["stored_mb"] for e in tops):
        again = pt.search(task(place), under=f"stored_mb={bound * 1.000001}", **given)
        assert again.best.cost.stored_mb <= bound * 1.000001
    assert pt.search(task(place), under="latency_p50_ms=1e6", **given).best.id in {run["id"] for run in found.front.records}  # another cost than it was searched by
    with pytest.raises(BudgetError, match="nearest|fits"):
        assert pt.search(task(place), under="stored_mb=0.0001", **given).best
    assert (out / "trials.jsonl").read_bytes() == before


def test_another_search_in_its_folder_is_refused(searched, place):
    out, _ = searched
    given = {"backbone": str(place / "bert"), "budget": BUDGET, "under": "stored_mb=40", "out": out, "options": options()}
    with pytest.raises(StoreError, match="--resume"):
        pt.search(task(place), space=SPACE, **given)
    with pytest.raises(StoreError, match="the space differs"):
        pt.search(task(place), space="lora(r={1, 2})", resume=True, **given)


@pytest.mark.parametrize(("given", "error", "complaint"), [
    ({"budget": None, "options": Options()}, BudgetError, "needs an end"),
    ({"budget": "stored_mb=3"}, BudgetError, "a cost of a model"),
    ({"budget": "train_s=0.5"}, BudgetError, "does not reach"),
    ({"space": "merge"}, Incompatible, "no adapter"),
])  # fmt: skip
def test_what_cannot_be_searched_is_refused(place, tmp_path, given, error, complaint):
    with pytest.raises(error, match=complaint):
        pt.search(task(place), **{"backbone": str(place / "bert"), "space": SPACE, "budget": BUDGET, "out": tmp_path / "out", "options": options(), **given})
    assert not list((tmp_path / "out").glob("runs/*"))


def test_a_worker_takes_part_from_a_folder_of_its_own_and_the_search_ends_in_its_own(place, tmp_path, capsys):
    url, out, asked = f"sqlite:///{tmp_path}/shared.db", tmp_path / "out", options(trials=3, storage=f"sqlite:///{tmp_path}/shared.db")
    given = {"backbone": str(place / "bert"), "space": "lora(r=[1..4])", "under": "stored_mb=40", "out": out, "resume": True, "options": asked}

    def killed_at_once() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("paretune.searches.searcher.Searcher.run", lambda self: os.kill(os.getpid(), signal.SIGKILL))
            pt.search(task(place), **given)

    with pytest.raises(SystemExit):
        cli.main(["worker", url])
    assert "no such file" in capsys.readouterr().err and not Path(url.removeprefix("sqlite:///")).exists()
    assert os.waitpid(child(killed_at_once), 0)[1] == signal.SIGKILL
    (tmp_path / "other.csv").write_text((place / "data.csv").read_text().replace("movie", "play"))
    for wrong, complaint in ((["--data", str(tmp_path / "other.csv")], "other data"), (["--backbone", "minilm"], "other weights"), (["--study", "x"], "name one")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["worker", url, "--out", str(tmp_path / "work"), *wrong])
        assert ended.value.code == 2 and complaint in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["worker", url, "--out", str(tmp_path / "work"), "--data", str(place / "data.csv"), "--backbone", str(place / "bert")])
    assert ended.value.code == 0 and "complete" in capsys.readouterr().out
    assert len(list((tmp_path / "work" / "runs").glob("*"))) > 1 and not (out / "runs").exists()
    with pytest.raises(StoreError, match="holds this search already, begun in"):
        pt.search(task(place), **{**given, "out": tmp_path / "third"})
    found = pt.search(task(place), **given)
    assert {e.kind for e in found.entries if (out / "runs" / e.run).is_dir() and e.run} == {"confirm"}  # all trials were the worker's
    assert found.confirmed and found.best.folder.parent == out / "runs"
    assert Journal(out / "trials.jsonl").entries() == found.entries
