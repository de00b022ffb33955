"""The help of a command, from the docstring, the types and the defaults of its options."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..config import field_types, without_none
from ._parser import Layout

PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
COLUMN = 30
"""Width of the names of options, including the indent."""


def help_text(options: type[Any], command: str) -> str:
    """Usage, description, positional arguments and options of a command."""
    layout = Layout.of(options)
    hints, texts = field_types(options), field_texts(options)
    arguments = "".join(f" {_argument(name, hints[name])}" for name in layout.positional)
    recipe = " [--RECIPE.FIELD VALUE ...]" if layout.recipe is not None else ""
    given = " [--OPTION VALUE ...]" if layout.options else ""
    fields = {field.name: field for field in dataclasses.fields(options)}
    blocks = [
        f"usage: luce {command}{arguments}{given}{recipe}",
        _description(options),
        _section("arguments", [(_argument(name, hints[name]), texts[name]) for name in layout.positional]),
        _section(
            "options",
            [
                *(_entry(f"--{name}", hints[name], fields[name], texts) for name in layout.options),
                ("--help", "Show this text."),
                ("--debug", "Show the traceback of an error."),
            ],
        ),
    ]
    if layout.recipe is not None:
        blocks.append(_section("fields of the recipe", list(_recipe_entries(layout))))
    return "\n\n".join(filter(None, blocks))


def field_texts(cls: type[Any]) -> dict[str, str]:
    """The texts under ``Attributes:`` in the docstrings of a dataclass and its bases, by field."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, attributes = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?=    \w+: )", f"\n{attributes}")[1:]:
            name, _, text = entry.strip().partition(": ")
            texts[name] = " ".join(text.split("\n\n")[0].replace("``", "").split())
    return texts


def _description(cls: type[Any]) -> str:
    """The docstring in front of ``Attributes:``."""
    return inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[0].replace("``", "").strip()


def _argument(name: str, hint: Any) -> str:
    return f"{name.upper()} ..." if typing.get_origin(hint) in (list, tuple) else name.upper()


def _recipe_entries(layout: Layout) -> Iterator[tuple[str, str]]:
    """Every field of the recipe with its dotted name, those of nested dataclasses after their own."""

    def walk(cls: type[Any], prefix: str, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        hints, texts = field_types(cls), field_texts(cls)
        for field in dataclasses.fields(cls):
            if field.name not in names:
                continue
            inner = without_none(hints[field.name])
            if dataclasses.is_dataclass(inner):
                nested = typing.cast("type[Any]", inner)
                yield from walk(nested, f"{prefix}{field.name}.", tuple(field_types(nested)))
            else:
                yield _entry(f"--{prefix}{field.name}", inner, field, texts)

    assert layout.recipe is not None
    yield from walk(layout.recipe, "", layout.recipe_names)


def _entry(flag: str, hint: Any, field: dataclasses.Field[Any], texts: dict[str, str]) -> tuple[str, str]:
    """An option with its placeholder, and its text with the default."""
    if field.default is not dataclasses.MISSING:
        default = field.default
    else:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    shown = default is not None and default is not False and default not in ((), [], {}, "")
    if isinstance(default, list | tuple):
        default = ",".join(map(str, default))
    text = texts[field.name] + (f" (default: {default})" if shown else "")
    return f"{flag} {_placeholder(hint)}".strip(), text


def _placeholder(hint: Any) -> str:
    hint = without_none(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (list, tuple):
        return f"{_placeholder(arguments[0])},..."
    if origin is dict:
        return "MAPPING"
    return "" if hint is bool else PLACEHOLDERS[hint]


def _section(title: str, entries: list[tuple[str, str]]) -> str:
    """A titled list; a name too long for its column stands on a line of its own."""
    if not entries:
        return ""
    width = min(110, shutil.get_terminal_size().columns)
    lines = [f"{title}:"]
    for name, text in entries:
        wrapped = textwrap.wrap(text, max(20, width - COLUMN)) or [""]
        first = f"  {name}".ljust(COLUMN)
        if len(first) > COLUMN or first[-1] != " ":
            lines.append(f"  {name}")
            first = " " * COLUMN
        lines.append(first + wrapped[0])
        lines += [" " * COLUMN + line for line in wrapped[1:]]
    return "\n".join(lines)
