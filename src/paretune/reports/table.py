"""runs.csv, one row per run; and the answer for the terminal: the points, the best recipe under each budget, how to run it again."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paretune import store
from paretune.errors import BudgetError
from paretune.meters.cost import MEASURED, Cost
from paretune.pareto import records
from paretune.pareto.budgets import Budget, chosen_on
from paretune.pareto.front import CHARGE, Front
from paretune.pareto.records import Record
from paretune.reports import words
from paretune.units import show

_FIRST = ("id", "recipe", "backbone", "task", "seed", "metric", "validation_score", "score", "score_low", "score_high")
_LAST = ("energy_meter", "energy_estimated", "energy_scale_low", "energy_scale_high", "protocol", "loads_with", "battery", "rate_per_s",
         "task_fingerprint", "resolved", "reasons")  # fmt: skip
_RANGED = ("latency_p50_ms", "energy_per_inference_j")  # quantities whose own interval has two columns beside
COLUMNS = (*_FIRST, CHARGE, *(c for name in MEASURED for c in (name, *((f"{name}_low", f"{name}_high") if name in _RANGED else ()))), *_LAST)


def save(front: Front, path: Path) -> Path:
    """Writes one row per run as CSV (UTF-8, empty where not measured, the reasons in the last column); returns the path.

    A text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    with store.written_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for record in front.records:
            writer.writerow({name: _cell(value) for name, value in row(front, record).items()})
    return path


def row(front: Front, record: Record) -> dict[str, Any]:
    """The row of one run: column name to value, None where there is none."""
    cost = Cost.from_json(record["cost"])
    charge, meter = front.inferences(cost), cost.meter
    reasons = cost.reasons | ({} if charge.value is not None else {CHARGE: charge.reason})
    out = {name: record.get(name) for name in _FIRST} | {CHARGE: charge.value}
    for name in MEASURED:
        out[name] = getattr(cost, name)
        if name in _RANGED:
            out[f"{name}_low"], out[f"{name}_high"] = records.interval(record, name) or (None, None)
    return out | {
        "energy_meter": meter.get("name"),
        "energy_estimated": meter.get("estimate"),
        "energy_scale_low": meter.get("scale_low"),
        "energy_scale_high": meter.get("scale_high"),
        "protocol": cost.protocol,
        "loads_with": record.get("loads_with"),
        "battery": front.battery_label or None,
        "rate_per_s": front.rate_per_s,
        "task_fingerprint": record["task_fingerprint"],
        "resolved": record.get("resolved"),
        "reasons": "; ".join(f"{name}: {why}" for name, why in reasons.items()) or None,
    }


def answers(front: Front, budgets: Sequence[Budget]) -> list[dict[str, Any]]:
    """For each budget the best recipe, its run and the command that runs it again; or `error`, with the nearest one."""
    out: list[dict[str, Any]] = []
    for budget in budgets:
        try:
            point = front.best(budget)
        except BudgetError as error:
            out.append({"budget": str(budget), "error": str(error)})
            continue
        run = front.run(point)
        record = run if isinstance(run, dict) else run.record
        out.append({"budget": str(budget), "recipe": words.of_several(front, point), "score": words.with_interval(point.value("score"), point.interval("score")),
                    "costs": {limit.quantity.name: show(point.value(limit.quantity.name), limit.quantity.unit) for limit in budget.limits},
                    "run": record["id"], "command": words.command(record)})  # fmt: skip
    return out


def show_all(front: Front, budgets: Sequence[Budget] = (), *, console: Console | None = None) -> None:
    """Prints the points as a table, the ledger, and the answer to each budget."""
    console = console or Console()
    x = words.first_axis(front)
    console.print(points(front, x, narrow=console.width < 110))
    book = front.ledger
    sums = ((book.edh_flops, "FLOP"), (book.spent["train_s"], "s"), (book.spent["train_energy_j"], "J"))
    spent = ", ".join([f"{book.h_trainings} training{'s' * (book.h_trainings != 1)}", *(show(value, unit) for value, unit in sums if value is not None)])
    console.print(Text(f"● not beaten in {front.metric} and {records.named(x).label}. The whole search: {spent}.\nenergy: {words.energy(front)}"))
    chosen = "validation" if chosen_on([p.summary for p in front.all]) == "validation_score" else "test"
    for answer in answers(front, budgets):
        text = Text(f"\nunder {answer['budget']}: ", style="bold")
        if "error" in answer:
            console.print(text.append(answer["error"], style="not bold yellow"))
            continue
        text.append(answer["recipe"], style="green")
        costs = ", ".join(f"{name} {value}" for name, value in answer["costs"].items() if name != "score")
        text.append(f"\n  {front.metric} {answer['score']}{costs and ', ' + costs} (chosen on {chosen}; run {answer['run']})", style="not bold")
        text.append(f"\n  {answer['command']}", style="not bold cyan")
        console.print(text, soft_wrap=True)


def points(front: Front, x: str, *, narrow: bool = False) -> Table:
    """The points as a table, the best score first; a dot marks the frontier of score against x. A narrow one leaves out what training cost."""
    stands = front.frontier(x)
    training = "train_energy_j" if front.points("train_energy_j") else "train_s"
    names = list(dict.fromkeys((x, "latency_p50_ms", "stored_mb", *(() if narrow else (training, "trainable_parameters")))))
    title = Text(f"{front.records[0]['task']} · {words.setting(front)}")
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    table.add_column("recipe", overflow="fold", min_width=12 if narrow else 24)
    table.add_column(f"{front.metric} [95 %]", justify="right", no_wrap=True)
    for name in names:
        table.add_column(_heading(front, name), justify="right", min_width=7)
    better = records.named("score", front.metric).better
    for point in sorted(front.all, key=lambda p: p.value("score"), reverse=better == "higher"):
        costs = [show(point.value(name), records.named(name).unit, digits=4 if name == CHARGE else 3) for name in names]
        style = "bold" if point in stands else ""
        label = Text(words.of_several(front, point) + ("  (reference)" if point is front.reference else ""))
        table.add_row("●" if point in stands else "", label, words.with_interval(point.value("score"), point.interval("score")), *costs, style=style)
    return table


def _heading(front: Front, name: str) -> str:
    brief = {CHARGE: "inferences / charge", "latency_p50_ms": "latency p50", "stored_mb": "stored", "train_s": "training",
             "train_energy_j": "training", "trainable_parameters": "trainable"}  # fmt: skip
    return brief.get(name, name) + (" (est.)" if name in words.ENERGIES and words.estimated(front) else "")


def _cell(value: Any) -> Any:
    """A cell that a spreadsheet reads as what it is."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value
