"""A run that Ctrl-C or SIGTERM ends loses no epoch that could be kept, and goes on to the same numbers."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luce import stops
from luce.methods import LogitMethod
from luce.recipes import Recipe
from luce.runs import run
from luce.training import metrics

Make = Callable[..., Recipe]
Outcome = Callable[[Path], dict[str, Any]]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="other signals")


@pytest.fixture
def arrives(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[int]]:
    """Let a signal arrive in the n-th training step; return the list of steps made since."""
    step = LogitMethod.step

    def arm(number: int, at: int) -> list[int]:
        made: list[int] = []

        def counted(*arguments: Any) -> Any:
            made.append(len(made) + 1)
            if made[-1] == at:
                signal.raise_signal(number)
            return step(*arguments)

        monkeypatch.setattr(LogitMethod, "step", counted)
        return made

    return arm


# 72 training rows are 5 batches of 16: the third epoch is batches 11 to 15.
@pytest.mark.parametrize(
    ("number", "every", "steps", "kept"),
    [
        pytest.param(signal.SIGINT, 1, 12, "checkpoint-2", id="Ctrl-C"),
        pytest.param(signal.SIGTERM, 1, 12, "checkpoint-2", id="SIGTERM with the last epoch saved"),
        pytest.param(signal.SIGTERM, 4, 15, "checkpoint-3", id="SIGTERM with the last epoch not saved"),
    ],
)
def test_a_signal_in_a_step(
    number: int,
    every: int,
    steps: int,
    kept: str,
    make_recipe: Make,
    outcome: Outcome,
    arrives,
    tmp_path: Path,
) -> None:
    recipe = make_recipe(training={"checkpoint_every": every, "ema": 0.9})
    run(recipe, tmp_path / "whole")
    made = arrives(number, 12)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else stops.Terminated):
        run(recipe, tmp_path / "cut")
    assert len(made) == steps
    assert [path.name for path in (tmp_path / "cut").glob("*checkpoint*")] == [kept]
    assert not (tmp_path / "cut" / ".lock").exists()
    run(recipe, tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_sigterm_during_validation_keeps_the_epoch(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief, calls = metrics.brief, iter(range(1, 100))

    def counted(*arguments: Any) -> Any:
        if next(calls) == 3:  # after the teacher and the first epoch
            signal.raise_signal(signal.SIGTERM)
        return brief(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "brief", counted)
        with pytest.raises(stops.Terminated):
            run(make_recipe(), tmp_path)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]


@pytest.mark.parametrize("part", ["training", "reading processes"])
def test_ctrl_c_in_a_destructor_is_not_lost(
    part: str, make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python drops an exception that is raised there."""

    class Left:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def steps() -> Iterator[Left]:
        yield Left()

    workers = 2 if part == "reading processes" else 0
    recipe = make_recipe(data={"workers": workers}, training={"epochs": 2})
    step, left = LogitMethod.step, steps()
    monkeypatch.setattr(LogitMethod, "step", lambda *arguments: (next(left, None), step(*arguments))[1])
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path)
    assert not (tmp_path / "result.json").exists()
