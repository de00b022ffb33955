"""LONDON from recipes to run folders, on the digits, and what is told before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from luce import models
from luce.config import merge, parse, read_yaml
from luce.errors import UserError
from luce.methods import FeatureMethod
from luce.recipes import ComparisonRecipe, Recipe
from luce.runs import compare, run

MAPS = ["stem.-1:input", "stages.0.-1:input", "stages.1.-1:input"]
TERM = {"loss": "LONDONLoss", "weight": 0.01, "lipschitz_weight": 2.0, "student": MAPS}
STUDENT = {"name": "cnn", "options": {"widths": [3, 4, 5]}}


def guide(classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return models.build("cnn", classes=classes, input_shape=input_shape, widths=[4, 6, 8])


@pytest.fixture
def recipe(toy: ModuleType) -> Recipe:
    toy.guide = guide  # type: ignore[attr-defined]
    content = {
        "student": STUDENT,
        "teacher": {"name": "python:toy.guide"},
        "data": {"name": "sklearn:digits", "labels_per_class": 20},
        "loss": {"pld": {"loss": "PLDLoss"}, "london": TERM},
        "training": {"epochs": 3, "batch_size": 128, "lr": 0.01},
    }
    return parse(Recipe, content)


def test_distilling_the_digits(recipe: Recipe, tmp_path: Path) -> None:
    result = run(recipe, tmp_path)
    lines = [json.loads(line)["train"] for line in (tmp_path / "metrics.jsonl").open()]
    for line in lines:
        assert line.keys() == {"pld", "london", "london.ofd", "london.lipschitz", "loss"}
        assert line["london"] == pytest.approx(0.01 * (line["london.ofd"] + 2 * line["london.lipschitz"]))
        assert line["loss"] == pytest.approx(line["pld"] + line["london"])
    assert lines[-1]["london"] < 0.9 * lines[0]["london"]
    assert 0 < result["best"]["test"]["accuracy"] <= 1


def test_the_lipschitz_term_alone_is_learnt(recipe: Recipe, tmp_path: Path) -> None:
    recipe.loss = {"lipschitz": {"loss": "LipschitzLoss", "relative": True, "student": MAPS}}
    run(recipe, tmp_path)
    values = [json.loads(line)["train"]["lipschitz"] for line in (tmp_path / "metrics.jsonl").open()]
    assert values[-1] < 0.5 * values[0]


WRONG = [
    (
        {"student": ["stem.-1:input", "stages.2"]},
        r"unknown module of Network `stages\.2`; did you mean `stages",
    ),
    (
        {"teacher": ["stem.-1:input", "stages.0.-1:input"]},
        "`london`: expected as many features of the student as of the teacher, got 3 and 2",
    ),
    (
        {"student": ["stages.0"]},
        "`london`: expected at least two, of consecutive stages, as features for LONDONLoss, got 1",
    ),
    ({"student": ["stages.0", "pool"]}, r"`london`: .*got \(.*\); take it before the pooling"),
]


@pytest.mark.parametrize(("term", "message"), WRONG)
def test_what_does_not_fit_is_told_before_training(
    term: dict[str, Any],
    message: str,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(FeatureMethod, "step", None)
    recipe.loss["london"] = {**TERM, **term}
    with pytest.raises(UserError, match=message):
        run(recipe, tmp_path)


@pytest.mark.parametrize(("term", "message"), WRONG)
def test_a_comparison_tells_it_before_its_teacher_is_trained(
    term: dict[str, Any], message: str, tmp_path: Path
) -> None:
    methods = {
        "cross-entropy": {"task": {"loss": "CrossEntropyLoss"}},
        "LONDON": {"london": {**TERM, **term}},
    }
    content = {
        "student": STUDENT,
        "teacher": {"name": "cnn", "options": {"widths": [4, 6, 8]}},
        "data": {"name": "sklearn:digits"},
        "seeds": [0],
        "methods": methods,
    }
    with pytest.raises(UserError, match=f"^method `LONDON`: .*{message}"):
        compare(parse(ComparisonRecipe, content), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_recipe_runs(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    content = read_yaml(Path(__file__).parents[2] / "recipes/fashion-mnist-london.yaml")
    small = {
        "seeds": [0],
        "data": make_recipe().data.__dict__,
        "settings": {"few-labels": {"data": {"labels_per_class": 4}}},
        "training": {"epochs": 1},
        "teacher_training": {"epochs": 1},
    }
    recipe = parse(ComparisonRecipe, merge(content, small))
    assert compare(recipe, tmp_path / "london") == (len(recipe.methods), 0)
