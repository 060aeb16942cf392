"""The benchmarks of speed, memory and their growth say of every target whether the files meet it, and count a step by all of its parts."""

from __future__ import annotations

import itertools
import json

import pytest
import work

from benchmarks import cells, contest, growth, limits, shrinking
from paretune import registry, surgery, training
from paretune.methods.adapters.full import Full
from paretune.methods.modifiers.schedule import Schedule


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a cell's file of a table."""
    monkeypatch.setattr(cells, "ROOT", tmp_path)

    def write(table, cell, **figures):
        table.file(cell).parent.mkdir(parents=True, exist_ok=True)
        table.file(cell).write_text(json.dumps({"cell": cell, "commit": "abc", "date": "2026-11-22", **figures}))

    return write


def _row(page, start, after=""):
    """The texts of the first row of a page that starts so, behind a heading."""
    lines = page[page.index(after) :].splitlines()
    return [text.strip() for text in next(line for line in lines if line.startswith(f"| {start}")).strip("| ").split("|")]


def _round(times, mb, right):
    """A round in which paretune is so many times as fast as each of the others, and takes so much memory beside their 100 MB."""
    others = {"examples_per_s": 10.0, "cpu_s": 2.0, "added_mb": 100.0, "peak_mb": 200.0, "score": 0.5, "right": "0101", "versions": {"transformers": "5"}}
    ours = {**others, "examples_per_s": 10.0 * times, "added_mb": mb, "right": right}
    return {contest.OURS: ours, contest.AGAIN: ours, contest.DOCUMENTED: others, contest.GIVEN: others, contest.PLAIN: others}


def test_the_contest_judges_each_target_by_medians_of_quotients(written):
    rounds = [_round(times, mb, "0101") for times, mb in ((3.0, 60), (6.0, 90), (4.0, 65))]
    written(contest.TABLE, "lora, SST-2", protocol=contest.PROTOCOL, train=9, rounds=rounds, environment={"cpu": "a chip", "threads": 2})
    written(contest.TABLE, "ia3, SST-2", rounds=rounds)
    page = contest.page(contest.TABLE)
    assert _row(page, "lora, SST-2", "## Targets")[1:] == [
        "4.00 (3.00 to 6.00): not met", "4.00 (3.00 to 6.00): met", "4.00 (3.00 to 6.00): met", "0.65 (0.60 to 0.90): met", "0.65 (0.60 to 0.90): met", "-",
    ]  # fmt: skip
    assert _row(page, "met", "## Targets")[1:] == ["0 of 1", "1 of 1", "1 of 1", "1 of 1", "1 of 1", "0 of 0"]
    assert _row(page, "ia3, SST-2", "## CPU")[1:] == [cells.NOT_RUN] * 6  # a file of an older protocol
    assert _row(page, "lora, SST-2", "## CPU")[1:] == ["2.00 (2.00 to 2.00)"] * 4 + ["-", "2.00 (2.00 to 2.00)"]
    assert "SST-2: 9 examples" in page and _row(page, "lora, all of SST-2", "The long cell")[1:] == [cells.NOT_RUN] * 2


@pytest.mark.parametrize("right, said", [("01010101", "+0.0 (+0.0 to +0.0), within noise"), ("11111111", "+50.0 (+12.5 to +87.5), told apart")])
def test_equal_scores_are_told_from_unequal_ones(right, said, written):
    rounds = [_round(1.0, 50, right) for _ in range(3)]
    for name in rounds[0]:
        for found in rounds:
            found[name]["right"] = right if name in (contest.OURS, contest.AGAIN) else "01010101"
    written(contest.TABLE, "lora, all of SST-2", protocol=contest.PROTOCOL, train=9, rounds=rounds, environment={"cpu": "a chip", "threads": 2})
    assert _row(contest.page(contest.TABLE), f"lora, all of SST-2, {contest.PLAIN}", "The long cell")[2] == said


def test_a_long_cell_runs_only_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    table = cells.Table("some", lambda: [cells.Cell("short", lambda: {"score": 1.0}), cells.Cell("long", lambda: {"score": 1.0}, True)], lambda table: "")
    for asked, there in (([], False), (["--long"], True)):
        monkeypatch.setattr("sys.argv", ["some", *asked])
        table.main()
        assert table.file("short").is_file() and table.file("long").is_file() is there


def test_a_step_is_all_of_its_parts_and_only_later_ones_are_profiled():
    model, watch, profiled = work.ready("bert"), limits.Watch(), limits.Profiled()
    surgery.attach(model, [Full()])
    task = work.text_task(train=32)
    training.fit(model, task, schedule=Schedule(lr=1e-3, epochs=1.0, batch=8, micro_batch=2, dtype="fp32"), modifiers=[watch, profiled])
    assert [[len(part["labels"]) for part in step] for step in watch.steps] == [[2] * 4] * 4 and len(watch.marks) == 4
    steps = sum(event.count for event in profiled.profile.key_averages() if event.key.startswith("Optimizer.step"))
    assert steps == 4 - limits.WARM and sum(profiled.where().values()) == pytest.approx(1.0)


