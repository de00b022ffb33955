"""Recipes: what they may say, and those in the repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from luce import WeightedSum, data, losses
from luce.config import Replacement, merge, parse, read_yaml
from luce.errors import UserError
from luce.methods import FeatureMethod, LogitMethod, MetaDistil, Method
from luce.recipes import ComparisonRecipe, Recipe, build_loss, prepare
from luce.recipes.methods import build_method
from luce.runs import compare, run
from luce.training import TrainingOptions

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


# The recipes in the repository ------------------------------------------------------------------------------


def is_comparison(content: dict[str, Any]) -> bool:
    return "methods" in content


def test_there_are_recipes() -> None:
    assert {"demo", "digits", "digits-teacher"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_means(path: Path) -> None:
    content = read_yaml(path)
    if is_comparison(content):
        comparison = parse(ComparisonRecipe, content)
        assert comparison.title != "Comparison"
        for setting in comparison.settings:
            for method, terms in comparison.methods.items():
                recipe = comparison.recipe(setting, method, seed=11)
                assert (recipe.method, recipe.training.seed) == (method, 11)
                assert recipe.loss == terms
                losses = {name for name, term in terms.items() if "method" not in term}
                assert names_of(build_method(recipe)) == losses
        if comparison.teacher_training is not None:
            assert comparison.teacher_recipe().data.labels_per_class is None
    else:
        build_method(parse(Recipe, content))
    assert len(path.read_text().splitlines()) <= 60  # a recipe fits on a screen


def names_of(method: Method) -> set[str]:
    """Of the terms that a recipe gave it."""
    if isinstance(method, LogitMethod):
        assert isinstance(method.loss, WeightedSum)
        return set(method.loss.weights)
    if isinstance(method, MetaDistil):
        return names_of(method.method)
    assert isinstance(method, FeatureMethod)
    return set(method.terms) | (set() if method.logits is None else names_of(method.logits))


def shortened(content: dict[str, Any]) -> dict[str, Any]:
    """The recipe with two epochs, and of its seeds, settings and methods as few as keep it whole."""
    less = {"epochs": 2, "warmup_epochs": 0, "checkpoint_every": 1}
    changes: dict[str, Any] = {"training": less}
    if is_comparison(content):
        changes |= {"teacher_training": less, "seeds": [0, 1]}
    return merge(content, changes)


def test_the_recipes_of_digits_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = {path.stem: path for path in RECIPES}
    teacher = parse(Recipe, shortened(read_yaml(by_name["digits-teacher"])))
    student = parse(Recipe, shortened(read_yaml(by_name["digits"])))
    assert student.teacher is not None
    assert student.teacher.checkpoint is not None
    run(teacher, Path(student.teacher.checkpoint))
    result = run(student, Path("runs/digits"))
    assert result["epochs"] == 2
    assert result["teacher"]["model"] == teacher.student.name
    assert 0 < result["best"]["test"]["accuracy"] <= 1


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    content = shortened(read_yaml(next(path for path in RECIPES if path.stem == "demo")))
    recipe = parse(ComparisonRecipe, merge(content, {"seeds": [0]}))
    runs, before = compare(recipe, tmp_path / "demo")
    assert (runs, before) == (len(recipe.settings) * len(recipe.methods), 0)


@pytest.mark.parametrize("name", ["fashion-mnist-features", "fashion-mnist-iekd"])
def test_the_recipes_of_features_run(name: str, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    content = shortened(read_yaml(next(path for path in RECIPES if path.stem == name)))
    few = {"few-labels": {"data": {"labels_per_class": 4}}}
    small = {"seeds": [0], "data": make_recipe().data.__dict__, "settings": few}
    recipe = parse(ComparisonRecipe, merge(content, small))
    assert compare(recipe, tmp_path / "features") == (len(recipe.methods), 0)


# Reading ----------------------------------------------------------------------------------------------------


def test_values_are_checked_and_converted() -> None:
    recipe = parse(
        Recipe,
        {
            "training": {"lr": 1, "epochs": 3, "schedule": "step", "milestones": [1, 2]},
            "data": {"validation": 0.3},
            "teacher": {"name": "cnn", "mean": [0, 1]},
        },
    )
    assert (recipe.training.lr, recipe.training.epochs, recipe.training.milestones) == (1.0, 3, [1, 2])
    assert recipe.teacher is not None
    assert recipe.teacher.mean == [0.0, 1.0]
    assert recipe.teacher.cache_outputs is False
    assert parse(Recipe, {}).teacher is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trainig": {}}, r"unknown recipe key `trainig`; did you mean `training`"),
        ({"training": {"epoch": 3}}, r"`training.epoch`; did you mean `training.epochs`"),
        ({"data": {"label_per_class": 3}}, r"did you mean `data.labels_per_class`"),
        ({"teacher": {"chekpoint": "x"}}, r"did you mean `teacher.checkpoint`"),
        ({"student": {"cache_outputs": True}}, r"unknown recipe key `student.cache_outputs`"),
        ({"training": {"epochs": "many"}}, "expected `training.epochs` as an integer, got 'many'"),
        ({"training": {"epochs": 2.5}}, "expected `training.epochs` as an integer, got 2.5"),
        ({"training": {"epochs": True}}, "expected `training.epochs` as an integer, got True"),
        ({"training": {"epochs": None}}, "expected `training.epochs` as an integer, got nothing"),
        ({"training": {"lr": "fast"}}, "expected `training.lr` as a number, got 'fast'"),
        ({"teacher": {"answers": "x"}}, "`teacher.answers` as one of probs, topk, label, got 'x'"),
        ({"student": {"mean": [1, "a"]}}, r"expected `student.mean\[1\]` as a number, got 'a'"),
        ({"student": {"name": 3}}, "expected `student.name` as text, got 3"),
        ({"training": {"cpu": "perhaps"}}, "expected `training.cpu` as true or false, got 'perhaps'"),
        ({"training": {"milestones": 3}}, "expected `training.milestones` as a list, got 3"),
        ({"training": {"optimizer": "lamb"}}, "`training.optimizer` as one of sgd, adamw, got 'lamb'"),
        ({"training": {"schedule": "linear"}}, "as one of cosine, step, constant, got 'linear'"),
        ({"training": {"precision": "fp8"}}, "as one of no, bf16, fp16, got 'fp8'"),
        ({"training": 3}, "expected `training` as a mapping, got 3"),
        ({"training": None}, "expected `training` as a mapping, got nothing"),
        ({"teacher": "cnn"}, "expected `teacher` as a mapping, got 'cnn'"),
        ({"loss": "PLDLoss"}, "expected `loss` as a mapping, got 'PLDLoss'"),
        ({"loss": {"pld": "PLDLoss"}}, "expected `loss.pld` as a mapping, got 'PLDLoss'"),
        ({"training": {"lr": -1}}, r"expected `training\.lr` above 0, got -1"),
        ({"data": {"workers": -1}}, r"expected `data\.workers` in 0 .. 256, got -1"),
        ({"data": {"options": {"root": "x"}}}, r"expected no `root` in the `options` of the data"),
        ({"student": {"options": {"classes": 3}}}, r"expected no `classes` in the `options` of the model"),
        ({1: 2}, r"unknown recipe key `1`"),
    ],
)  # fmt: skip
def test_what_a_recipe_may_not_say(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(Recipe, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"baseline": "cross-entropi"}, r"unknown baseline `cross-entropi`; did you mean `cross-entropy`"),
        ({"seeds": []}, r"expected `seeds` as a list of different integers, got \[\]"),
        ({"seeds": [1, 2, 1]}, r"different integers, got \[1, 2, 1\]"),
        ({"seeds": 3}, "expected `seeds` as a list, got 3"),
        ({"settings": {}}, r"expected at least one entry in `settings`"),
        ({"settings": {"a/b": {}}}, r"can name a folder.*got `a/b`"),
        ({"settings": {"..": {}}}, r"can name a folder.*got `\.\.`"),
        ({"settings": {"teacher": {}}}, r"other than `teacher`, got `teacher`"),
        ({"settings": {"a": {"loss": {}}}}, r"expected no `loss` in setting `a`"),
        ({"settings": {"a": {"method": "KD"}}}, r"expected no `method` in setting `a`"),
        ({"settings": {"a": {"training": None}}}, "expected `settings.a.training` as a mapping, got None"),
        ({"settings": {"a": 3}}, "expected `settings.a` as a mapping, got 3"),
        ({"methods": {"": {}}}, r"can name a folder"),
    ],
)
def test_what_a_comparison_may_not_say(content: dict[str, Any], message: str) -> None:
    methods = {"cross-entropy": {"task": {"loss": "CrossEntropyLoss"}}}
    with pytest.raises(UserError, match=message):
        parse(ComparisonRecipe, {"methods": {**methods, **content.pop("methods", {})}, **content})


def test_settings_are_laid_over_the_recipe() -> None:
    recipe = parse(
        ComparisonRecipe,
        {
            "data": {"name": "sklearn:iris", "validation": 0.3},
            "training": {"epochs": 5},
            "settings": {"few": {"description": "few labels", "data": {"labels_per_class": 2}}, "all": {}},
            "methods": {"cross-entropy": {"task": {"loss": "CrossEntropyLoss"}}},
        },
    )
    few, every = (recipe.recipe(setting, "cross-entropy", 4) for setting in ("few", "all"))
    assert (few.data.labels_per_class, every.data.labels_per_class) == (2, None)
    assert few.data.name == every.data.name == "sklearn:iris"
    assert few.data.validation == 0.3
    assert few.training == every.training == TrainingOptions(epochs=5, seed=4)
    with pytest.raises(UserError, match=r"unknown recipe key `dat`"):
        parse(ComparisonRecipe, {
            "settings": {"few": {"dat": {}}},
            "methods": {"cross-entropy": {"task": {"loss": "CrossEntropyLoss"}}},
        }).recipe("few", "cross-entropy", 0)  # fmt: skip


# Losses -----------------------------------------------------------------------------------------------------


def test_a_loss_is_the_weighted_sum_of_its_terms() -> None:
    loss = build_loss(
        {
            "task": {"loss": "CrossEntropyLoss", "weight": 0.25},
            "kd": {"loss": "KDLoss", "weight": 3, "temperature": 2.0},
        }
    )
    student, teacher, target = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 4
    found = loss(student, teacher, target)
    task = torch.nn.functional.cross_entropy(student, target)
    kd = 4 * torch.nn.functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(found["task"], task / 4)
    torch.testing.assert_close(found["kd"], 3 * kd)
    torch.testing.assert_close(found["loss"], task / 4 + 3 * kd)


NAMES = [
    name
    for name in losses.modules.__all__
    if name not in ("LogitLoss", "Standardized")
    and issubclass(getattr(losses.modules, name), losses.LogitLoss)
]
"""Those on features have a test of their own, in test_features.py."""


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_can_stand_in_a_recipe(name: str) -> None:
    found = build_loss({"term": {"loss": name}})(torch.randn(5, 4), torch.randn(5, 4), torch.arange(5) % 4)
    assert found.keys() == {"term", "loss"}
    assert torch.isfinite(found["loss"])


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_can_be_standardized_in_a_recipe(name: str) -> None:
    student, teacher, target = torch.randn(5, 4), torch.randn(5, 4), torch.arange(5) % 4
    scores = losses.standardize(student), losses.standardize(teacher)
    plain = getattr(losses.modules, name)()
    for standardize, logits in ((True, scores), (False, (student, teacher))):
        loss = build_loss({"term": {"loss": name, "weight": 2, "standardize": standardize}})
        torch.manual_seed(1)  # for a loss that draws
        found = loss(student, teacher, target)["term"]
        torch.manual_seed(1)
        torch.testing.assert_close(found, 2 * plain(*logits, target))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"kd": {"loss": "KDLos"}}, r"unknown loss in `loss.kd`: `KDLos`; did you mean `KDLoss`"),
        ({"kd": {}}, r"unknown loss in `loss.kd`: `None`"),
        ({"kd": {"loss": 3}}, r"unknown loss in `loss.kd`: `3`"),
        ({"kd": {"loss": "LogitLoss"}}, r"unknown loss in `loss.kd`: `LogitLoss`"),
        ({"kd": {"loss": "Standardized"}}, r"unknown loss in `loss.kd`: `Standardized`"),
        (
            {"kd": {"loss": "KDLoss", "standardize": "yes"}},
            r"`loss.kd.standardize`.*true or false, got 'yes'",
        ),
        ({"kd": {"loss": "WeightedSum"}}, r"unknown loss in `loss.kd`: `WeightedSum`"),
        (
            {"kd": {"loss": "KDLoss", "temprature": 3}},
            r"unknown option of KDLoss .*did you mean `temperature`",
        ),
        ({"kd": {"loss": "KDLoss", "temperature": 0}}, r"`loss.kd`: .*`temperature`.*above 0, got 0"),
        ({"kd": {"loss": "KDLoss", "temperature": "hot"}}, r"`loss.kd`: .*`temperature`.*'hot'"),
        ({"kd": {"loss": "KDLoss", "reduction": "avg"}}, r"`loss.kd`: .*`reduction`.*'avg'"),
        ({"kd": {"loss": "KDLoss", "weight": -1}}, r"weight of kd.*at least 0, got -1"),
        ({"kd": {"loss": "KDLoss", "weight": "x"}}, r"weight of kd.*got 'x'"),
        ({"kd": {"loss": "KDLoss", "weight": True}}, r"weight of kd.*got True"),
        ({"kd": {"loss": "KDLoss", "warmup": True}}, r"warmup of kd.*got True"),
        ({"kd": {"loss": "KDLoss", "temperature": True}}, r"`loss.kd`: .*`temperature`.*got True"),
        ({"loss": {"loss": "KDLoss"}}, r'none of them called "loss"'),
        ({}, r"expected at least one term"),
    ],
)
def test_what_a_loss_may_not_be(terms: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_loss(terms)


# Files and options ------------------------------------------------------------------------------------------


def test_merging_changes_nothing() -> None:
    base, top = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "e": {"f": 5}}
    assert merge(base, top, {"a": {"c": None}}) == {"a": {"b": 4, "c": None}, "d": 3, "e": {"f": 5}}
    assert merge(base, {"a": 7}) == {"a": 7, "d": 3}
    replaced = merge(base, {"a": Replacement(e=5)})
    assert replaced == {"a": {"e": 5}, "d": 3}
    assert type(replaced["a"]) is dict  # PyYAML's safe dump refuses subclasses
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}
    assert top == {"a": {"b": 4}, "e": {"f": 5}}


@pytest.mark.parametrize("turned", [0, 1])
def test_a_teacher_with_classes_in_another_order_is_warned_of(
    turned: int, toy: ModuleType, make_recipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Knowing(torch.nn.Module):
        """Rows are multiples of their label."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            label = (inputs[:, 0, 0, 0].long() + turned) % 4
            return torch.nn.functional.one_hot(label, 4).float()

    labels = torch.arange(80) % 4
    rows = torch.ones(80, 1, 2, 2) * labels[:, None, None, None]
    toy.images = lambda: data.from_datasets(TensorDataset(rows, labels))  # type: ignore[attr-defined]
    toy.network = lambda **_: Knowing()  # type: ignore[attr-defined]
    recipe = make_recipe(teacher=Replacement(name="python:toy.network"))
    recipe.teacher.mean, recipe.teacher.std = [0.0], [1.0]
    summary = prepare(recipe).teacher.summary  # type: ignore[union-attr]
    assert summary["test"]["accuracy"] == 1 - turned
    assert ("the teacher is right on 0 of 20 test rows, where chance gives 5" in caplog.text) == bool(turned)
