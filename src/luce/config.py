"""From nested mappings and ``--dotted.name value`` words to checked dataclasses."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from .errors import UserError, unknown_name

T = TypeVar("T")


def parser_of(cls: type[Any], **settings: Any) -> ArgumentParser:
    """A parser whose options are the fields of a dataclass; its help is their documentation."""
    parser = ArgumentParser(exit_on_error=False, **settings)
    parser.add_class_arguments(cls, as_group=False)
    return parser


def parse(cls: type[T], content: Mapping[str, Any]) -> T:
    """A dataclass from a nested mapping, each value checked against the type of its field.

    Raises:
        UserError: On an unknown key, with the nearest known ones, or a value of the wrong type.
    Example:
        >>> from luce.recipes.schema import TrainingOptions
        >>> parse(TrainingOptions, {"epochs": 3}).epochs
        3
        >>> parse(TrainingOptions, {"batch": 3})
        Traceback (most recent call last):
        ...
        luce.errors.UserError: unknown recipe key `batch`; did you mean `batch_size`?
    """
    check_keys(cls, content)
    parser = parser_of(cls)
    try:
        values = parser.instantiate(parser.parse_object(dict(content)))
    except ArgumentError as error:
        raise UserError(_plain(str(error))) from error
    return cls(**vars(values))


def _plain(message: str) -> str:
    """The parser's words without those of Python's types."""
    words = " ".join(message.split()).replace("Parser key", "recipe key").replace("Expected a ", "expected ")
    return (
        re.sub(r"<class '(\w+)'>", r"\1", words)
        .replace("typing.Literal", "one of ")
        .replace(". Got value:", ", got")
    )


def check_keys(cls: type[Any], content: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse keys that no field of the dataclass, or of a dataclass within it, is called."""
    types: dict[str, Any] = typing.get_type_hints(cls)
    for key, value in content.items():
        if key not in types:
            raise unknown_name("recipe key", f"{prefix}{key}", [prefix + name for name in types])
        choices = (types[key], *typing.get_args(types[key]))
        nested: Any = next(filter(dataclasses.is_dataclass, choices), None)
        if nested is None or (value is None and type(None) in choices):
            continue
        if not isinstance(value, Mapping):
            raise UserError(f"expected recipe key `{prefix}{key}` to hold a mapping, got {value!r}")
        check_keys(nested, value, prefix=f"{prefix}{key}.")


def overrides(words: Sequence[str]) -> dict[str, Any]:
    """``--a.b value`` and ``--a.b=value`` as nested mappings; values are read as YAML.

    >>> overrides(["--training.epochs", "3", "--loss.kd.weight=0.5"])
    {'training': {'epochs': 3}, 'loss': {'kd': {'weight': 0.5}}}
    """
    nested: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--") or word == "--":
            raise UserError(f"expected an option such as --training.epochs 3, got `{word}`")
        name, equals, text = word[2:].partition("=")
        try:
            value = yaml.safe_load(text if equals else next(rest))
        except StopIteration:
            raise UserError(f"expected a value after `{word}`") from None
        except yaml.YAMLError as error:
            raise UserError(f"cannot read the value of --{name}: {' '.join(str(error).split())}") from error
        *path, last = name.split(".")
        inner = nested
        for key in path:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise UserError(f"--{name} and another option both set `{key}`; give one of them")
        inner[last] = value
    return nested


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        UserError: If the file cannot be read or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path} ({error}); name a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"expected {path} to hold a YAML mapping, got {type(content).__name__}")
    return content


def merge(base: Mapping[str, Any], *overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another, the last one on top; nothing is modified.

    >>> merge({"training": {"epochs": 3, "lr": 0.1}}, {"training": {"epochs": 5}})
    {'training': {'epochs': 5, 'lr': 0.1}}
    """
    merged = dict(base)
    for override in overrides:
        for key, value in override.items():
            old = merged.get(key)
            merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
