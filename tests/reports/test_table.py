"""runs.csv as csv and pandas read it, formulas made harmless, and the answer that is printed."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from pareto.synthetic import record, records
from rich.console import Console

from paretune.meters.cost import MEASURED
from paretune.pareto import budgets
from paretune.pareto.front import Front
from paretune.reports import table


def read(front: Front, folder: Path) -> list[dict[str, str]]:
    with table.save(front, folder / "runs.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_run_is_a_row_and_every_number_comes_back(tmp_path: Path) -> None:
    runs = records(2)
    rows = read(Front(runs, "15 Wh"), tmp_path)
    assert [row["id"] for row in rows] == [run["id"] for run in runs]
    for row, run in zip(rows, runs, strict=True):
        assert row["recipe"] == run["recipe"] and float(row["score"]) == run["score"]
        assert [float(row[name]) for name in MEASURED] == [run["cost"][name] for name in MEASURED]
        usable = 15 * 3600 * 0.85
        assert abs(float(row["inferences_per_charge"]) * run["cost"]["energy_per_inference_j"] / usable - 1) < 1e-12
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


def test_what_is_missing_is_empty_and_its_reason_is_in_the_row(tmp_path: Path) -> None:
    (row,) = read(Front([record("full", energy=False)], "15 Wh"), tmp_path)
    assert row["train_energy_j"] == row["inferences_per_charge"] == row["energy_per_inference_j_low"] == ""
    assert "train_energy_j: nothing here measures energy" in row["reasons"]


def test_what_a_spreadsheet_would_run_is_text(tmp_path: Path) -> None:
    hostile = ['=HYPERLINK("http://x","y")', "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", 'comma, "quote"\nline']
    rows = read(Front([record("full") | {"id": str(i), "recipe_id": str(i), "recipe": text} for i, text in enumerate(hostile)]), tmp_path)
    assert [row["recipe"] for row in rows] == [*("'" + text for text in hostile[:-1]), hostile[-1]]


def test_the_answer_names_recipe_and_command_or_the_nearest() -> None:
    front = Front(records(), "15 Wh")
    fits, nothing = table.answers(front, [budgets.parse("stored_mb=30"), budgets.parse("stored_mb=3")])
    assert fits["recipe"] == "lora(r=8) | merge | vocabulary | int8" and fits["run"] in {run["id"] for run in front.records}
    assert fits["command"].startswith("paretune run 'lora(r=8) | merge | vocabulary | int8' --task stdlib-topics")
    assert "nearest is lora(r=8) | merge | vocabulary | int8" in nothing["error"] and "command" not in nothing


def test_the_printed_table_shows_every_recipe_and_no_markup_is_obeyed() -> None:
    runs = [*records(1), record("full") | {"id": "x", "recipe_id": "x", "recipe": "[bold]full[/nothing]"}]
    out = io.StringIO()
    table.show_all(Front(runs, "15 Wh"), [budgets.parse("stored_mb=30")], console=Console(file=out, width=200))
    text = out.getvalue()
    assert "[bold]full[/nothing]" in text and "full  (reference)" in text
    assert "paretune run 'lora(r=8) | merge | vocabulary | int8' --task stdlib-topics --backbone minilm --seed 0" in text
    assert re.search(r"The whole search: \d+ trainings, [\d,.]+ \w*FLOP, [\d,.]+ s, [\d,.]+ \w*J\.\n", text)
    assert text.count("●") == len(Front(runs, "15 Wh").frontier("inferences_per_charge")) + 1  # and the legend


def test_the_ledger_leaves_out_what_was_not_measured() -> None:
    out = io.StringIO()
    table.show_all(Front(records(1, energy=False)), console=Console(file=out, width=200))
    assert re.search(r"The whole search: \d+ trainings, [\d,.]+ \w*FLOP, [\d,.]+ s\.\n", out.getvalue())
