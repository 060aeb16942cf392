"""The verb that says what more data buys: learning-curve."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from paretune.cli.flags import Data, Place, command_line, verb
from paretune.cli.job import check_names, opened
from paretune.options import Compute, Metering, Options, Training


@verb("paretune learning-curve 'lora(r=8)' reviews.csv --text review --label stars --backbone minilm --out out/")
def learning_curve(recipe: str, data: Data, *, place: Place, seeds: int, training: Training, compute: Compute) -> None:
    """Trains RECIPE on growing shares of DATA and says what the next doubling would buy, in points and seconds.

    Writes learning_curve.png and learning_curve.json into the results folder; the runs are as `paretune run` makes them, without costs of inference.
    """
    check_names([recipe])
    task = opened(data, [recipe], compute=compute, metering=Metering())
    from paretune import flow, learning_curves, store
    from paretune.cli import progress
    from paretune.reports import curve as picture
    from paretune.units import show

    with progress.Progress() as report:
        made = flow.learning_curve(
            recipe, task, backbone=place.backbone, seeds=seeds, out=place.out, resume=place.resume, options=Options(training, compute, report=report)
        )
    place.record_command()
    points = learning_curves.points(made)
    doubled = learning_curves.next_doubling(points)
    folder = Path(place.out)
    store.write_json(folder / "learning_curve.json", {"command": command_line(), "recipe": recipe, **dataclasses.asdict(points), **dataclasses.asdict(doubled)})
    path = picture.save(points, doubled, path=folder / "learning_curve.png", title=f"{recipe} on {task.name}, {task.metric}")
    for size, score, seconds in zip(points.sizes, points.scores, points.train_s, strict=True):
        click.echo(f"{size:>8,} rows   {task.metric} {score:.3f}   {show(seconds, 's')}")
    click.echo(doubled.describe(task.metric))
    click.echo(f"picture: {path}")
