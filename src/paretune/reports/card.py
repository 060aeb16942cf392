"""README.md of a run folder: a model card as the Hugging Face hub reads it, with scores, costs and how they were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from paretune import store
from paretune.meters.cost import MEASURED, Cost
from paretune.pareto.records import Record, interval, named, value
from paretune.reports import use, words
from paretune.units import QUANTITIES, show


def save(record: Record, folder: Path, *, license_id: str | None = None, code: str = use.RUN) -> Path:
    """Writes the card of a run into its folder; returns the path."""
    path = folder / "README.md"
    with store.written_file(path) as part:
        part.write_text(render(record, license_id=license_id, code=code), encoding="utf-8")
    return path


def render(record: Record, *, license_id: str | None = None, code: str = use.RUN) -> str:
    """The card as Markdown.

    Args:
        record: the run's record.
        license_id: the backbone's license as the hub names it, "apache-2.0"; None where it is not known, and the card says so.
        code: the Python that uses the folder.
    """
    license_id = license_id or record.get("license")
    score = words.with_interval(record["score"], interval(record, "score"))
    sections = {
        "What it is": _facts(record, license_id),
        "Use": _block("python", code),
        "Scores": _scores(record),
        **({"Found": [f"- {_code(name)}: {_plain(text)}" for name, text in found]} if (found := words.found(record)) else {}),
        "Costs": [*_costs(record), "", _meter(Cost.from_json(record["cost"]))],
        **({"Time of packed maps": _slowdowns(record["slowdowns"])} if record.get("slowdowns") else {}),
        **({"Export": _export(record["export"])} if "export" in record else {}),
        "Run it again": _block("sh", words.command(record)),
    }
    head = [f"# {_plain(record['backbone'])} for {_plain(record['task'])}", "",
            f"Made by paretune with the recipe {_code(record['recipe'])}; {_plain(record['metric'])} on the test split {score}."]  # fmt: skip
    body = [line for title, lines in sections.items() for line in ("", f"## {title}", "", *lines)]
    return "\n".join([*_front_matter(record, license_id), *head, *body]) + "\n"


def _facts(record: Record, license_id: str | None) -> list[str]:
    definition = record.get("task_definition", {})
    classes = ", ".join(_plain(str(label)) for label in definition.get("labels", ()))
    where, scale = words.machine(record.get("environment", {})) or "machine not stated", record.get("label_scale")
    facts = {
        "recipe, all knobs": _code(record.get("resolved") or record["recipe"]),
        "backbone": f"{_code(record['backbone'])}, revision {_code(str(record.get('backbone_revision') or 'unknown'))}, "
        f"weights sha256 {_code(record.get('weights_sha256') or 'unknown')}",
        "license of the backbone": _plain(license_id) if license_id else "not stated by the backbone; ask its authors before you pass this model on",
        "task": f"{_plain(str(definition.get('kind', 'kind not stated')))}, data {_code(str(definition.get('source') or record['task']))}, "
        f"fingerprint {_code(record['task_fingerprint'])}",
        "classes": classes,
        "outputs": "standardized: an answer is {label_std:.10g} times the output, plus {label_mean:.10g}; `predict` gives answers".format(**scale) if scale else "",
        "made": f"{_plain(record.get('date') or 'date not stated')}, seed {record['seed']}, {_plain(where)}",
        "loads with": _code(record["loads_with"]),
    }
    return [f"- {term}: {text}" for term, text in facts.items() if text]


def _front_matter(record: Record, license_id: str | None) -> list[str]:
    """The hub's header; JSON strings are YAML strings."""
    library = "transformers" if record["loads_with"].startswith("transformers") else record["loads_with"]
    stated = [f"license: {json.dumps(license_id)}"] if license_id else []
    named_by = [f"library_name: {json.dumps(library)}", f"base_model: {json.dumps(record['backbone'])}", *stated]
    return ["---", *named_by, "tags: [paretune]", f"metrics: [{json.dumps(record['metric'])}]", "---", ""]


