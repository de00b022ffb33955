"""Comparisons: what is run, what is not run again, and what is found out before anything runs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from luce.config import merge, parse, read_yaml
from luce.errors import UserError
from luce.recipes import ComparisonRecipe
from luce.runs import compare
from luce.training import metrics

METHODS = {
    "cross-entropy": {"task": {"loss": "CrossEntropyLoss"}},
    "KD": {"kd": {"loss": "KDLoss", "temperature": 4.0}},
}
BASE: dict[str, Any] = {
    "seeds": [0, 1],
    "data": {"name": "python:toy.images", "validation": 0.2},
    "student": {"name": "mlp", "options": {"hidden": [6]}},
    "teacher": {"name": "mlp", "options": {"hidden": [32]}, "cache_outputs": True},
    "teacher_training": {"epochs": 2, "lr": 0.01},
    "training": {"epochs": 2, "batch_size": 32, "lr": 0.01},
    "settings": {"all": {}, "few": {"description": "few labels", "data": {"labels_per_class": 3}}},
    "methods": METHODS,
}


@pytest.fixture
def make(toy: ModuleType) -> Callable[..., ComparisonRecipe]:
    return lambda **changes: parse(ComparisonRecipe, merge(BASE, changes))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders, below that of the comparison, in which something was trained."""
    module, folders = sys.modules["luce.runs.run"], []
    fit = module.fit

    def spy(*arguments: Any, folder: Path, **options: Any) -> Any:
        folders.append("/".join(folder.parts[-3:]) if folder.name != "teacher" else "teacher")
        return fit(*arguments, folder=folder, **options)

    monkeypatch.setattr(module, "fit", spy)
    return folders


GRID = [
    f"{setting}/{method}/seed-{seed}"
    for setting in ("all", "few")
    for seed in (0, 1)
    for method in ("cross-entropy", "KD")
]


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_is_trained_once(make: Any, trained: list[str], tmp_path: Path) -> None:
    assert compare(make(), tmp_path / "c", "luce compare it") == (8, 0)
    assert trained == ["teacher", *GRID]
    before = snapshot(tmp_path)
    assert compare(make(), tmp_path / "c", "luce compare it --spelled otherwise") == (8, 8)
    assert trained == ["teacher", *GRID]
    assert snapshot(tmp_path) == before


def test_only_what_is_missing_is_trained_again(make: Any, trained: list[str], tmp_path: Path) -> None:
    compare(make(), tmp_path)
    before = snapshot(tmp_path)
    trained.clear()
    (tmp_path / "few/KD/seed-1/result.json").unlink()
    assert compare(make(), tmp_path) == (8, 7)
    assert trained == ["few/KD/seed-1"]
    after = snapshot(tmp_path)
    changed = {path for path in after if after[path] != before[path]}
    assert {path.parent for path in changed} == {tmp_path / "few/KD/seed-1"}
    assert {path.suffix for path in changed} <= {".json", ".jsonl"}  # times, and nothing else
    results = [json.loads(s[tmp_path / "few/KD/seed-1/result.json"]) for s in (before, after)]
    for result in results:
        result.pop("seconds")
    assert results[0] == results[1]


def test_a_lost_run_and_a_lost_teacher(make: Any, trained: list[str], tmp_path: Path) -> None:
    compare(make(), tmp_path)
    before = (tmp_path / "all/KD/seed-0/student.safetensors").read_bytes()
    trained.clear()
    shutil.rmtree(tmp_path / "all/KD/seed-0")
    shutil.rmtree(tmp_path / "teacher")
    compare(make(), tmp_path)
    assert trained == ["teacher", "all/KD/seed-0"]
    assert (tmp_path / "all/KD/seed-0/student.safetensors").read_bytes() == before


