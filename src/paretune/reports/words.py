"""The words that every report shares: short names, axes, where energy comes from, and the command that runs a run again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from paretune import registry
from paretune.pareto.front import CHARGE, Front
from paretune.pareto.points import Point
from paretune.pareto.records import Record, named
from paretune.units import show

# the quantities a picture can have on its horizontal axis, the first of them by choice
AXES = (CHARGE, "latency_p50_ms", "energy_per_inference_j", "stored_mb", "peak_memory_mb", "train_energy_j", "train_s", "flops_per_inference")
_FACTS = 3  # of those that a phase found, so many are shown
ENERGIES = (CHARGE, "energy_per_inference_j", "net_energy_per_inference_j", "train_energy_j")


def short(recipe: str) -> str:
    """A recipe for a label in a picture: without knob names, quotes and schedules, at most 44 characters.

    >>> short('adapter(form="pfeiffer", size=32) + schedule(epochs=3) | int8')
    'adapter(pfeiffer, 32) | int8'
    """
    text = re.sub(r" \+ schedule\([^()]*\)", "", recipe)
    text = re.sub(r"\b(?!r=)\w+=", "", text).replace('"', "")
    return text if len(text) <= 44 else text[:43] + "…"


def of_several(front: Front, point: Point) -> str:
    """A point's recipe, with the backbone where there are several."""
    several = len({other.summary["backbone"] for other in front.all}) > 1
    return f"{point.recipe} · {point.summary['backbone']}" if several else point.recipe


def names(front: Front) -> list[str]:
    """A label for each point, in the order of `front.all`: short where that is unambiguous, with the backbone where there are several."""
    many = len({point.summary["backbone"] for point in front.all}) > 1
    texts = [short(point.recipe) for point in front.all]
    if many:
        texts = [f"{text} · {point.summary['backbone']}" for text, point in zip(texts, front.all, strict=True)]
    # the same words for two points: the recipe's id tells them apart, as for two schedules given by flags
    return [text if texts.count(text) == 1 else f"{text} #{point.summary['recipe_id'][:4]}" for text, point in zip(texts, front.all, strict=True)]


def first_axis(front: Front) -> str:
    """The first axis that any point has a value for: inferences per charge, else latency."""
    return next((name for name in AXES if front.points(name)), "latency_p50_ms")


def label(front: Front, name: str) -> str:
    """What stands on the axis of a quantity: its label, its unit, and `estimated` where it is."""
    found = named(name, front.metric)
    unit = f" ({found.unit})" if found.unit else ""
    return found.label + unit + (", estimated" if name in ENERGIES and estimated(front) else "")


def estimated(front: Front) -> bool:
    """Is any of the energies an estimate?"""
    return any(point.summary["cost"]["meter"].get("estimate") for point in front.all)


def setting(front: Front) -> str:
    """The battery and the rate, as they stand in a title."""
    if front.battery is None:
        return "no battery given"
    if front.rate_per_s is None:
        return f"{front.battery_label} battery, saturated"
    return f"{front.battery_label} battery at {front.rate_per_s:g} inference{'' if front.rate_per_s == 1 else 's'}/s"


def title(front: Front, name: str) -> str:
    """The title of a picture of the score against that quantity."""
    if name == CHARGE:
        return f"{_upper(front.metric)} against inferences on a {setting(front)}"
    return f"{_upper(front.metric)} against {named(name).label}"


