"""Several recipes, each shared phase trained once; the frontier, its files, and the best run under two budgets.

    python examples/frontier.py [DATA BACKBONE OUT]
"""

from __future__ import annotations

import sys

import paretune as pt
from paretune.options import Metering, Options, Training

data, backbone, out = sys.argv[1:] or ["stdlib-topics", "minilm", "out/frontier"]

recipes = ["head", "lora", "lora | merge | int8", "full", "full | int8"]
options = Options(training=Training(epochs=2, max_train=500), metering=Metering(power="idle=6W,busy=28W"))
front = pt.frontier(pt.task(data), backbone=backbone, recipes=recipes, battery="15 Wh", out=out, resume=True, options=options)

for point in front.frontier("stored_mb"):  # no other point is both smaller and better
    low, high = point.interval("score")
    print(f"{point.value('stored_mb'):7.2f} MB  {point.value('score'):.3f} [{low:.3f}, {high:.3f}]  {point.recipe}")

lora = next(point for point in front.all if point.recipe == "lora")
gap, low, high = front.difference(lora, front.reference)
print(f"{lora.recipe} minus full fine-tuning: {gap:+.3f} [{low:+.3f}, {high:+.3f}], paired over test examples")

for budget in ("stored_mb=30", "latency_p50_ms=0.001"):
    try:
        print(f"under {budget}: {front.under_text(budget).recipe}")
    except pt.BudgetError as error:
        print(error)

book = front.ledger
print(f"the search: {book.h_trainings} trainings for {book.runs} runs, {book.spent['train_s']:.0f} s; alone they would have taken {book.unshared['train_s']:.0f} s")
print("written:", *front.report(out, ["stored_mb=30"]))
