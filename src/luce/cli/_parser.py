"""The parser of all commands: from the arguments of a command to its options, a dataclass.

A field without a default is a positional argument; the last one may be a list and then takes all remaining
arguments. Every other field is an option ``--name VALUE`` or ``--name=VALUE``; a bool needs no value, and a
list may be written ``1,2,3``. Nested fields have dotted names. Fields of a recipe are options too, where a
command has a field with the metadata of `recipe_fields`. The text under a field in the docstring is its help.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from .. import log
from ..config import Replacement, field_types, parse, type_at, without_none
from ..documents import InvalidYAML, load_yaml
from ..errors import UserError, unknown_name

T = TypeVar("T")


def recipe_fields(recipe: type[Any], *names: str) -> dict[str, Any]:
    """Metadata of a field that receives those options that are fields of a recipe, as a nested mapping.

    Args:
        recipe: The dataclass of the recipe.
        names: Accept only these fields and the fields inside them; none stands for all.
    """
    return {"recipe": recipe, "names": names or tuple(field_types(recipe))}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the fields of an options dataclass appear on the command line.

    Attributes:
        positional: Names of the positional arguments, in order.
        options: Names of the options.
        recipe_field: Name of the field for the recipe's options; None if there is none.
        recipe: The dataclass of the recipe.
        recipe_names: Its fields that are options.
    """

    positional: tuple[str, ...]
    options: tuple[str, ...]
    recipe_field: str | None = None
    recipe: type[Any] | None = None
    recipe_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: type[Any]) -> Layout:
        """The layout of an options dataclass."""
        missing, positional, named, recipe = dataclasses.MISSING, [], [], {}
        for field in dataclasses.fields(options):
            if "recipe" in field.metadata:
                recipe = {
                    "recipe_field": field.name,
                    "recipe": field.metadata["recipe"],
                    "recipe_names": field.metadata["names"],
                }
            elif field.default is missing and field.default_factory is missing:
                positional.append(field.name)
            else:
                named.append(field.name)
        return cls(tuple(positional), tuple(named), **recipe)


def parse_arguments(options: type[T], argv: Sequence[str], command: str) -> T:
    """Build the options of a command from its arguments.

    Raises:
        UserError: On an unknown or missing argument, or a value that the dataclass refuses.
    Example:
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Options:
        ...     folder: Path
        ...     steps: int = 64
        ...     cpu: bool = False
        >>> parse_arguments(Options, ["runs/a", "--steps", "8", "--cpu"], "spike").steps
        8
        >>> parse_arguments(Options, ["runs/a", "--step", "8"], "spike")
        Traceback (most recent call last):
        ...
        luce.errors.UserError: unknown option `--step`; did you mean `--steps` or ...
    """
    layout = Layout.of(options)
    content: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    positional: list[str] = []
    remaining = deque(argv)
    while remaining:
        argument = remaining.popleft()
        if re.fullmatch(r"[^-].*|-?|-[\d.].*", argument, re.DOTALL):  # a number such as -1 is no option
            positional.append(argument)
            continue
        flag, equals, text = argument.partition("=")
        path = flag[2:].split(".") if flag.startswith("--") else [flag]
        if path[0] in layout.options:
            nested, hint = content, type_at(options, path)
        elif layout.recipe is not None and path[0] in layout.recipe_names:
            nested, hint = overrides, type_at(layout.recipe, path)
        else:
            known = (*layout.options, *layout.recipe_names, "help", "debug")
            raise unknown_name("option", flag, [f"--{name}" for name in known])
        _insert(nested, path, _read(flag, text if equals else _next_value(flag, hint, remaining), hint))
    content |= _assign(options, layout, positional, command)
    if layout.recipe_field is not None:
        content[layout.recipe_field] = overrides
    try:
        return parse(options, content)
    except ValueError as error:  # of a dataclass that refuses a value
        raise UserError(str(error)) from error


def _next_value(flag: str, hint: Any, remaining: deque[str]) -> str:
    """Take the value after an option off the remaining arguments; ``true`` for a bool without one."""
    if without_none(hint) is bool and (not remaining or remaining[0] not in ("true", "false")):
        return "true"
    if not remaining or remaining[0].startswith("--"):
        raise UserError(f"expected a value after `{flag}`")
    return remaining.popleft()


def _read(flag: str, text: str, hint: Any) -> Any:
    """Read a value: as text where the field is text, else as YAML."""
    if not text.strip():
        raise UserError(f"expected a value after `{flag}`, got an empty one")
    inner = without_none(hint)
    if inner in (str, Path) or typing.get_origin(inner) is Literal:
        return None if text == "null" and inner is not hint else text
    if typing.get_origin(inner) in (list, tuple) and not text.startswith("["):
        text = f"[{text}]"
    try:
        value = load_yaml(text)
    except InvalidYAML as error:
        raise UserError(f"cannot read the value of `{flag}`: {error.problem}") from error
    # Merged into the recipe's mapping, `--loss '{kd: ...}'` would keep the recipe's other terms.
    return Replacement(value) if isinstance(value, dict) else value


def _insert(nested: dict[str, Any], path: list[str], value: Any) -> None:
    """Put a value into nested mappings; a later value replaces an earlier one of the same name."""
    *outer, last = path
    for key in outer:
        nested = nested.setdefault(key, {})
        if not isinstance(nested, dict):
            raise UserError(f"`--{'.'.join(path)}` and another option both set `{key}`; give one of them")
    if last in nested:
        log.warning(f"`--{'.'.join(path)}` is given twice, and only its last value counts; remove the other")
    nested[last] = value


def _assign(options: type[Any], layout: Layout, values: list[str], command: str) -> dict[str, Any]:
    """The positional arguments by name."""
    names = layout.positional
    takes_rest = bool(names) and typing.get_origin(field_types(options)[names[-1]]) in (list, tuple)
    if len(values) < len(names):
        missing = " and ".join(name.upper() for name in names[len(values) :])
        raise UserError(f"expected {missing}; luce {command} --help describes the arguments")
    if len(values) > len(names) and not takes_rest:
        raise UserError(
            f"unexpected argument `{values[len(names)]}`; luce {command} --help describes the arguments"
        )
    assigned: dict[str, Any] = dict(zip(names, values, strict=False))
    if takes_rest:
        assigned[names[-1]] = values[len(names) - 1 :]
    return assigned


def as_typed(message: str, options: type[Any]) -> str:
    """An error about fields of the options, with the fields named as on the command line.

    >>> Options = dataclasses.make_dataclass("Options", [("steps", int, 64)])
    >>> as_typed("expected `steps` of at least 1, got 0", Options)
    'expected `--steps` of at least 1, got 0'
    """
    layout = Layout.of(options)
    for name in layout.options:
        message = re.sub(rf"`{name}([.\[][^`]*)?`", rf"`--{name}\1`", message)
    for name in layout.positional:
        message = re.sub(rf"`{name}(\[\d+\])?`", f"`{name.upper()}`", message)
    return message
