"""The verbs that train: run and frontier."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paretune import registry
from paretune.cli.flags import Budgets, Data, Place, Search, check_device, command_line, verb
from paretune.cli.verbs import say
from paretune.options import Compute, Metering, Options, Training

if TYPE_CHECKING:
    from paretune.tasks import Task

ASSUMED = "laptop"  # the power profile of a frontier's estimate, where nothing measures and no power is stated
ANSWERS = "frontier.json"  # what a frontier was asked, so that `report` draws it again


@verb("paretune run 'lora(r=8) | merge | int8' reviews.csv --text review --label stars --backbone minilm --out out/")
def run(recipe: str, data: Data, *, place: Place, seed: int, training: Training, compute: Compute, metering: Metering) -> None:
    """Trains, shrinks, scores and measures one RECIPE on DATA.

    The result is out/runs/<id>/: run.json with scores and costs, and the model in Hugging Face format.
    """
    check_names([recipe])
    task = opened(data, [recipe], compute=compute, metering=metering)
    from paretune import flow
    from paretune.cli import progress, show

    with progress.Progress() as report:
        options = Options(training, compute, metering, report)
        made = flow.run(recipe, task, backbone=place.backbone, out=place.out, seed=seed, resume=place.resume, options=options)
    place.record_command()
    show.run(made)


@verb("paretune frontier reviews.csv --text review --label stars --backbone roberta-base --battery 15Wh --out out/\n"
      "paretune frontier --task stdlib-topics --recipe head --recipe 'lora(r=8) | merge' --under 'latency_p50_ms=20, stored_mb=30'")  # fmt: skip
def frontier(data: Data, search: Search, *, place: Place, budgets: Budgets, training: Training, compute: Compute, metering: Metering) -> None:
    """Runs recipes on DATA and draws score against what a budget buys.

    Writes frontier.png, frontier.html and runs.csv into the results folder, and prints the best recipe under each budget.
    """
    check_names(search.recipes)
    budgets.check()
    training = dataclasses.replace(training, time_budget_s=search.time_budget_s)
    task = opened(data, search.recipes, compute=compute, metering=metering)
    from paretune import flow, store
    from paretune.cli import progress, show

    metering, budgets = with_power(metering, budgets, compute=compute)
    with progress.Progress() as report:
        options = Options(training, compute, metering, report)
        front = flow.frontier(
            task, backbone=place.backbone, recipes=search.recipes or None, seeds=search.seeds, out=place.out, resume=place.resume, options=options
        )
    place.record_command()
    store.write_json(Path(place.out) / ANSWERS, {**dataclasses.asdict(budgets), "command": command_line()})
    show.front([store.Run.read(Path(place.out) / "runs" / record["id"]) for record in front.records], budgets, out=Path(place.out))


def check_names(recipes: Sequence[str]) -> None:
    """Refuses the name of a method that is not in the catalogue, before torch is imported."""
    for recipe in recipes:
        bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", recipe)
        for name in re.findall(r"(?:^|[|+])\s*([A-Za-z_]\w*)", bare):
            registry.describe(name)


def opened(data: Data, recipes: Sequence[str], *, compute: Compute, metering: Metering) -> Task:
    """The task, after every check that needs no backbone."""
    from paretune.meters import energy
    from paretune.recipe import parse

    data.check()
    if metering.power or metering.profile:
        energy.find(metering.power, metering.profile)
    for recipe in recipes:
        parse(recipe)
    check_device(compute)
    task = data.open()
    for note in (task.describe(), *task.notes):
        say(note)
    return task


def with_power(metering: Metering, budgets: Budgets, *, compute: Compute) -> tuple[Metering, Budgets]:
    """Where nothing measures and no power is stated: an assumed one, and no rate, which would rest on its idle power."""
    from paretune.meters import energy
    from paretune.meters.meter import NoMeter
    from paretune.meters.protocol import PROTOCOLS

    window_s = PROTOCOLS[metering.protocol].window_s
    found = energy.find(metering.power, metering.profile, device=compute.device, window_s=window_s)
    if compute.device != "cpu" or not isinstance(found, NoMeter):
        return metering, budgets
    say(f"no energy meter here: joules are estimated with the power profile {ASSUMED!r}, an assumption; state your own with --power idle=2W,busy=6W")
    if budgets.rate:
        say(f"--rate {budgets.rate} needs a stated idle power: the curve is for one inference after the other")
    return dataclasses.replace(metering, profile=ASSUMED, assumed=True), dataclasses.replace(budgets, rate=None)
