"""A page of measurements says what its committed files hold: whoever changes one makes the other again (`--table`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import (  # noqa: E402
    adaptation,
    bits,
    components,
    contest,
    d90,
    episodes,
    features,
    folds,
    graphs,
    grids,
    growth,
    in_context,
    limits,
    method_steps,
    orders,
    raft,
    serving,
    shift,
    shrinking,
    slowdowns,
    step,
)

TABLES = (adaptation, bits, contest, d90, episodes, features, folds, growth, in_context, limits, raft, shift, shrinking)
TIMINGS = (components, graphs, method_steps, orders, serving, slowdowns, step)
PAGES = {page.name: page for page in (*(t.TABLE for t in TABLES), *(t.TIMING for t in TIMINGS), *grids.TABLES.values())}
BEFORE = ("step",)  # their figures are those of an older script, until they are measured again


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_made_of_its_files(name):
    page = PAGES[name]
    if not page.doc.is_file():
        pytest.skip(f"{page.doc.name} is not there yet: nothing of it was measured")
    if name in BEFORE:
        pytest.skip(f"{page.doc.name} is the page of an older script, whose figures the script of today measures anew")
    assert page.doc.read_text() == page.made(), f"docs/{page.doc.name} is not what its files say: make it again with --table"
