"""Read YAML and JSON, and write YAML that is read back as it was.

YAML is that of recipes and of values on the command line. Luce reads the core of YAML 1.2, whose values are
those of JSON, and refuses what is probably a mistake. docs/recipes.md lists the rules.
"""

from __future__ import annotations

import copy
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

DEPTH = 64
"""Deepest nesting of lists and mappings, with aliases in place."""
SIZE = 2**18
"""Most bytes of a YAML file, and most values and characters of it with aliases in place."""
JSON_BYTES = 2**28
"""Largest JSON file: a list of metrics or images of a run stays far below."""

TOO_DEEP = f"expected lists and mappings nested at most {DEPTH} deep, got deeper ones"

NOTHING = re.compile(r"~|null|Null|NULL|")
TRUTH = re.compile(r"true|True|TRUE|false|False|FALSE")
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
NO_NUMBER = re.compile(r"\.(nan|NaN|NAN)")


class InvalidYAML(UserError):
    """A text that Luce does not read as YAML.

    Attributes:
        problem: What is wrong, without the place.
    """

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(f"line {line}: {problem}")
        self.problem = problem


class Document(dict[str, Any]):
    """The mapping that a YAML file holds.

    Attributes:
        lines: Line of each key by its path, such as ``training.epochs``.
    """

    lines: Mapping[str, int]


def read_yaml(path: Path) -> Document:
    """Read a YAML mapping from a file.

    Raises:
        UserError: If the file cannot be read or holds something else; names the file and the line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(SIZE + 1)
        text = content.decode("utf-8-sig", errors="strict" if len(content) <= SIZE else "replace")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}, which is not UTF-8 text; save it as UTF-8") from error
    except (OSError, ValueError) as error:  # a path with a null byte raises the latter
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the recipe {path} ({reason}); name a YAML file") from error
    if not text.strip():
        raise UserError(f"expected {path} to hold a YAML mapping, got an empty file")
    try:
        reader = _Reader(text)
        content = reader.read()
    except InvalidYAML as error:
        raise UserError(f"{path}, {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"expected {path} to hold a YAML mapping, got {type(content).__name__}")
    document = Document(content)
    document.lines = reader.lines
    return document


def load_yaml(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        InvalidYAML: If it is no YAML, or YAML that Luce refuses.
    Example:
        >>> load_yaml("{precision: no, lr: 1e-3, epochs: 3, seed: 010}")
        {'precision': 'no', 'lr': 0.001, 'epochs': 3, 'seed': '010'}
    """
    return _Reader(text).read()


