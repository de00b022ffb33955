"""YAML as version 1.2 has it, what is refused with its line, and text that comes back as it was written."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from luce.documents import DEPTH, SIZE, dump_yaml, load_json, load_yaml, read_json, read_yaml
from luce.errors import UserError

# Values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["no", "No", "yes", "on", "off", "y", "N", "=", "1_000", "1:30", "12:30:45"])
def test_what_only_yaml_1_1_knows_is_text(text: str) -> None:
    assert load_yaml(f"a: {text}") == {"a": text}
    assert load_yaml(f"{text}: a") == {text: "a"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("1e-3", 0.001),
        ("1.0e-3", 0.001),
        ("-2E+3", -2000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+7", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("18446744073709551615", 2**64 - 1),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("010", "010"),
        ("00.5", "00.5"),
        ("0b11", "0b11"),
        ("2001-01-01", "2001-01-01"),
        ("2001-12-14t21:59:43Z", "2001-12-14t21:59:43Z"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("x#y", "x#y"),
        ("|\n  1\n", "1\n"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = load_yaml(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


def test_an_alias_is_a_copy_and_a_merge_gives_way_to_own_keys() -> None:
    content = load_yaml("a: &x {p: [1], q: 2}\nb: *x\nc: {<<: *x, q: 3}\nd: {<<: [{q: 4}, *x]}\n'<<': 5")
    assert content["b"] == content["a"]
    assert content["b"]["p"] is not content["a"]["p"]
    assert content["c"] == {"p": [1], "q": 3}
    assert content["d"] == {"p": [1], "q": 4}
    assert content["<<"] == 5


# Refusals ---------------------------------------------------------------------------------------------------

BOMB = "\n".join(
    ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 12)]
)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: {c: 2,\n  c: 3}", 3, "`c` is there twice, first in line 2"),
        ("a: 1\r\nb: 2\r\na: 3", 3, "`a` is there twice, first in line 1"),
        ("a: 1\n<<: {b: 1}\n<<: {c: 1}", 3, "`<<` is there twice"),
        ("a: {<<: 3}", 1, "expected `<<` to merge a mapping"),
        ("a: 1\n1: b", 2, "expected text as a key, got `1`; quote it"),
        ("null: b", 1, "expected text as a key, got `null`"),
        ("true: b", 1, "expected text as a key, got `true`"),
        ("? [a, b]\n: 1", 1, "expected text as a key, got no text"),
        ("a: {pretrained}", 1, "expected a colon and a value after the key `pretrained`"),
        ("a:\n  - !!python/object/apply:os.system [x]", 2, "got the tag `!!python/object/apply:os.system`"),
        ("a: !own 1", 1, "got the tag `!own`"),
        ("a: &x [*x]", 1, r"expected the anchor `&x` before `\*x`"),
        ("a: 1\nb: *x", 2, r"expected the anchor `&x` before `\*x`"),
        (BOMB, 6, "got more by its aliases"),
        ("x: " + "[" * 100_000, 1, f"at most {DEPTH} deep"),
        ("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 200)), DEPTH + 1, f"at most {DEPTH} deep"),
        (f"a: &x {'[' * 40}{']' * 40}\nb: {'[' * 40}*x{']' * 40}", 2, f"at most {DEPTH} deep"),
        ("a: 1\n---\nb: 2", 2, "expected one document, got another"),
        ("%YAML 1.1\n---\na: no", 1, "expected YAML 1.2"),
        ("# only\n# comments", 1, "got nothing but comments"),
        ("a: 1\nb: .nan", 2, "expected a number, got .nan"),
        ("a: 1e999", 1, "expected a number below 1.8e308, got 1e999"),
        ("a: 1e-999", 1, "expected 0 or a number above 4.9e-324, got 1e-999"),
        (f"a: {'9' * 5000}", 1, "of at most 64 bits, got 999999999999... of 5000 characters"),
        ("a: -9223372036854775809", 1, "of at most 64 bits"),
        ("a: 0x10000000000000000", 1, "of at most 64 bits"),
        ('a: "\\0"', 1, r"the control character '\\x00'"),
        ('a: 1\n"\\e[31m": 2', 2, r"the control character '\\x1b'"),
        ("a: 1\nb: \x07", 2, r"the control character '\\x07'"),
        ('a: "\\ud800"', 1, r"the control character '\\ud800'"),
        ("a:\n\tb: 1", 2, "not valid YAML, found character .* indent with spaces"),
        ("a: b: c", 1, "not valid YAML"),
        ("a: 1\ntraining: [1,\nb: 2\n", 2, "not valid YAML"),
        ("a: 'x\nb: 2\n", 1, "not valid YAML"),
        ("[" + "1, " * SIZE + "1]", 1, f"at most {SIZE} bytes"),
    ],
)
def test_what_is_refused_names_the_line(text: str, line: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "to hold a YAML mapping, got an empty file"),
        (b"\n \n", "got an empty file"),
        (b"- 1", "to hold a YAML mapping, got list"),
        (b"text", "to hold a YAML mapping, got str"),
        ("a: é".encode("latin-1"), "is not UTF-8 text; save it as UTF-8"),
        ("a: 1".encode("utf-16"), "is not UTF-8 text; save it as UTF-8"),
        ("a: 1".encode("utf-16-le"), "the control character"),
        (b"a: 1" + b" " * 2**20, "bytes of YAML, got more"),
    ],
)
def test_files_that_hold_no_recipe(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "r.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "\0"):
        with pytest.raises(UserError, match="cannot read the recipe"):
            read_yaml(path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfa: 1\nb:\n  c: 2\n")
    content = read_yaml(tmp_path / "r.yaml")
    assert content == {"a": 1, "b": {"c": 2}}
    assert content.lines == {"a": 1, "b": 2, "b.c": 3}


def test_a_bomb_is_noticed_before_it_goes_off() -> None:
    """Its lists would hold 8**12 words, which no memory could."""
    start = time.process_time()
    with pytest.raises(UserError, match="got more by its aliases"):
        load_yaml(BOMB)
    assert time.process_time() - start < 20


# Writing ----------------------------------------------------------------------------------------------------

ODD = [
    *(
        "no",
        "yes",
        "on",
        "off",
        "y",
        "null",
        "~",
        "true",
        "1e3",
        "1e-3",
        ".5",
        "5.",
        "010",
        "0o17",
        "0x10",
        "0b1",
    ),
    *(
        "1_000",
        "1:30",
        "2001-01-01",
        "=",
        "<<",
        ".inf",
        ".nan",
        "&a",
        "*a",
        "!x",
        "%x",
        "@x",
        "-",
        "--",
        "---",
    ),
    *("...", "?", ":", "#", "'q", '"q', "[", "{", ",", "|", ">"),
]
"""Texts that look like another value or begin something in YAML."""
TEXTS = (
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
    | st.sampled_from([*ODD, "", " ", "a #b", "a: b", "- a", "a\nb", "\n", "a\n", "\ta", "? a", "\ufeff"])
    | st.from_regex(r"[-+0-9.eExo_:]{1,8}", fullmatch=True)
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def alike(first: Any, second: Any) -> bool:
    """Whether two values are equal, of equal types and in the same order."""
    if isinstance(first, dict) and isinstance(second, dict):
        return list(first) == list(second) and alike([*first.values()], [*second.values()])
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(alike, first, second))
    return type(first) is type(second) and bool(first == second)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_what_is_written_is_read_back(content: dict[str, Any]) -> None:
    assert alike(load_yaml(dump_yaml(content)), content)


@pytest.mark.parametrize("text", ODD)
def test_text_stays_text_for_other_readers_too(text: str) -> None:
    written = dump_yaml({"a": text})
    assert load_yaml(written) == {"a": text}
    assert yaml.safe_load(written) == {"a": text}  # reads YAML 1.1


def test_values_that_yaml_has_no_words_for() -> None:
    with pytest.raises(
        UserError, match="expected text, numbers, lists and mappings in a recipe, got <object"
    ):
        dump_yaml({"a": [object()]})


# JSON -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "nested at most"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested at most"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key `c` is there twice"),
        (b'{"a": 1e999}', "expected a number below 1.8e308, got 1e999"),
        (b'{"a": ' + b"9" * 5000 + b"}", "of at most 64 bits"),
        (b"[1]", "expected a mapping, got list"),
        (b"", "Expecting value"),
        (b'{"a": 1', "line 1 column"),
        (b"\xff\xfe\x00", "decode"),
    ],
)
def test_json_that_is_damaged_names_its_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path} is damaged (")
    assert len(str(caught.value)) < 300 + len(str(path))


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=r"cannot read .*(No such file|Is a directory)"):
            read_json(path)


def test_figures_may_be_no_numbers() -> None:
    """The reader of a run must know a mean over no rows."""
    found = load_json('{"a": NaN, "b": -Infinity}', "x")
    assert math.isnan(found["a"])
    assert found["b"] == -math.inf