def facts(front: Front) -> list[tuple[str, str]]:
    """How the numbers were made: terms and sentences."""
    runs = front.records
    rows = runs[0].get("task_definition", {}).get("rows", {})
    sizes = f" ({', '.join(f'{count:,} {split}' for split, count in rows.items())})" if rows else ""
    found = [
        ("data", f"{runs[0]['task']}{sizes}, fingerprint {runs[0]['task_fingerprint'][:12]}"),
        ("backbone", ", ".join(sorted({f"{run['backbone']} ({run.get('backbone_revision') or 'no revision'})" for run in runs}))),
        ("score", scoring(front)),
        ("energy", energy(front)),
        ("charge", charging(front)),
        ("protocol", protocol(front)),
        ("machine", _all(machine(run.get("environment", {})) for run in runs) or "not stated"),
        ("notes", _all(str(m.get(k) or "") for m in _meters(front) if m.get("name") != "none" for k in ("note", "windows_note"))),
    ]
    return [(term, text) for term, text in found if text]


def scoring(front: Front) -> str:
    """What a score is the mean of, and what its bars hold."""
    seeds = sorted({run["seed"] for run in front.records})
    made = list(dict.fromkeys(point.summary["score_interval"] for point in front.all))
    bars = ", or ".join(how for how in made if not how.startswith("none: "))
    parts = [f"bars are 95 % intervals {bars}"] if bars else []
    parts += [f"no bar where there is no interval ({how.removeprefix('none: ')})" for how in made if how.startswith("none: ")]
    mean = f"mean of {len(seeds)} seeds ({', '.join(map(str, seeds))})" if len(seeds) > 1 else f"one seed ({seeds[0]})"
    return f"{front.metric} on the test split, {'; '.join([mean, *parts])}"


def energy(front: Front) -> str:
    """How energy was measured, or why it was not, with the uncertainty common to all figures."""
    texts = []
    for meter in _meters(front):
        source, guess = meter.get("source") or "source not stated", meter.get("estimate")
        if meter.get("name", "none") == "none":
            texts.append(f"not measured: {meter.get('note') or front.all[0].reason('energy_per_inference_j')}")
            continue
        text = source if guess and source.startswith("estimated") else f"{'estimated' if guess else 'measured'} with {source}"
        texts.append("; ".join(filter(None, (text, _shared(meter)))))
    texts = list(dict.fromkeys(texts))
    if sum(not text.startswith("not measured") for text in texts) > 1:
        texts[0] = f"not in one way for all runs, so their energies are no comparison: {texts[0]}"
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more meters" if len(texts) > 3 else "")


def band(front: Front) -> str:
    """The uncertainty that all energies share, which is not in a point's own bar; empty where there is none."""
    return _all(map(_shared, _meters(front)))


def _shared(meter: dict[str, Any]) -> str:
    low, high = meter.get("scale_low", 1.0), meter.get("scale_high", 1.0)
    return f"all joules share one unknown factor between {low:.2g} and {high:.2g}, which cancels in comparisons" if (low, high) != (1.0, 1.0) else ""


def found(record: Record) -> list[tuple[str, str]]:
    """What the phases of a run found out beside scores and costs, such as the share of tokens that a smaller vocabulary changed: methods and sentences."""
    stated = [(phase["spelling"].split("(")[0], phase["facts"]) for phase in record["phases"] if phase.get("facts")]
    return [(name, ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in list(facts.items())[:_FACTS])
             + (f", and {len(facts) - _FACTS} more in run.json" if len(facts) > _FACTS else "")) for name, facts in stated]  # fmt: skip


def _number(value: float) -> str:
    """Three digits, or all of a whole number."""
    return str(int(value)) if float(value).is_integer() else f"{value:.3g}"


def protocol(front: Front) -> str:
    """The measuring protocol, and how well two measurements of one model agreed under it."""
    text = _all(run["cost"].get("protocol") for run in front.records) or "not stated"
    wall, cpu = (max((m.get(key) or 0.0 for m in _meters(front)), default=0.0) for key in ("aa_wall", "aa_cpu"))
    return text + (f"; two measurements of one model differ by up to {wall:.1%} of time and {cpu:.1%} of CPU time" if wall else "")


