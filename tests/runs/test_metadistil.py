"""MetaDistil in whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luce.config import parse
from luce.errors import UserError
from luce.methods import MetaDistil
from luce.recipes import ComparisonRecipe, Recipe
from luce.recipes.methods import PROCEDURES
from luce.runs import compare, run

Make = Callable[..., Recipe]
Outcome = Callable[[Path], dict[str, Any]]

KD = {
    "task": {"loss": "CrossEntropyLoss", "weight": 0.1},
    "kd": {"loss": "KDLoss", "weight": 0.9, "temperature": 4.0},
}
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05, "clip_norm": 1.0},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
}


def with_meta(make_recipe: Make, terms: dict[str, Any] = KD, **changes: Any) -> Recipe:
    options = {"quiz": 0.25, "teacher_lr": 0.01, **changes.pop("options", {})}
    return make_recipe(loss={"pld": {"method": "MetaDistil", **options}, **terms}, **changes)


class OnlyQuiz(MetaDistil):
    """Holds the same rows out, and does nothing with them."""

    needs_teacher = True

    @property
    def optimizers(self) -> dict[str, Any]:
        return {}

    def before_round(self, *arguments: Any) -> dict[str, Any]:
        return {}

    def step(self, *arguments: Any) -> Any:
        return self.method.step(*arguments)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("per_round", [1, 2])
def test_a_teacher_that_does_not_learn_makes_a_plain_run_bit_for_bit(
    per_round: int, optimizer: str, make_recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {"data": {"augment": "crop_flip"}, "training": {**OPTIMIZERS[optimizer], "ema": 0.9}}
    options = {"teacher_lr": 0.0, "batches_per_round": per_round}
    students = {}
    for name, method in (("meta", MetaDistil), ("plain", OnlyQuiz)):
        monkeypatch.setitem(PROCEDURES, "MetaDistil", method)
        result = run(with_meta(make_recipe, options=options, **changes), tmp_path / name)
        students[name] = (tmp_path / name / "student-last.safetensors").read_bytes()
        assert ("quiz_loss" in result["train"]) == (name == "meta")
    assert students["meta"] == students["plain"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("terms", [KD, {"rank": {"loss": "PLDLoss"}}], ids=["kd", "pld"])
def test_what_a_run_tells(terms: dict[str, Any], optimizer: str, make_recipe: Make, tmp_path: Path) -> None:
    recipe = with_meta(make_recipe, terms, training={**OPTIMIZERS[optimizer], "epochs": 8})
    result = run(recipe, tmp_path / "run")
    terms = {name for name in terms if len(terms) > 1} or {"rank"}
    noted = {"quiz_loss", "teacher_gradient", "teacher_drift", "teacher_restored"}
    assert result["train"].keys() == {*terms, "loss", *noted}
    assert result["train"]["teacher_drift"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train"]["quiz_loss"] < lines[0]["train"]["quiz_loss"]
    assert result["co_trained"]["teacher"]["test"].keys() == result["last"]["test"].keys()


class Interrupt(BaseException):
    """What no handler of ours may swallow."""


@pytest.mark.parametrize(
    "changes",
    [
        {"training": OPTIMIZERS["sgd"], "options": {"batches_per_round": 2, "quiz_batches": 2}},
        {"options": {"teacher_optimizer": "adamw", "teacher_from_epoch": 2}, "training": {"ema": 0.9}},
        {"options": {"teacher_optimizer": "adamw", "teacher_lr": 10.0}},  # the guard has its say
        {"training": {"precision": "bf16"}, "data": {"augment": "crop_flip"}},
        {"terms": {"rank": {"loss": "PLDLoss", "teacher_temperature": "auto"}}},  # found after `build`
    ],
    ids=["sgd, two steps a round", "adamw, from the second epoch", "restored", "bf16", "prepared"],
)
@pytest.mark.parametrize("batch", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_in_the_same_numbers(
    batch: int,
    changes: dict[str, Any],
    make_recipe: Make,
    outcome: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    recipe = with_meta(make_recipe, **changes)
    run(recipe, tmp_path / "whole")
    step, left = MetaDistil.step, iter(range(batch + 1))
    next(left)

    def interrupted(*arguments: Any) -> Any:
        if next(left) == batch:
            raise Interrupt
        return step(*arguments)

    monkeypatch.setattr(MetaDistil, "step", interrupted)
    with pytest.raises(Interrupt):
        run(recipe, tmp_path / "cut")
    monkeypatch.setattr(MetaDistil, "step", step)
    run(recipe, tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_the_guard_tells_in_a_run(make_recipe: Make, tmp_path: Path) -> None:
    teacher = run(make_recipe(loss={"pld": {"loss": "CrossEntropyLoss"}}, teacher=None), tmp_path / "teacher")
    assert teacher["last"]["test"]["accuracy"] > 0.8
    options = {"teacher_optimizer": "adamw", "teacher_lr": 10.0}
    known = {"teacher": {"checkpoint": str(tmp_path / "teacher"), "name": "mlp", "options": {"seed": None}}}
    figures = {}
    for max_drop in (0.02, 1.0):
        recipe = with_meta(make_recipe, options={**options, "max_drop": max_drop}, **known)
        figures[max_drop] = run(recipe, tmp_path / str(max_drop))
    guarded, unguarded = figures[0.02], figures[1.0]
    assert guarded["train"]["teacher_restored"] >= 1
    assert guarded["co_trained"]["teacher"]["test"]["accuracy"] > 0.8
    # Compare, since the level itself depends on rounding: the teacher leaps and is restored.
    assert guarded["last"]["test"]["accuracy"] > unguarded["last"]["test"]["accuracy"] + 0.3
    assert unguarded["train"]["teacher_restored"] == 0
    assert unguarded["co_trained"]["teacher"]["test"]["accuracy"] < 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"cache_outputs": True}}, "for MetaDistil, got one with cached outputs"),
        ({"training": {"accumulate": 2}}, "`training.accumulate: 1` for MetaDistil"),
        ({"data": {"labels_per_class": 1}}, "no rows to hold out for MetaDistil"),
        ({"terms": {"rank": {"loss": "ListMLELoss"}}}, "smoothly with the teacher's logits for MetaDistil"),
        ({"terms": {"kd": {"loss": "KDLoss", "backend": "cpu"}}}, "no gradient for the teacher; .* 'auto'"),
        ({"terms": {"task": {"loss": "CrossEntropyLoss"}}}, "`loss.pld`: expected a loss that uses the"),
        ({"options": {"teacher_lr": -1}}, "`loss.pld`: expected `teacher_lr`"),
        ({"options": {"quiz_batch": 2}}, "unknown option of MetaDistil .*quiz_batches"),
    ],
)
def test_what_cannot_work_is_told_before_training(
    changes: dict[str, Any], message: str, make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Iterator[Any]:
        raise AssertionError

    monkeypatch.setattr(MetaDistil, "before_round", never)
    with pytest.raises(UserError, match=message):
        run(with_meta(make_recipe, **changes), tmp_path / "run")


def test_a_comparison_tells_of_a_teacher_that_is_remembered(toy: object, tmp_path: Path) -> None:
    content = {
        "data": {"name": "python:toy.images", "validation": 0.2},
        "student": {"name": "python:toy.network"},
        "teacher": {"name": "python:toy.network", "options": {"seed": 5}, "cache_outputs": True},
        "baseline": "kd",
        "methods": {"kd": KD, "meta": {"meta": {"method": "MetaDistil"}, **KD}},
    }
    with pytest.raises(UserError, match=r"method `meta`: .*set `teacher.cache_outputs: false`"):
        compare(parse(ComparisonRecipe, content), tmp_path / "comparison")