def test_an_interrupted_comparison_goes_on(
    make: Any, trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(make(), tmp_path / "whole")
    trained.clear()
    full, calls = metrics.full, iter(range(100))

    def stops(*arguments: Any) -> Any:
        if next(calls) == 7:  # two moments per run: teacher, all/CE/0, all/KD/0, then the last of all/CE/1
            raise KeyboardInterrupt
        return full(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "full", stops)
        with pytest.raises(KeyboardInterrupt):
            compare(make(), tmp_path / "cut")
    assert trained == ["teacher", *GRID[:3]]
    trained.clear()
    assert compare(make(), tmp_path / "cut") == (8, 2)
    assert trained == GRID[2:]
    for name in GRID:
        weights = [tmp_path / which / name / "student.safetensors" for which in ("cut", "whole")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_interrupted_comparison_goes_on_in_another_place(
    make: Any, trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(make(), tmp_path / "before")
    (tmp_path / "before/all/KD/seed-0/result.json").unlink()
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path)
    trained.clear()
    assert compare(make(), Path("after")) == (8, 7)
    assert trained == ["all/KD/seed-0"]
    assert "checkpoint: after/teacher" in (tmp_path / "after/all/KD/seed-0/recipe.yaml").read_text()


def test_methods_are_paired_by_their_seeds(make: Any, tmp_path: Path) -> None:
    """With one seed all methods start from one network and read the rows in one order."""
    still = {"epochs": 1, "lr": 1e-30, "weight_decay": 0.0, "optimizer": "sgd"}
    compare(make(training=still, settings={"all": {}}), tmp_path)
    weights = {
        path.parent.relative_to(tmp_path).as_posix(): path.read_bytes()
        for path in tmp_path.glob("*/*/*/student.safetensors")
    }
    for seed in (0, 1):
        assert weights[f"all/cross-entropy/seed-{seed}"] == weights[f"all/KD/seed-{seed}"]
    assert weights["all/KD/seed-0"] != weights["all/KD/seed-1"]
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*/*/*/result.json")]
    assert {(result["method"], result["seed"]) for result in results} == {
        (method, seed) for method in METHODS for seed in (0, 1)
    }
    assert len({json.dumps(result["teacher"]) for result in results}) == 1


def test_the_teacher_learns_from_all_labels(make: Any, tmp_path: Path) -> None:
    recipe = make(data={"labels_per_class": 3}).teacher_recipe()
    assert recipe.data.labels_per_class is None
    assert make(data={"strong_augment": "strong"}).teacher_recipe().data.strong_augment == "none"
    assert recipe.teacher is None
    assert recipe.student.options == {"hidden": [32]}


def test_figures_of_methods_without_a_teacher_compare_with_it_too(make: Any, tmp_path: Path) -> None:
    compare(make(seeds=[0]), tmp_path)
    result = json.loads((tmp_path / "all/cross-entropy/seed-0/result.json").read_text())
    assert {"agreement", "kl", "kendall_tau", "topk_overlap"} <= result["last"]["test"].keys()


def test_another_comparison_in_the_folder_is_refused(make: Any, trained: list[str], tmp_path: Path) -> None:
    compare(make(), tmp_path)
    before = snapshot(tmp_path)
    trained.clear()
    hotter = {"methods": {"KD": {"kd": {"loss": "KDLoss", "temperature": 5.0}}}}
    fewer = {"settings": {"few": {"data": {"labels_per_class": 2}}}}
    for changes in ({"seeds": [0, 2]}, {"training": {"lr": 0.02}}, hotter, fewer):
        with pytest.raises(UserError, match=r"already holds another recipe, comparison\.yaml"):
            compare(make(**changes), tmp_path)
    assert not trained
    assert snapshot(tmp_path) == before


def test_a_comparison_grows(make: Any, trained: list[str], tmp_path: Path) -> None:
    compare(make(), tmp_path)
    before = snapshot(tmp_path)
    trained.clear()
    more = {"seeds": [0, 1, 2], "title": "More", "methods": {"PLD": {"pld": {"loss": "PLDLoss"}}}}
    assert compare(make(**more), tmp_path) == (18, 8)
    added = [name for name in trained if "PLD" in name or "seed-2" in name]
    assert (len(trained), len(added)) == (10, 10)
    after = snapshot(tmp_path)
    changed = {path for path in before if after[path] != before[path]}
    assert changed == {tmp_path / "comparison.yaml"}
    assert set(read_yaml(tmp_path / "comparison.yaml")["methods"]) == {"cross-entropy", "KD", "PLD"}
    with pytest.raises(UserError, match="already holds another recipe"):  # and never shrinks
        compare(make(), tmp_path)


def test_a_run_folder_is_no_place_for_a_comparison(make: Any, trained: list[str], tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="already holds other files; choose another"):
        compare(make(), tmp_path)
    assert not trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"KD": {"kd": {"loss": "KDLos"}}}}, "method `KD`: unknown loss"),
        ({"methods": {"zz": {"kd": {"loss": "KDLoss", "temperature": -1}}}}, "temperature"),
        ({"settings": {"few": {"data": {"labels_per_clas": 3}}}}, "labels_per_clas"),
        ({"settings": {"few": {"data": {"labels_per_class": 3000}}}}, "expected at least 3000 labels"),
        ({"settings": {"few": {"training": {"epochs": 0}}}}, "at least 1, got 0"),
        ({"settings": {"few": {"student": {"name": "mlpp"}}}}, "unknown model `mlpp`"),
        ({"settings": {"few": {"data": {"name": "sklearn:digit"}}}}, "unknown data"),
        ({"settings": {"few": {"data": {"augment": "flop"}}}}, "unknown augmentation `flop`"),
        ({"student": {"options": {"hiden": [3]}}}, "no option `hiden`"),
        ({"teacher": {"name": "nobody"}}, "unknown model `nobody`"),
    ],
)
def test_all_recipes_are_checked_before_the_first_run(
    changes: Any, message: str, make: Any, trained: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        compare(make(**changes), tmp_path / "c")
    assert not trained
    assert not (tmp_path / "c").exists()


def test_data_is_loaded_once_for_each_setting(make: Any, toy: ModuleType, tmp_path: Path) -> None:
    loads: list[int] = []
    images = toy.images
    toy.images = lambda: loads.append(1) or images()  # type: ignore[attr-defined]
    compare(make(seeds=[0, 1, 2]), tmp_path)
    # For two settings, and twice for the teacher: to check its recipe, and to train it.
    assert len(loads) <= 4


def test_a_teacher_with_weights_is_not_trained(make: Any, trained: list[str], tmp_path: Path) -> None:
    compare(make(seeds=[0]), tmp_path / "first")
    trained.clear()
    recipe = make(
        seeds=[0], teacher_training=None, teacher={"checkpoint": str(tmp_path / "first" / "teacher")}
    )
    assert compare(recipe, tmp_path / "second") == (4, 0)
    assert "teacher" not in trained
    first, second = (
        (tmp_path / which / "all/KD/seed-0/student.safetensors").read_bytes() for which in ("first", "second")
    )
    assert first == second


def test_what_a_teacher_cannot_remember_is_told_before_it_is_trained(
    make: Any, trained: list[str], tmp_path: Path
) -> None:
    data = {"name": "sklearn:digits", "augment": "flip"}
    with pytest.raises(UserError, match=r"that never change for `teacher.cache_outputs`"):
        compare(make(data=data), tmp_path / "c")
    assert (trained, (tmp_path / "c").exists()) == ([], False)
