"""How a function becomes a verb of the command line."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import click


class Verb(click.Command):
    """A command whose function's parameters are flags by name, or dataclasses whose fields are flags; a field without a flag keeps its default."""

    def __init__(self, function: Callable[..., None], flags: Mapping[str, click.Parameter], *, example: str) -> None:
        hints = typing.get_type_hints(function)
        self.function = function
        self.parts = {name: hints[name] for name in inspect.signature(function).parameters}
        self.groups = {name: [f for f in _fields(name, hint) if f in flags] for name, hint in self.parts.items()}
        params = [flags[field] for fields in self.groups.values() for field in fields]
        epilog = "\b\nExample:\n  " + "\n  ".join(example.splitlines())
        super().__init__(function.__name__.replace("_", "-"), params=params, help=inspect.getdoc(function), epilog=epilog)

    def invoke(self, ctx: click.Context) -> None:
        """Calls the function with what the command line says."""
        given = {}
        for name, fields in self.groups.items():
            values = {field: ctx.params[field] for field in fields}
            given[name] = self.parts[name](**values) if dataclasses.is_dataclass(self.parts[name]) else values[name]
        self.function(**given)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section for each dataclass, one for the verb's own flags."""
        titles = {field: self.parts[name].__name__ for name, fields in self.groups.items() if dataclasses.is_dataclass(self.parts[name]) for field in fields}
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record and isinstance(param, click.Option):
                sections.setdefault(titles.get(param.name, "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _fields(name: str, hint: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else [name]


def say(text: str) -> None:
    """One line of progress, on stderr."""
    click.echo(text, err=True)