class _Reader:
    """Turns the events of PyYAML's parser into values, one by one, so that limits hold while it reads."""

    def __init__(self, text: str) -> None:
        self.text, self.size = text, 0
        self.events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.lines: dict[str, int] = {}

    def read(self) -> Any:
        """The value of the only document."""
        try:
            if len(self.text.encode(errors="replace")) > SIZE:
                raise InvalidYAML(f"expected at most {SIZE} bytes of YAML, got more", 1)
            _, start = next(self.events), next(self.events)
            if isinstance(start, yaml.StreamEndEvent):
                raise InvalidYAML("expected a value, got nothing but comments", 1)
            if start.version not in (None, (1, 2)):
                raise _refusal(start, "expected YAML 1.2, got another version; remove the line")
            root = next(self.events)
            value = self.value(root, "", 1)
            rest = self.text[root.end_mark.index :].lstrip()
            if isinstance(root, yaml.ScalarEvent) and rest.startswith("#"):
                raise _refusal(root, "expected one value, got a comment after it; quote a value with a #")
            next(self.events)
            if not isinstance(another := next(self.events), yaml.StreamEndEvent):
                raise _refusal(another, "expected one document, got another after `---`")
            return value
        except yaml.MarkedYAMLError as error:
            raise _invalid(error, len(self.text.rstrip())) from error
        except yaml.reader.ReaderError as error:
            raise InvalidYAML(
                f"expected text, got the control character {chr(error.character)!r}",
                self.text.count("\n", 0, error.position) + 1,
            ) from error

    def value(self, event: Any, path: str, depth: int) -> Any:
        """The value that begins with an event."""
        if depth > DEPTH:
            raise _refusal(event, TOO_DEEP)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, depth)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _refusal(event, f"expected plain values, got the tag `{tag}`; remove it")
        before = self.size
        self.count(event, 1)
        if isinstance(event, yaml.ScalarEvent):
            value = self.scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                value.append(self.value(item, f"{path}[{len(value)}]", depth + 1))
        else:
            value = self.mapping(path, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, self.size - before
        return value

    def scalar(self, event: Any) -> Any:
        self.count(event, len(event.value))
        if unprintable := control_character(event.value):
            raise _refusal(event, f"expected text, got the control character {unprintable!r}")
        if not event.implicit[0]:  # quoted
            return event.value
        try:
            return plain_value(event.value)
        except ValueError as error:
            raise _refusal(event, str(error)) from error

    def mapping(self, path: str, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: list[dict[str, Any]] = []
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key, line = self.key(event), event.start_mark.line + 1
            if key in lines:
                raise _refusal(event, f"`{key}` is there twice, first in line {lines[key]}; remove one")
            place = f"{path}.{key}" if path else key
            lines[key] = self.lines[place] = line
            following = next(self.events)
            if ":" not in self.text[event.end_mark.index : following.start_mark.index]:
                raise _refusal(event, f"expected a colon and a value after the key `{key}`")
            value = self.value(following, place, depth + 1)
            if key == "<<" and event.implicit[0]:
                merged += value if isinstance(value, list) else [value]
                if not all(isinstance(each, dict) for each in merged):
                    raise _refusal(following, "expected `<<` to merge a mapping, or a list of them")
            else:
                own[key] = value
        result: dict[str, Any] = {}
        for each in (*reversed(merged), own):  # own keys replace merged ones, and earlier mappings later ones
            result |= each
        return result

    def key(self, event: Any) -> str:
        scalar = isinstance(event, yaml.ScalarEvent)
        value = self.value(event, "", DEPTH) if scalar else None
        if not isinstance(value, str):
            got = f"`{event.value}`; quote it" if scalar and event.value else "no text"
            raise _refusal(event, f"expected text as a key, got {got}")
        return value

    def alias(self, event: Any, depth: int) -> Any:
        if event.anchor not in self.anchors:
            raise _refusal(event, f"expected the anchor `&{event.anchor}` before `*{event.anchor}`")
        value, size = self.anchors[event.anchor]
        self.count(event, size)
        if _deeper(value, DEPTH - depth):
            raise _refusal(event, TOO_DEEP)
        return copy.deepcopy(value)

    def count(self, event: Any, size: int) -> None:
        self.size += size
        if self.size > SIZE:
            raise _refusal(event, f"expected at most {SIZE} values and characters, got more by its aliases")


def _refusal(event: Any, problem: str) -> InvalidYAML:
    return InvalidYAML(problem, event.start_mark.line + 1)


def _invalid(error: yaml.MarkedYAMLError, end: int) -> InvalidYAML:
    """The error for a text that is no YAML; what is never closed is named by its beginning."""
    mark = error.problem_mark
    if mark is None or (mark.index >= end and error.context_mark is not None):
        mark = error.context_mark
    problem = " ".join(str(error.problem or error.context).split())
    advice = "; indent with spaces" if "'\\t'" in problem else ""
    return InvalidYAML(f"not valid YAML, {problem}{advice}", 1 if mark is None else mark.line + 1)


def _deeper(value: Any, limit: int) -> bool:
    """Whether lists and mappings are nested deeper than a limit."""
    level = [value]
    for _ in range(limit + 1):
        level = [each for each in level if isinstance(each, dict | list)]
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
    return bool(level)


def plain_value(text: str) -> Any:
    """The value of an unquoted text.

    Raises:
        ValueError: If it is a number that no computer number holds.
    Example:
        >>> [plain_value(text) for text in ("no", "1e-3", "0x10", "1_000", "true", "~")]
        ['no', 0.001, 16, '1_000', True, None]
    """
    if NOTHING.fullmatch(text):
        return None
    if TRUTH.fullmatch(text):
        return text.lower() == "true"
    if INTEGER.fullmatch(text):
        return _integer(text)
    if NUMBER.fullmatch(text):
        return _float(text)
    if INFINITE.fullmatch(text):
        return -math.inf if text.startswith("-") else math.inf
    if NO_NUMBER.fullmatch(text):
        raise ValueError(f"expected a number, got {text}")
    return text


def _integer(text: str) -> int:
    number = int(text, 0) if len(text) <= 24 else 2**64
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"expected an integer of at most 64 bits, got {_shortened(text)}")
    return number


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"expected a number below 1.8e308, got {_shortened(text)}")
    if number == 0 and re.match(r"[-+]?[0.]*[1-9]", text):
        raise ValueError(f"expected 0 or a number above 4.9e-324, got {_shortened(text)}")
    return number