def charging(front: Front) -> str:
    """What an inference on battery means here: the usable joules, the rate, and what idling takes of it."""
    if front.battery is None:
        return "no battery was given, so inferences per charge are not counted"
    if not front.points(CHARGE):
        return f"inferences per charge are not counted: {front.all[0].reason(CHARGE)}"
    text = f"{front.battery_label} battery, {show(front.battery.usable_j, 'J')} of it usable"
    if front.rate_per_s is None:
        why = " (a rate was asked for, but the idle power is not known)" if front.asked_rate_per_s else ""
        return f"{text}; saturated: one inference after the other{why}"
    point = front.reference or front.all[0]
    idle, net = point.summary["cost"]["meter"].get("idle_w"), point.value("net_energy_per_inference_j")
    if idle is None or net is None:
        return f"{text}; {front.rate_per_s:g} inferences/s"
    share = idle / (idle + front.rate_per_s * net)
    return f"{text}; at {front.rate_per_s:g}/s, idling at {idle:.3g} W takes {share:.1%} of it ({short(point.recipe)})"


def machine(environment: dict[str, Any]) -> str:
    """One line on where a run was made."""
    parts = [environment.get("cpu"), f"{environment['logical_cores']} logical cores" if environment.get("logical_cores") else ""]
    parts += [show(environment["memory_mb"] / 1000, "GB") if environment.get("memory_mb") else "", *environment.get("cards", [])]
    parts += [f"{name} {environment[name]}" for name in ("python", "torch") if environment.get(name)]
    return ", ".join(filter(None, parts))


def command(record: Record) -> str:
    """The command line that runs this run again; every part is quoted for a POSIX shell."""
    from paretune.tasks.built_in import TASKS

    build = record.get("task_definition", {}).get("build", {})
    stated = [(name, build.get(name)) for name in ("text", "label", "kind", "metric", "validation", "test", "split")]
    source = build.get("source") or record["task"]
    where = ["--task", source] if source in TASKS else [source]
    cut = next((step[1] for step in build.get("then", []) if step[0] == "subset"), None)
    flags = [*stated, ("max-train", cut), *_training(record), ("backbone", record["backbone"]), ("seed", record["seed"])]
    options = [part for name, value in flags if value is not None for part in (f"--{name}", str(value))]
    return shlex.join(["paretune", "run", record["recipe"], *where, *options])


def _training(record: Record) -> list[tuple[str, str]]:
    """The flags that give the phases without a schedule of their own the one they had."""
    phases = _expanded(record["recipe"]).split(" | ")
    whole = (record.get("resolved") or record["recipe"]).split(" | ")[-len(phases) :]  # a readout may have been put in front
    filled = [dict(re.findall(r'(\w+)="?([^,"]+)"?', found[1])) for text, full in zip(phases, whole, strict=False)
              if "schedule(" not in text and (found := re.search(r"schedule\((.*?)\)", full))]  # fmt: skip
    usual = {knob["name"]: str(knob["default"]) for knob in registry.describe("schedule").knobs}
    # rates that differ between phases are the methods' own, which need no flag
    alike = {name: values.pop() for name in ("epochs", "lr", "batch", "dtype") if len(values := {phase.get(name) for phase in filled}) == 1}
    return [(name, value) for name, value in alike.items() if value not in (None, usual[name])]


def _expanded(recipe: str) -> str:
    """The recipe with every named recipe as the line that it stands for; a text in quotes is none."""
    lines = {name: registry.line_of(name) for name in registry.names("recipe")}
    return re.sub(r'"[^"]*"|[A-Za-z_]\w*', lambda found: lines.get(found[0], found[0]), recipe)


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """`0.889 [0.867, 0.910]`, or `-`."""
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _meters(front: Front) -> list[dict[str, Any]]:
    """The different meters of the runs."""
    return list({str(sorted(run["cost"]["meter"].items(), key=str)): run["cost"]["meter"] for run in front.records}.values())


def _all(texts: Any) -> str:
    return "; ".join(dict.fromkeys(filter(None, texts)))


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
