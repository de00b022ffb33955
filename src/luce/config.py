"""Merge nested mappings, and build checked dataclasses from them."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from .documents import control_character
from .documents import read_yaml as read_yaml
from .errors import UserError, unknown_name

T = TypeVar("T")

NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}


class Replacement(dict[str, Any]):
    """A mapping that `merge` puts in place of an earlier one instead of merging both."""


def parse(cls: type[T], content: Mapping[str, Any], prefix: str = "", kind: str = "recipe key") -> T:
    """Build a dataclass from a nested mapping and check each value against the type of its field.

    Fields may be plain values, paths, literals, lists, tuples, mappings and dataclasses, or optional ones.

    Args:
        cls: The dataclass.
        content: Values by name of the field; it is not modified.
        prefix: Name of the outer fields in errors, such as ``training.``.
        kind: What an unknown name is called.
    Raises:
        UserError: On an unknown key, with the closest known ones, or a value of the wrong type.
    Example:
        >>> from luce.training import TrainingOptions
        >>> parse(TrainingOptions, {"epochs": 3}).epochs
        3
        >>> parse(TrainingOptions, {"batch": 3})
        Traceback (most recent call last):
        ...
        luce.errors.UserError: unknown recipe key `batch`; did you mean `batch_size`?
    """
    hints = field_types(cls)
    for key in content:
        if key not in hints:
            raise unknown_name(kind, f"{prefix}{key}", [prefix + name for name in hints])
    return cls(**{key: _convert(value, hints[key], f"{prefix}{key}") for key, value in content.items()})


def as_path(path: Path | str) -> Path:
    """The path that a user wrote; ``~`` and ``~NAME`` stand for home folders, as in a shell.

    Raises:
        UserError: If it is empty, has no such home or holds an unexpanded variable.
    Example:
        >>> as_path("runs/a")
        PosixPath('runs/a')
        >>> as_path("$DATA/a")
        Traceback (most recent call last):
        ...
        luce.errors.UserError: expected a path without variables, got `$DATA/a`; write out ...
    """
    text = str(path)
    if path == "" or control_character(text):
        raise UserError(f"expected a path, got {text!r}")
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"expected a path, got `{text}`, and there is no such home folder") from error
    if re.search(r"\$(\w|\{\w)", text) and not expanded.exists():
        raise UserError(
            f"expected a path without variables, got `{text}`; write out the folder, or ~ for your own"
        )
    return expanded


def name_or_path(name: str) -> str:
    """A name on a hub unchanged, or a folder with its ``~`` expanded."""
    return str(as_path(name)) if name.startswith("~") else name


def merge(base: Mapping[str, Any], *overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings into a new one; later values, and a whole `Replacement`, replace earlier ones.

    >>> merge({"training": {"epochs": 3, "lr": 0.1}}, {"training": {"epochs": 5}})
    {'training': {'epochs': 5, 'lr': 0.1}}
    >>> merge({"loss": {"pld": {"loss": "PLDLoss"}}}, {"loss": Replacement(kd={"loss": "KDLoss"})})
    {'loss': {'kd': {'loss': 'KDLoss'}}}
    """
    merged = dict(base)
    for override in overrides:
        for key, value in override.items():
            old = merged.get(key)
            if isinstance(value, Replacement):
                merged[key] = dict(value)
            else:
                merged[key] = (
                    merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
                )
    return merged


def field_types(cls: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def without_none(hint: Any) -> Any:
    """The type X of an optional type ``X | None``; any other type as it is."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    [inner] = [part for part in typing.get_args(hint) if part is not type(None)]
    return inner


def type_at(cls: type[Any], path: list[str]) -> Any:
    """The type of a nested field, such as ``["training", "epochs"]``; ``Any`` if there is no such field."""
    hint: Any = cls
    for name in path:
        hint = without_none(hint)
        if dataclasses.is_dataclass(hint):
            hint = field_types(typing.cast("type[Any]", hint)).get(name, Any)
        else:
            hint = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else Any
    return hint


def _convert(value: Any, hint: Any, place: str) -> Any:
    """Return the value as its type demands, or refuse it."""
    if hint is Any:
        return copy.deepcopy(value)  # a recipe must not share a mapping with the one that it was made from
    inner = without_none(hint)
    if value is None and inner is not hint:
        return None
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
        return parse(typing.cast("type[Any]", inner), value, f"{place}.")
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(item, arguments[1], f"{place}.{key}") for key, item in value.items()}
    if origin in (list, tuple) and isinstance(value, list | tuple):
        items = (_convert(item, arguments[0], f"{place}[{index}]") for index, item in enumerate(value))
        return list(items) if origin is list else tuple(items)
    if origin is Literal and type(value) is str and value in arguments:
        return value
    # `type`, as isinstance takes True for an integer.
    if inner in (bool, int, str) and type(value) is inner:
        if inner is str and (unprintable := control_character(value)):
            raise UserError(f"expected `{place}` as text, got the control character {unprintable!r}")
        return value
    if inner is Path and isinstance(value, str | Path):
        return as_path(value)
    if inner is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    got = "nothing" if value is None else repr(value)
    raise UserError(f"expected `{place}` as {_noun(inner)}, got {got:.100}")


def _noun(hint: Any) -> str:
    """Name the values of a type for an error message."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if origin in (list, tuple):
        return "a list"
    return "a mapping" if origin is dict or dataclasses.is_dataclass(hint) else NOUNS[hint]