def test_growth_is_judged_beside_the_model_itself(written):
    def points(power):
        return [{"n": n, "cpu_s": n**power, "added_mb": float(n), "took_s": 1.0, "dtype": "fp32", "attention": "sdpa"} for n in growth.LINES["length"]]

    here = {"cpu": "a chip", "threads": 2, "memory_mb": 9000}
    for method, power in (("full", 1.5), ("lora", 1.55), ("ia3", 1.7)):
        written(growth.TABLE, f"{method} length", points=points(power), environment=here)
    page = growth.page(growth.TABLE)
    assert _row(page, "`lora`, CPU ms", "## Length")[-3:] == ["1.55", "1.60", "met"] and _row(page, "`ia3`, CPU ms", "## Length")[-3:] == ["1.70", "1.60", "not met"]
    assert _row(page, "`lora`, added MB", "## Length")[-3:] == ["1.00", "1.10", "met"] and "3 of 4 figures" in page.replace("\n", " ")
    assert _row(page, "`adapter`, CPU ms", "## Length")[-1] == cells.NOT_RUN


def test_the_card_of_int8_says_what_one_text_took_beside_bf16():
    times = [shrinking.TABLE.found(f"time {task}")["rows"] for task in shrinking.TASKS]
    packed, graph = ([row[name]["one"]["p50_ms"] / row[shrinking.BF16]["one"]["p50_ms"] for row in times] for name in ("int8", "int8, onnx"))
    said = f"it took {min(packed):.3g} to {max(packed):.2g} times bf16's time on three tasks, and as an ONNX graph {min(graph):.2f} to {max(graph):.2f} of it"
    assert said in registry.get("int8").card.note


def test_the_readme_says_what_the_contest_found():
    said = " ".join((cells.ROOT / "README.md").read_text().split())
    assert contest.sentence(contest.TABLE) in said
    assert shrinking.sentence() in said


def _shrunk(written, *, refused=(), thin_ms=1.0):
    """The files of a shrinking table in which thin layers are four times as small and nothing else is, and its page."""
    for task, seed in itertools.product(shrinking.TASKS, shrinking.SEEDS):
        for name in shrinking.ROWS:
            found = {"score": 0.9, "stored_mb": 20.0 if "thin l" in name else 80.0}
            found = {"score": None, "stored_mb": None, "refused": "it drifts"} if (name, seed) in refused else found
            written(shrinking.TABLE, f"score {task} {name} {seed}", validation_score=0.9, **found)
        each_ms = {name: thin_ms if "thin l" in name else 8.0 for name in shrinking.ROWS if (name, 0) not in refused}
        figures = {name: {how: {"batch": n, "p50_ms": n * ms, "p95_ms": n * ms, "cpu_ms_per_text": ms, "per_s": 1e3 / ms} for how, n in (("one", 1), ("batched", 4))}
                   for name, ms in each_ms.items()}  # fmt: skip
        written(shrinking.TABLE, f"time {task}", rows=figures, aa_wall=0.05, aa_cpu=0.01, threads=2, score=0.9, environment={"cpu": "a chip", "cpu_flags": ["avx2"]})
    shrinking.row.cache_clear()
    try:
        return shrinking.page(shrinking.TABLE)
    finally:
        shrinking.row.cache_clear()


def test_shrinking_judges_each_target_by_the_row_that_comes_nearest(written):
    assert "sst2, deployable: **met**, nearest: thin layers, distilled, 8.0 times as fast as fp32 at batch 1 (asked 4), 8.00 times eager bf16" in _shrunk(written)
    assert "sst2, deployable: **not met**, nearest: thin layers, distilled, 2.7 times" in _shrunk(written, thin_ms=3.0)
    assert "sst2, combined: **not met**" in _shrunk(written), "four times as small is not ten times"


def test_a_refused_graph_says_so_and_counts_for_no_target(written):
    thin = [name for name in shrinking.ROWS if "thin l" in name]
    page = _shrunk(written, refused={(name, 0) for name in thin[1:]} | {(thin[0], 1)})
    assert _row(page, thin[1], "## sst2")[1:3] == ["90.0 ± 0.0 (2 of 3 seeds)", "refused in 1 of 3"]
    assert _row(page.split("## sst2")[1], thin[1], "times as fast")[1] == "refused", "it was not timed: there is no graph of the first seed"
    assert "sst2, deployable: **not met**" in page and not any(f"nearest: {name}," in page for name in thin)
