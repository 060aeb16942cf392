"""The picture's parts, asked of matplotlib: points, bars, stairs, reference, words; and labels that keep off each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from pareto.synthetic import RECIPES, record, records

from paretune.pareto.front import Front
from paretune.reports import labels, plot, words


def containers(axes: Axes) -> dict[str, ErrorbarContainer]:
    return {c.get_label(): c for c in axes.containers}


@pytest.fixture(scope="module")
def front() -> Front:
    return Front(records(), "15 Wh", rate="1/s")


def test_every_recipe_is_a_point_with_its_bars(front: Front) -> None:
    (axes,) = plot.draw(front).axes
    drawn = {tuple(xy) for c in containers(axes).values() for xy in c.lines[0].get_xydata()}
    assert drawn == {(p.value("inferences_per_charge"), p.value("score")) for p in front.all}
    ends = {tuple(np.round(seg[:, 1], 9)) for c in containers(axes).values() for bars in c.lines[2] for seg in bars.get_segments()}
    assert {tuple(np.round(p.interval("score"), 9)) for p in front.all} <= ends
    assert axes.get_xscale() == "log"


def test_the_stairs_go_over_the_frontier_and_the_reference_stands_alone(front: Front) -> None:
    (axes,) = plot.draw(front).axes
    stands = front.frontier("inferences_per_charge")
    (stairs,) = [line for line in axes.lines if line.get_drawstyle() == "steps-pre"]
    assert stairs.get_xydata().tolist() == [[p.value("inferences_per_charge"), p.value("score")] for p in stands]
    (full,) = containers(axes)["full fine-tuning, the reference"].lines[0].get_xydata().tolist()
    assert full == [front.reference.value("inferences_per_charge"), front.reference.value("score")]
    (lower,) = [line for line in plot.draw(front, "latency_p50_ms").axes[0].lines if line.get_drawstyle().startswith("steps")]
    assert lower.get_drawstyle() == "steps-post"


def test_title_axes_and_caption_say_what_is_shown(front: Front) -> None:
    figure = plot.draw(front)
    text = " ".join(t.get_text() for t in figure.texts).replace("\n", " ")
    parts = ("15 Wh battery at 1 inference/s", "estimated with CPU time", "between 0.33 and 3", "protocol: quick", "3 seeds (0, 1, 2)")
    assert all(part in text for part in parts)
    assert "inferences per battery charge, estimated" in figure.axes[0].get_xlabel() and figure.axes[0].get_ylabel() == "accuracy"
    unknown = plot.draw(Front(records(1, energy=False), "15 Wh"))
    assert "latency" in unknown.axes[0].get_xlabel()
    assert "not measured: nothing here measures energy" in " ".join(t.get_text() for t in unknown.texts)


@pytest.mark.parametrize("x", ["inferences_per_charge", "latency_p50_ms", "stored_mb", "train_s"])
def test_labels_do_not_overlap_and_stay_inside(front: Front, x: str) -> None:
    figure = plot.draw(front, x)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert sorted(t.get_text() for t in axes.texts) == sorted(words.names(front))
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 + 2 and frame.y0 <= box.y0 and box.y1 <= frame.y1 + 2 for box in boxes)


def test_of_many_points_only_the_frontier_and_the_reference_are_named() -> None:
    many = [record("full"), *(record("head", seed) | {"recipe_id": f"r{seed}", "recipe": f"head(k={seed})"} for seed in range(30))]
    front = Front(many, "15 Wh")
    named = {*front.frontier("inferences_per_charge"), front.reference}
    assert len(plot.draw(front).axes[0].texts) == len(named) < len(front.all)


def test_a_single_run_and_hostile_names_are_drawn(tmp_path: Path) -> None:
    hostile = record("full") | {"recipe": r"$\frac{1}{$<script>", "id": "x", "recipe_id": "x", "task": "$x$"}
    path = plot.save(Front([hostile]), tmp_path / "frontier.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_lone_label_stands_beside_its_point() -> None:
    anchor, size = np.array([[200.0, 100.0]]), np.array([[80.0, 12.0]])
    (center,) = labels.place(anchor, size, frame=np.array([0.0, 0.0, 400.0, 200.0]), obstacles=np.array([[193.0, 93.0, 207.0, 107.0]]))
    gap = np.abs(center - anchor[0]) - size[0] / 2
    assert 0 < gap.max() <= 15


def test_crowded_labels_are_spread() -> None:
    rng = np.random.default_rng(0)
    anchors, sizes = rng.uniform(300, 420, (len(RECIPES), 2)), np.tile([120.0, 14.0], (len(RECIPES), 1))
    centers = labels.place(anchors, sizes, frame=np.array([0.0, 0.0, 900.0, 700.0]), obstacles=np.hstack([anchors - 5, anchors + 5]))
    apart = np.abs(centers[:, None] - centers[None]) >= sizes[0] - 1e-9
    assert (apart.any(axis=2) | np.eye(len(centers), dtype=bool)).all()
