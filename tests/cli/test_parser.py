"""From the words of a command line to a dataclass, and from the dataclass to the help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from luce.cli._help import help_text
from luce.cli._parser import as_typed, parse_arguments, recipe_fields
from luce.errors import UserError


@dataclass
class Training:
    """How to train.

    Attributes:
        epochs: Passes over the data.
        lr: Learning rate.
        cpu: Use the CPU.
    """

    epochs: int = 3
    lr: float = 0.1
    cpu: bool = False


@dataclass
class Recipe:
    """A recipe.

    Attributes:
        title: Title of the report.
        seeds: One run each.
        training: How to train.
        loss: Terms.
        teacher: How to train the teacher.
    """

    title: str = "A title"
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    training: Training = field(default_factory=Training)
    loss: dict[str, dict[str, Any]] = field(default_factory=dict)
    teacher: Training | None = None


@dataclass(frozen=True, kw_only=True)
class Base:
    """Shared.

    Attributes:
        steps: Time steps.
    """

    steps: int = 64

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"expected `steps` of at least 1, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Options(Base):
    """Simulate a run.

      luce spike runs/a

    Attributes:
        run: A finished run.
        levels: Lower levels, which
            fire earlier.
        mode: Order of updates.
        out: Folder.
        token: A secret.
        cpu: Use the CPU.
        settings: Keyword arguments.
    """

    run: Path
    levels: tuple[float, ...] = (99.0, 95.0)
    mode: Literal["a", "b"] = "a"
    out: Path | None = None
    token: str | None = None
    cpu: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict, metadata=recipe_fields(Recipe))


@dataclass(frozen=True, kw_only=True)
class Words:
    """Attributes:
    first: The first.
    rest: The others.
    """

    first: str
    rest: tuple[str, ...]
    n: int = 0


def options(*words: str) -> Options:
    return parse_arguments(Options, words, "spike")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--steps", "8"], {"steps": 8}),
        (["--steps=8"], {"steps": 8}),
        (["--steps", "8", "--steps", "9"], {"steps": 9}),
        (["--levels", "1,2.5,-3"], {"levels": (1.0, 2.5, -3.0)}),
        (["--levels", "[1, 1e-2]"], {"levels": (1.0, 0.01)}),
        (["--levels=-1,0"], {"levels": (-1.0, 0.0)}),
        (["--levels", "-1"], {"levels": (-1.0,)}),
        (["--mode", "b"], {"mode": "b"}),
        (["--out", "a=b"], {"out": Path("a=b")}),
        (["--out=a=b"], {"out": Path("a=b")}),
        (["--out", "null"], {"out": None}),
        (["--token", "123"], {"token": "123"}),
        (["--token", "true"], {"token": "true"}),
        (["--settings", "{a: no, b: on}"], {"settings": {"a": "no", "b": "on"}}),
        (["--settings.a", "1e-3"], {"settings": {"a": 1e-3}}),
        (["--settings.a", "null"], {"settings": {"a": None}}),
        (["--settings.a=-x"], {"settings": {"a": "-x"}}),
        (["--cpu"], {"cpu": True}),
        (["--cpu", "true"], {"cpu": True}),
        (["--cpu=false"], {"cpu": False}),
        (["--cpu", "false", "--steps", "2"], {"cpu": False, "steps": 2}),
        (["--settings", '{"a": 1}'], {"settings": {"a": 1}}),
        (["--settings.a", "1", "--settings.b.c", "x"], {"settings": {"a": 1, "b": {"c": "x"}}}),
        (["--title", "7"], {"overrides": {"title": "7"}}),
        (["--seeds", "1,2"], {"overrides": {"seeds": [1, 2]}}),
        (["--training.lr=1", "--training.epochs", "3"], {"overrides": {"training": {"lr": 1, "epochs": 3}}}),
        (["--training.cpu", "--steps", "2"], {"overrides": {"training": {"cpu": True}}, "steps": 2}),
        (["--loss.kd.temperature", "-1"], {"overrides": {"loss": {"kd": {"temperature": -1}}}}),
        (
            ["--loss", "{kd: {loss: KDLoss}}", "--loss.kd.weight", "2"],
            {"overrides": {"loss": {"kd": {"loss": "KDLoss", "weight": 2}}}},
        ),
        (["--teacher.epochs", "1"], {"overrides": {"teacher": {"epochs": 1}}}),
        (["--teacher", "null"], {"overrides": {"teacher": None}}),
    ],
)  # fmt: skip
def test_words(words: list[str], expected: dict[str, Any]) -> None:
    assert options("runs/a", *words) == Options(run=Path("runs/a"), **expected)
    assert options(*words, "runs/a") == Options(run=Path("runs/a"), **expected)


def test_a_repeated_option_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert options("runs/a", "--steps", "8", "--loss.kd.weight", "1", "--loss", "{}").overrides == {
        "loss": {}
    }
    assert "`--loss` is given twice, and only its last value counts" in caplog.text
    options("runs/a", "--loss", "{kd: {loss: KDLoss}}", "--loss.kd.weight", "2", "--steps", "8")
    assert len(caplog.records) == 1


def test_the_last_positional_argument_may_be_a_list() -> None:
    assert parse_arguments(Words, ["a", "b", "--n", "1", "c"], "x") == Words(first="a", rest=("b", "c"), n=1)
    with pytest.raises(UserError, match="expected REST; luce x --help describes the arguments"):
        parse_arguments(Words, ["a"], "x")
    with pytest.raises(UserError, match="expected FIRST and REST"):
        parse_arguments(Words, [], "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epochs"], "unexpected argument `epochs`"),
        (["-e", "3"], "unknown option `-e`"),
        (["--", "3"], "unknown option `--`"),
        (["--step", "3"], "unknown option `--step`; did you mean `--steps`"),
        (["--run", "x"], "unknown option `--run`"),
        (["--trainin.epochs", "3"], "unknown option `--trainin.epochs`; did you mean `--training`"),
        (["--set-tings", "3"], "did you mean `--settings`"),
        (["--hlep"], "did you mean `--help`"),
        (["--steps"], "expected a value after `--steps`"),
        (["--steps", "--cpu"], "expected a value after `--steps`"),
        (["--steps", "many"], "expected `--steps` as an integer, got 'many'"),
        (["--steps", "1.5"], "expected `--steps` as an integer, got 1.5"),
        (["--steps", "true"], "expected `--steps` as an integer, got True"),
        (["--steps", "null"], "expected `--steps` as an integer, got nothing"),
        (["--steps", ""], "expected a value after `--steps`, got an empty one"),
        (["--levels", ""], "expected a value after `--levels`, got an empty one"),
        (["--out", ""], "expected a value after `--out`, got an empty one"),
        (["--token="], "expected a value after `--token`, got an empty one"),
        (["--settings.a", "#3"], "value of `--settings.a`: expected a value, got nothing but comments"),
        (["--settings.a", "3 #4"], "`--settings.a`: expected one value, got a comment after it"),
        (["--settings", "{a: 1, a: 2}"], "`--settings`: `a` is there twice"),
        (["--steps", "1e999"], "`--steps`: expected a number below 1.8e308, got 1e999"),
        (["--out", "$NOWHERE/a"], "expected a path without variables, got `$NOWHERE/a`"),
        (["--out", "~nobody-of-this-name/a"], "there is no such home folder"),
        (["--steps", "0"], "expected `--steps` of at least 1, got 0"),
        (["--steps.x", "0"], "expected `--steps` as an integer, got {'x': 0}"),
        (["--steps", "[1"], "cannot read the value of `--steps`"),
        (["--levels", "1,b"], "expected `--levels[1]` as a number, got 'b'"),
        (["--mode", "c"], "expected `--mode` as one of a, b, got 'c'"),
        (["--cpu=maybe"], "expected `--cpu` as true or false, got 'maybe'"),
        (["--settings", "3"], "expected `--settings` as a mapping, got 3"),
        (["--training", "3", "--training.epochs", "2"], "and another option both set `training`"),
    ],
)  # fmt: skip
def test_words_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        options("runs/a", *words)
    assert message in as_typed(str(caught.value), Options)


def test_the_help_shows_every_field_once_with_text_type_and_default() -> None:
    text = help_text(Options, "spike")
    assert text.startswith(
        "usage: luce spike RUN [--OPTION VALUE ...] [--RECIPE.FIELD VALUE ...]\n\n"
        "Simulate a run.\n\n  luce spike runs/a\n\narguments:\n"
    )
    flat = " ".join(text.split())
    for entry in (
        "RUN A finished run.",
        "--steps N Time steps. (default: 64)",
        "--levels X,... Lower levels, which fire earlier. (default: 99.0,95.0)",
        "--mode a|b Order of updates. (default: a)",
        "--out PATH Folder.",
        "--cpu Use the CPU.",
        "--settings MAPPING Keyword arguments.",
        "--title TEXT Title of the report. (default: A title)",
        "--seeds N,... One run each. (default: 0,1)",
        "--training.epochs N Passes over the data. (default: 3)",
        "--teacher.epochs N Passes over the data. (default: 3)",
        "--loss MAPPING Terms.",
    ):
        assert flat.count(entry) == 1, entry
    assert "--overrides" not in text
    assert max(map(len, text.splitlines())) <= 110
