"""The verb that searches, and what it prints at its end."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paretune.cli.flags import Budgets, Data, Place, command_line, verb
from paretune.cli.job import ANSWERS, opened, with_power
from paretune.cli.verbs import say
from paretune.errors import BudgetError
from paretune.options import Compute, Metering, Options, Searching, Training
from paretune.units import quantity
from paretune.units import show as value

if TYPE_CHECKING:
    from paretune.searches.found import Found


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is searched, and what that may spend."""

    space: str
    budget: str | None


@verb("paretune search reviews.csv --text review --label stars --budget train_s=3600 --under 'latency_p50_ms=20, stored_mb=30' --out out/\n"
      "paretune search --task stdlib-topics --space 'lora(r=[2..64 log], targets={attention, linear}) | {none, merge | int8}' --trials 20")  # fmt: skip
def search(
    data: Data, asked: Asked, *, searching: Searching, place: Place, budgets: Budgets, training: Training, compute: Compute, metering: Metering
) -> None:
    """Finds the best recipes of a space on DATA, and spends no more than its budget on it.

    Cheap trials on few rows come first; the chosen recipes are trained again with fresh seeds and measured together. The results
    folder is that of a frontier: `paretune report` draws it, for other limits too, without a further trial; so does this with --resume.
    Of several backbones, --backbone minilm,roberta-base, it chooses too.
    """
    data.check()
    budgets.check()
    if len(budgets.under) > 1:
        raise click.UsageError("--under is given once in a search: it says which model is chosen; `paretune report` answers further ones")
    if asked.budget is None and searching.trials is None:
        raise click.UsageError("a search needs an end: --budget 'train_s=3600', or --trials 20, or both")
    from paretune.searches import aims
    from paretune.searches import space as spaces

    spaces.read(asked.space)
    if asked.budget:
        aims.spendable(asked.budget)
    task = opened(data, [], compute=compute, metering=metering)
    from paretune import flow, store
    from paretune.cli import progress, show

    metering, budgets = with_power(metering, budgets, compute=compute)
    under = next(iter(budgets.under), None)
    with progress.Progress() as report:
        options = Options(training, compute, metering, report, searching)
        found = flow.search(
            task, backbone=place.backbone, space=asked.space, budget=asked.budget, under=under, out=place.out, resume=place.resume, options=options
        )
    if found.unconfirmed:
        say("what was trained again keeps none of these limits: trials that do are shown with it, with the scores they were chosen by")
    place.record_command()
    store.write_json(Path(place.out) / ANSWERS, {**dataclasses.asdict(budgets), "command": command_line()})
    show.front([store.Run.read(Path(place.out) / "runs" / record["id"]) for record in found.front.records], budgets, out=Path(place.out))
    _account(found)


def _account(found: Found) -> None:
    """What the search tried and spent."""
    states = collections.Counter(e.state for e in found.entries if e.kind == "trial")
    click.echo("\ntrials:  " + ", ".join(f"{count} {state}" for state, count in states.items()))
    parts = [f"{quantity(name).label.replace('training ', '')} {value(spent, quantity(name).unit)}" for name, spent in found.spent.items()]
    click.echo("spent:   " + ", ".join(parts) + ", by all of it: timing, trials whatever became of them, training again, measuring")
    ledger = found.ledger
    click.echo(f"ledger:  E {value(ledger.e_flops, 'FLOP')}, D {ledger.d_examples:,.0f} examples, H {ledger.h_trainings} trainings, each phase once")
    gain = found.gained()
    click.echo(f"gained:  {gain['share']:.1%} of the box between the worst and the best of its trials, {_per(gain['per_1000_train_s'])} per 1,000 s"
               f", {_per(gain['per_1000_train_energy_j'])} per 1,000 J")  # fmt: skip
    click.echo(f"pays:    {pays_off(found)}")
    if not found.confirmed:
        why = "a budget that ended, or --confirm 0"
        click.echo(f"warning: the chosen recipes were not trained again and measured together ({why}); their scores are those they were chosen among")


def pays_off(found: Found) -> str:
    """After how many inferences the joules of the search are saved: by the best recipe, in the place of the dearest to run that was measured beside it."""
    front = found.front
    dearest = front.run(max(front.all, key=lambda point: point.value("energy_per_inference_j") or 0.0))
    try:
        best = found.best
    except BudgetError:
        return "no recipe keeps the limits, so that none saves anything"
    even = found.break_even(dearest)
    return even.reason if even.value is None else f"after {even.value:,.0f} inferences of {best.recipe} in the place of {dearest.recipe}, in joules"


def _per(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