def _shortened(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:12]}... of {len(text)} characters"


def control_character(text: str) -> str | None:
    """The first control character or half of a surrogate pair in a text; tabs and line breaks are none."""
    if text.isprintable():
        return None
    return next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r"), None)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.1 or 1.2 would read as another value, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _pattern in (NOTHING, TRUTH, INTEGER, NUMBER, INFINITE, NO_NUMBER):
    _Dumper.add_implicit_resolver(
        f"luce:{_pattern.pattern}", re.compile(rf"(?:{_pattern.pattern})\Z"), [None]
    )


def dump_yaml(content: Mapping[str, Any]) -> str:
    """Write a mapping of plain values as YAML, in its order; `load_yaml` reads the same values.

    Raises:
        UserError: If it holds other than text, numbers, truth values, None, lists and mappings.
    Example:
        >>> dump_yaml({"precision": "no", "lr": 0.001, "revision": "1e3"})
        "precision: 'no'\\nlr: 0.001\\nrevision: '1e3'\\n"
    """
    try:
        return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    except yaml.representer.RepresenterError as error:
        raise UserError(
            f"expected text, numbers, lists and mappings in a recipe, got {error.args[-1]!r:.100}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; see `load_json`.

    Raises:
        UserError: If the file cannot be read or holds something else; names the file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(JSON_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from error
    if len(content) > JSON_BYTES:
        raise UserError(f"expected {path} to hold at most {JSON_BYTES} bytes, got more")
    return load_json(content, path)


def load_json(content: str | bytes, source: object) -> dict[str, Any]:
    """Parse a JSON object. Numbers may be NaN or infinite, as some figures of a run are.

    Args:
        content: Text, or its bytes.
        source: Where it is from, for errors.
    Raises:
        UserError: On anything else, doubled keys, deep nesting, and numbers that 64 bits do not hold.
    Example:
        >>> load_json('{"epochs": 3, "epochs": 4}', "result.json")
        Traceback (most recent call last):
        ...
        luce.errors.UserError: result.json is damaged (the key `epochs` is there twice); restore it or ...
    """
    try:
        value = json.loads(content, object_pairs_hook=unique, parse_int=_integer, parse_float=_float)
        if _deeper(value, DEPTH):
            raise ValueError(TOO_DEEP)
        if not isinstance(value, dict):
            raise ValueError(f"expected a mapping, got {type(value).__name__}")
    except RecursionError as error:
        raise damaged(source, TOO_DEEP) from error
    except ValueError as error:
        raise damaged(source, error) from error
    return value


def damaged(source: object, reason: object) -> UserError:
    """The error for a file that does not hold what was written to it."""
    return UserError(f"{source} is damaged ({reason}); restore it or run it again")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of these pairs, for `json.loads`.

    Raises:
        ValueError: If a key is there twice.
    """
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key `{twice}` is there twice")
    return mapping
