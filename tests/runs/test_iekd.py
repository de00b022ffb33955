"""IE-KD beside PLD, from recipes to run folders: the auto-encoder is trained first, and once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from luce import IEKDLoss, models
from luce.config import merge
from luce.errors import UserError
from luce.methods import FeatureMethod
from luce.recipes import Recipe
from luce.runs import run

Make = Callable[..., Recipe]
Outcome = Callable[[Path], dict[str, Any]]

IEKD = {
    "loss": "IEKDLoss",
    "student": "stages.0",
    "inheritance_weight": 50,
    "exploration_weight": 50,
    "epochs": 2,
}
PREPARED = {"inheritance", "exploration", "cka_inheritance", "cka_exploration"}


def teacher(classes: int, input_shape: tuple[int, ...], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.build("cnn", classes=classes, input_shape=input_shape, widths=[6, 10])


@pytest.fixture
def make(make_recipe: Make, toy: ModuleType) -> Make:
    """Digits, and a student of five channels, an odd number."""
    toy.teacher = teacher  # type: ignore[attr-defined]

    base = {
        "data": {"name": "sklearn:digits", "validation": 0.6},
        "student": {"name": "cnn", "options": {"widths": [4, 5]}},
        "teacher": {"name": "python:toy.teacher"},
        "loss": {"pld": {"loss": "PLDLoss"}, "iekd": IEKD},
        "training": {"epochs": 2, "batch_size": 128},
    }

    def recipe(term: dict[str, Any] | None = None, **changes: Any) -> Recipe:
        return make_recipe(**merge(base, {"loss": {"iekd": term or {}}, **changes}))

    return recipe


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line)["train"] for line in (folder / "metrics.jsonl").open()]


def test_a_run_tells_of_both_parts_and_of_the_preparation(make: Make, tmp_path: Path) -> None:
    result = run(make(), tmp_path)
    assert result["prepared"].keys() == {"iekd.reconstruction", "iekd.relative_reconstruction"}
    assert 0 < result["prepared"]["iekd.relative_reconstruction"] < 1
    for line in lines(tmp_path):
        assert line.keys() == {"pld", "iekd", "loss", *(f"iekd.{name}" for name in PREPARED)}
        assert line["iekd"] == pytest.approx(50 * (line["iekd.inheritance"] + line["iekd.exploration"]))
        assert line["loss"] == pytest.approx(line["pld"] + line["iekd"])
        assert 0 < line["iekd.cka_exploration"] < 1
    first, last = lines(tmp_path)
    assert last["iekd.inheritance"] < first["iekd.inheritance"]
    assert last["iekd.exploration"] < first["iekd.exploration"] < 0
    student = models.build("cnn", classes=10, input_shape=(1, 8, 8), widths=[4, 5])
    student.load_state_dict(load_file(tmp_path / "student.safetensors"))  # the student and nothing else


class Interrupt(BaseException):
    """What no handler of ours may swallow."""


@pytest.mark.parametrize(
    ("autoencoder", "batch"),
    [pytest.param("prepared", 1, marks=pytest.mark.slow), ("prepared", 8), ("online", 8)],
)
def test_an_interrupted_run_prepares_once_and_ends_in_the_same_numbers(
    autoencoder: str,
    batch: int,
    make: Make,
    outcome: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """575 rows are 5 batches: cut in the first of all, and in the middle of the second epoch."""
    recipe = make(term={"split": "random", "autoencoder": autoencoder}, data={"augment": "crop_flip"})
    run(recipe, tmp_path / "whole")
    prepare, step, left, times = IEKDLoss.prepare, FeatureMethod.step, iter(range(batch)), []

    def counted(*arguments: Any) -> Any:
        times.append(1)
        return prepare(*arguments)

    def interrupted(*arguments: Any) -> Any:
        if next(left) == batch - 1:
            raise Interrupt
        return step(*arguments)

    monkeypatch.setattr(IEKDLoss, "prepare", counted)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureMethod, "step", interrupted)
        with pytest.raises(Interrupt):
            run(recipe, tmp_path / "cut")
    run(recipe, tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert len(times) == (autoencoder == "prepared")


def test_weights_of_0_reproduce_plain_training(make: Make, tmp_path: Path) -> None:
    """The preparation draws nothing that the training would draw, and no gradient reaches the student."""
    recipe = make(term={"inheritance_weight": 0.0, "exploration_weight": 0.0}, data={"augment": "crop_flip"})
    run(recipe, tmp_path / "off")
    del recipe.loss["iekd"]
    run(recipe, tmp_path / "plain")
    off, plain = (load_file(tmp_path / name / "student-last.safetensors") for name in ("off", "plain"))
    assert all(torch.equal(off[name], plain[name]) for name in plain)
    assert [line["pld"] for line in lines(tmp_path / "off")] == [
        line["pld"] for line in lines(tmp_path / "plain")
    ]


def test_an_online_auto_encoder_learns_along(make: Make, tmp_path: Path) -> None:
    result = run(make(term={"autoencoder": "online"}, training={"epochs": 3, "lr": 0.03}), tmp_path)
    assert result["prepared"] == {}
    first, *_, last = lines(tmp_path)
    assert first.keys() == {"pld", "iekd", "loss", *(f"iekd.{n}" for n in (*PREPARED, "reconstruction"))}
    assert last["iekd.reconstruction"] < 0.9 * first["iekd.reconstruction"]


@pytest.mark.parametrize(
    ("term", "changes", "message"),
    [
        ({}, {"student": {"name": "cnn", "options": {"widths": [4, 1]}}}, "`iekd`: .*at least 2 channels"),
        ({"student": "pool"}, {}, "`iekd`: .*take it before the pooling"),
        ({"student": ["stages.0", "stages.0"]}, {}, "`iekd`: expected one feature of each network"),
        ({"lr": 1e30}, {}, "finite error of the prepared auto-encoder.*lower `lr`"),
        ({"autoencodr": "online"}, {}, "did you mean `autoencoder`"),
    ],
)
def test_what_cannot_work_is_told_before_training(
    term: dict[str, Any],
    changes: dict[str, Any],
    message: str,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(FeatureMethod, "step", None)
    with pytest.raises(UserError, match=message):
        run(make(term=term, **changes), tmp_path)
