"""The verbs that look things up: methods and targets."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import click

from paretune import registry
from paretune.card import LOWERS
from paretune.cli.flags import verb
from paretune.registry import Entry
from paretune.roles import spell_value


@verb("paretune methods lora")
def methods(name: str | None, as_json: bool) -> None:
    """Lists the methods; with NAME, shows one with its knobs.

    Each has its paper, its equation and which it lowers of E, the cost of one example, D, the number of examples, and H, the number of trials.
    """
    entries = [registry.describe(n) for n in ([name] if name else registry.names())]
    if as_json:
        data = [_plain(entry) for entry in entries]
        click.echo(json.dumps(data[0] if name else data, indent=2, ensure_ascii=False, default=repr))
    elif name:
        click.echo("\n".join(_card(entries[0])))
    else:
        _catalogue(entries)


def _plain(entry: Entry) -> dict[str, Any]:
    card = vars(entry.card) if entry.card else {}
    return {"name": entry.name, "role": entry.role, "summary": entry.summary, "doc": entry.doc, **card, "knobs": list(entry.knobs), "recipe": _example(entry)}


def _example(entry: Entry) -> str:
    """A recipe with this method in it, its first knob written out."""
    knob = next((k for k in entry.knobs if k["default"] is not None), None)
    spelled = f"{entry.name}({knob['name']}={spell_value(knob['default'])})" if knob else entry.name
    return {"modifier": f"full + {spelled}", "transform": f"full | {spelled}"}.get(entry.role, spelled)


def _card(entry: Entry) -> Iterator[str]:
    yield f"{entry.name} ({entry.role})\n\n{entry.doc}"
    if entry.recipe:
        yield f"\nstands for: {entry.recipe}"
    if entry.card:
        lowers = "; ".join(f"{letter}, {LOWERS[letter]}" for letter in entry.card.lowers)
        arxiv = f", arXiv:{entry.card.arxiv}" if entry.card.arxiv else ""
        yield f"\nequation:  {entry.card.equation}\npaper:     {entry.card.paper}{arxiv}\nlowers:    {lowers or 'none of E, D, H'}\nwhy:       {entry.card.why}"
        if entry.card.lr:
            yield f"rate:      {entry.card.lr:g}{' for 12 layers of width 768, falling as 1 / (layers x width)' if entry.card.lr_falls_with_size else ''}"
        if entry.card.note:
            yield f"note:      {entry.card.note}"
    if entry.knobs:
        yield "\nknobs:"
    width = max((len(_knob(knob)) for knob in entry.knobs), default=0)
    for knob in entry.knobs:
        yield f"  {_knob(knob):<{width}}  {knob['help']}{_range(knob)}"
    yield f"\nexample:   paretune run '{_example(entry)}' reviews.csv --text review --label stars"


def _knob(knob: dict[str, Any]) -> str:
    return f"{knob['name']}: {knob['type']} = {spell_value(knob['default'])}"


def _range(knob: dict[str, Any]) -> str:
    if knob["choices"]:
        return f"; one of {', '.join(map(spell_value, knob['choices']))}"
    bounds = [f"{word} {knob[key]:g}" for word, key in (("from", "low"), ("to", "high")) if knob[key] is not None]
    return f"; {' '.join(bounds)}" if bounds else ""


def _catalogue(entries: list[Entry]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, caption="E, D, H: " + "; ".join(f"{k}, {v}" for k, v in LOWERS.items()), caption_justify="left")
    for title in ("name", "role", "what it does", "lowers", "paper"):
        table.add_column(title, no_wrap=title in ("name", "role"))
    for entry in entries:
        source = f"arXiv:{entry.card.arxiv}" if entry.card and entry.card.arxiv else ""
        year = re.match(r".*?\d{4}", entry.card.paper) if entry.card else None
        paper = ", ".join(filter(None, (year and year[0], source))) if entry.card else entry.recipe
        table.add_row(entry.name, entry.role, entry.summary, entry.card.lowers if entry.card else "", paper)
    Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False).print(table)


@verb("paretune targets minilm 'query value'")
def targets(model: str, spec: str) -> None:
    """Lists exactly which modules TARGETS hit in BACKBONE.

    Each line has path, place, layer and shape (outputs x inputs). Of a folder or a hub id only the config is read, no weights.
    """
    from paretune import anatomy

    found = anatomy.targets(_skeleton(model), spec)
    place, path = max(len(t.place) for t in found), max(len(t.path) for t in found)
    for target in found:
        layer = "-" if target.layer is None else target.layer
        click.echo(f"{target.path:<{path}}  {target.place:<{place}}  layer {layer:<3} {target.shape[0]} x {target.shape[1]}")
    click.echo(f"{len(found)} modules, {sum(t.shape[0] * t.shape[1] for t in found):,} weights")


def _skeleton(name: str) -> Any:
    """The model of a backbone's config on the meta device, with a classification head where its family has one."""
    import torch
    import transformers

    from paretune import backbones
    from paretune.errors import BackboneError

    packaged = backbones.PACKAGED.get(name)
    here = packaged and importlib.util.find_spec(packaged[0])
    source = backbones.find(name).source if here else packaged[-1] if packaged else name
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise BackboneError(f"backbone {name!r}: its config cannot be read ({str(error).strip().splitlines()[0]})") from None
    autos = [getattr(transformers, f"AutoModelFor{task}Classification") for task in ("Sequence", "Image", "Audio")]
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), transformers.AutoModel)
    with torch.device("meta"), backbones.quiet():
        return auto.from_config(config)
