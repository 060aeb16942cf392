"""What two of the benchmarks' pages say beside their figures: pairs of recipes that differ in dropout, and the times faster that frozen layers promise."""

from __future__ import annotations

import types

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

import paretune as pt
from benchmarks import features
from benchmarks.grids import GRIDS
from paretune.pareto import intervals

GAPS = {"lora(r=8)": 1.0, "adapter": -0.5, "ia3": 0.0}  # points that dropout adds here, with each seed's own noise beside


def measured(cell):
    recipe, seed = next(r for r in GRIDS["dropout"].recipes if cell.startswith(r)), int(cell[-1])
    method = recipe.split(" +")[0]
    score = 80 + (GAPS[method] + 0.1 * (seed - 2) if "dropout=True" in recipe else 0.0)
    return {"score": score / 100, "train_cpu_s": 5.0, "trainable_parameters": 7}


def test_the_dropout_grid_compares_runs_that_differ_in_dropout_alone():
    grid = GRIDS["dropout"]
    for with_it, without in zip(grid.recipes[::2], grid.recipes[1::2], strict=True):
        one, other = (pt.parse(text).phases[0] for text in (with_it, without))
        assert one[0] == other[0] and one[1].dropout and not other[1].dropout
    table = types.SimpleNamespace(name="dropout", found=measured)
    rows = {line.split(" | ")[0].strip("| "): line for line in grid.page(table).splitlines() if "Srivastava" in line}
    for method, gap in GAPS.items():
        pairs = [gap + 0.1 * (seed - 2) for seed in grid.seeds for _ in grid.columns]
        (low, high), _ = intervals.over_seeds(pairs, [None] * len(pairs))
        assert f"{gap:+.1f} ({low:+.1f} to {high:+.1f}, 15 pairs)" in rows[f"{method} + schedule(dropout=False)"].replace("-0.0 (", "+0.0 (")
    assert "45 pairs" in rows["dropout=False"]
    assert "80.0 ± 0.0" in grid.page(table) and "95 % interval" in grid.page(table)


@pytest.mark.parametrize("recipe", [r for r, (left, _) in features.TIMED.items() if left])
def test_times_faster_by_the_layers_is_the_ratio_of_counted_operations(recipe):
    """Counted by torch: all layers forward and those that learn backward, against those that learn alone; the lowest maps that learn pass no gradient down."""
    left, backward = features.TIMED[recipe]
    model = tiny.model("bert", config={"num_hidden_layers": features.LAYERS}).train()
    pt.adapt(model, recipe)
    layers, x = model.bert.encoder.layer, torch.randn(2, 8, 16)

    def counted(through):
        with FlopCounterMode(display=False) as count:
            h = x
            for layer in through:
                h = layer(h)
                h = h[0] if isinstance(h, tuple) else h
            h.sum().backward()
        return count.get_total_flops()

    assert features.by_layers(left, backward) == pytest.approx(counted(layers) / counted(layers[-left:]), rel=0.15)