def _scores(record: Record) -> list[str]:
    rows = (_score_row("validation", record.get("validation_score"), None), _score_row("test", record["score"], interval(record, "score")))
    return [f"| {_plain(record['metric'])} | value | 95 % interval |", "|---|---|---|", *rows]


def _score_row(split: str, score: float | None, pair: tuple[float, float] | None) -> str:
    return f"| {split} | {words.with_interval(score, None)} | {f'{pair[0]:.3f} to {pair[1]:.3f}' if pair else '-'} |"


def _costs(record: Record) -> list[str]:
    """A table with one row per cost; what was not measured says why."""
    rows = ["| quantity | value | 95 % interval |", "|---|---|---|"]
    for name in MEASURED:
        unit, text = (named(name).unit, named(name).label) if name in QUANTITIES else ("J", "net energy per inference, above idling")
        got, pair = value(record, name), interval(record, name)
        mark = ", estimated" if name in words.ENERGIES and record["cost"]["meter"].get("estimate") else ""
        if got is None:
            rows.append(f"| {text} | not measured | {_plain(record['cost']['reasons'][name])} |")
        else:
            rows.append(f"| {text}{mark} | {show(got, unit)} | {f'{show(pair[0], unit)} to {show(pair[1], unit)}' if pair else '-'} |")
    return rows


def _export(parity: Record) -> list[str]:
    """How near the export answers to the model that was scored and measured."""
    notes = [f"- {_plain(note)}" for note in parity.get("notes", ())]
    if "rows" not in parity:
        return notes
    held = f" (of the first {parity['held']})" if parity.get("held") else ""
    title = parity.get("title") or f"{parity['form']} ONNX graph"  # as records of before have it
    return [f"A {title}. On {parity['rows']} test rows it scores {parity['score']:.4f} where the model it was made from scores "
            f"{parity['model_score']:.4f}, and its logits{held} are off by a share of {parity['drift']:.2g}. The scores above are that model's.",
            *notes]  # fmt: skip


def _slowdowns(formats: list[dict[str, Any]]) -> list[str]:
    """A table for each packed format: how many times as long as a float map it takes, by tokens."""
    lines: list[str] = []
    for found in formats:
        outputs, inputs = found["shape"]
        where = f"{words.machine(found['environment'])}, {found['environment']['threads']} threads"
        lines += [*([""] if lines else []), f"A map from {inputs} to {outputs} features in {_code(found['format'])} takes so many times as long as a float one, "
                  f"in eager torch, timed on {_plain(where)}:", "", "| tokens | beside fp32 | beside bf16 |", "|---|---|---|",
                  *(f"| {t['tokens']} | {t['fp32']:.2g} | {t['bf16']:.2g} |" for t in found["times"])]  # fmt: skip
    return lines


def _meter(cost: Cost) -> str:
    meter = cost.meter
    if not meter.get("name") or meter["name"] == "none":
        return f"Energy was not measured: {_plain(meter.get('note') or cost.reasons.get('energy_per_inference_j', 'no reason given'))}."
    kind = "estimated" if meter.get("estimate") else "measured"
    source = _plain(meter.get("source") or "source not stated")
    text = f"Energy was {kind}; meter: {_plain(meter['name'])}, {source}; protocol {_plain(cost.protocol)}."
    low, high = meter.get("scale_low", 1.0), meter.get("scale_high", 1.0)
    return text if (low, high) == (1.0, 1.0) else f"{text} All joules share one unknown factor between {low:.2g} and {high:.2g}."


def _block(language: str, text: str) -> list[str]:
    """A fenced block that nothing in the text can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text, fence]


def _code(text: str) -> str:
    """Inline code that nothing in the text can close."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _plain(text: str) -> str:
    """Text whose signs mean nothing to Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(text.split()))
