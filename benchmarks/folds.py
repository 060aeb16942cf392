"""Do adapters reach full fine-tuning? stdlib-topics in five rotated hash splits, so that every text is tested once.

    python -m benchmarks.folds [--hours 2] [--folds 0,1]      fills missing cells, one committed file per (recipe, fold)
    python -m benchmarks.folds --table                        writes docs/folds.md from the files alone

Every method has its card's own learning rate and the same epochs; the epoch is chosen on validation. The difference to
`full` is paired over the test texts of all folds, with a bootstrap interval. Cells that were not run read 'not run'.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = ("full", "lora(r=8)", "adapter", "head")
FOLDS = 5
RESULTS = Path(__file__).parent / "results" / "folds"
PAGE = Path(__file__).parent.parent / "docs" / "folds.md"


def main() -> None:
    """Fills cells for the hours given, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0, help="begin no cell after so many hours")
    parser.add_argument("--folds", default=",".join(map(str, range(FOLDS))), help="which folds to fill")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    until = time.monotonic() + 3600 * asked.hours
    for fold in () if asked.table else map(int, asked.folds.split(",")):
        for recipe in RECIPES:
            if not _file(recipe, fold).is_file() and time.monotonic() < until:
                _file(recipe, fold).parent.mkdir(parents=True, exist_ok=True)
                _file(recipe, fold).write_text(json.dumps(cell(recipe, fold), indent=1) + "\n")
                print(recipe, fold, "done", flush=True)
    PAGE.write_text(page())


def cell(recipe: str, fold: int) -> dict[str, Any]:
    """One recipe on one fold: its run record, with 1.0 or 0.0 per test text."""
    import paretune as pt
    from paretune import flow, runs

    task = pt.task("stdlib-topics").rotate(fold, of=FOLDS)
    with tempfile.TemporaryDirectory() as out:
        ((text, plan),) = flow.plan_frontier(task, backbone="minilm", recipes=[recipe], out=out)
        made = runs.make(plan, text)
        kept = ("recipe", "resolved", "seed", "metric", "score", "score_low", "score_high", "validation_score", "task_fingerprint", "weights_sha256",
                "environment", "date", "cost", "phases")  # fmt: skip
        return {**{k: made.record[k] for k in kept}, "fold": fold, "train": len(task.train), "version": task.version, "per_example": made.per_example()}


def page() -> str:
    """The table, from the files."""
    from paretune.pareto import intervals

    cells = {(r, f): json.loads(_file(r, f).read_text()) for r in RECIPES for f in range(FOLDS) if _file(r, f).is_file()}
    lines = ["| recipe | " + " | ".join(f"fold {f}" for f in range(FOLDS)) + " | all texts (95 %) | minus full (paired, 95 %) | trainable | train CPU s |",
             "|---" * (FOLDS + 5) + "|"]  # fmt: skip
    for recipe in RECIPES:
        mine = [cells.get((recipe, f)) for f in range(FOLDS)]
        scores = [f"{100 * c['score']:.1f}" if c else "not run" for c in mine]
        both = [f for f in range(FOLDS) if (recipe, f) in cells and ("full", f) in cells]
        flat = [x for c in mine if c for x in c["per_example"]]
        low, high = intervals.score_interval([flat]) if flat else (0.0, 0.0)
        whole = f"{100 * sum(flat) / len(flat):.1f} ({100 * low:.1f} to {100 * high:.1f})" if flat else "not run"
        gap = "-"
        if both and recipe != "full":
            a, b = ([x for f in both for x in cells[r, f]["per_example"]] for r in (recipe, "full"))
            gap = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in intervals.difference([a], [b])))
        known = next((c for c in mine if c), None)
        rest = (
            [f"{known['cost']['trainable_parameters']:,}", f"{sum(c['cost']['train_cpu_s'] for c in mine if c) / sum(map(bool, mine)):.0f}"]
            if known
            else ["-", "-"]
        )
        lines.append(f"| `{recipe}` | " + " | ".join([*scores, whole, gap, *rest]) + " |")
    some = next(iter(cells.values()), None)
    about = (
        f"{some['train']:,} training texts a fold, {some['version']}, {some['environment'].get('cpu', 'this machine')}, seed {some['seed']}."
        if some
        else "Not run."
    )
    return f"""# Adapters against full fine-tuning on stdlib-topics

Accuracy in percent. Five rotated hash splits, so that every text is tested once; {about}
Each method has the learning rate of its card and three epochs; the epoch is chosen on validation, and scores are on the
fold's test texts, which no choice has seen. One seed: the interval covers the choice of texts, not of seeds.

{chr(10).join(lines)}

Made by `python -m benchmarks.folds` from the files in `benchmarks/results/folds/`; `--table` makes it again from them.
"""


def _file(recipe: str, fold: int) -> Path:
    return RESULTS / f"{recipe.split('(')[0]}_{fold}.json"


if __name__ == "__main__":
    main()
