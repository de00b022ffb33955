"""A folder is used again by the very same training alone, and what differs is named."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import luce
from luce import data
from luce.config import merge, parse
from luce.errors import UserError
from luce.methods import FeatureMethod
from luce.recipes import ComparisonRecipe, Recipe
from luce.runs import compare, evaluate, run
from luce.runs.identity import differences, named
from luce.signals import LiveTeacher, LocalBlackBox
from luce.training import checkpoint

Make = Callable[..., Recipe]
FEATURES, CLASSES = 6, 3


# luce.distill -----------------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    """A user's dataset, with class names and a transform."""

    def __init__(self, classes: str = "abc", transform: Callable[[Tensor], Tensor] = torch.clone) -> None:
        self.pairs, self.classes, self.transform = rows(), list(classes), transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> Any:
        value, label = self.pairs[row]
        return self.transform(value), label


def rows(seed: int = 0, *, pixel: float = 0.0, label: int = 0, flipped: bool = False) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(24, FEATURES, generator=generator)
    labels = torch.arange(24) % CLASSES
    inputs[7, 2] += pixel
    labels[7] = (labels[7] + label) % CLASSES
    return TensorDataset(inputs.flip(0), labels.flip(0)) if flipped else TensorDataset(inputs, labels)


def network(seed: int, activation: type[nn.Module] = nn.ReLU, hidden: int = 5) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, hidden), activation(), nn.Linear(hidden, CLASSES))


def frozen(seed: int, *, rests: bool = False) -> nn.Sequential:
    student = network(seed)
    student[0].requires_grad_(False).train(not rests)
    return student


def hint(weight: float) -> FeatureMethod:
    return FeatureMethod(luce.KDLoss(), {"hint": (weight, luce.RKDLoss(), ["0"], ["0"])})


def box(**limits: Any) -> LocalBlackBox:
    return LocalBlackBox(network(2), classes=CLASSES, **{"answers": "probs", **limits})


def distill(folder: Path | None, **changes: Any) -> luce.training.engine.Fit:
    """Make each part anew, as a second process would."""
    options: dict[str, Any] = {
        "student": network(1),
        "teacher": network(2),
        "train_data": rows(),
        "val_data": rows(3),
        "epochs": 2,
        "batch_size": 8,
        "cpu": True,
        "show_progress": False,
    }
    return luce.distill(folder=folder, **{**options, **changes})


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an option": ({}, {"epochs": 3}, r"training\.epochs: 2 there, 3 here"),
    "an option of the loss": (
        {"loss": luce.KDLoss(temperature=4.0)},
        {"loss": luce.KDLoss(temperature=2.0)},
        r"loss\.temperature: 4\.0 there, 2\.0 here",
    ),
    "the loss": ({}, {"loss": luce.KDLoss()}, "loss: PLDLoss there, KDLoss here"),
    "a function as the loss": (
        {"loss": lambda s, t, y: (s - t).square().mean()},
        {"loss": lambda s, t, y: (s - t).abs().mean()},
        r"loss\.code: [0-9a-f]{6} there, [0-9a-f]{6} here",
    ),
    "a method": (
        {"loss": hint(1.0)},
        {"loss": hint(2.0)},
        r"loss\.terms\.hint\.weight: 1\.0 there, 2\.0 here",
    ),
    "the teacher's weights": ({}, {"teacher": network(5)}, "teacher.weights: [0-9a-f]{6} there"),
    "the teacher's structure": ({}, {"teacher": network(2, nn.GELU)}, "teacher.architecture"),
    "the kind of teacher": ({}, {"teacher": box()}, "teacher: torch.Sequential there, LocalBlackBox here"),
    "what a black box answers": (
        {"teacher": box()},
        {"teacher": box(answers="topk", top_k=2)},
        "teacher.answers: probs there, topk here; teacher.top_k: None there, 2 here",
    ),
    "the student's weights": ({}, {"student": network(6)}, "student.weights: .*; seed a new student by"),
    "the student's structure": ({}, {"student": network(1, nn.GELU)}, "student.architecture"),
    "the student's width": ({}, {"student": network(1, hidden=4)}, "student.architecture"),
    "what of the student is trained": ({}, {"student": frozen(1)}, r"student.frozen: \[\] there"),
    "what of it stays in evaluation mode": (
        {"student": frozen(1)},
        {"student": frozen(1, rests=True)},
        r"student\.in_evaluation_mode: \[\] there, \['0'\] here",
    ),
    "one pixel": ({}, {"train_data": rows(pixel=1e-3)}, "data.train.inputs"),
    "one label": ({}, {"train_data": rows(label=1)}, "data.train.labels"),
    "the order of rows": ({}, {"train_data": rows(flipped=True)}, "data.train.labels"),
    "validation rows": ({}, {"val_data": rows(4)}, "data.validation.inputs"),
    "no validation rows": ({}, {"val_data": None}, "data.validation: .* there, None here"),
    "class names": (
        {"train_data": Rows("abc")},
        {"train_data": Rows("acb")},
        r"data.classes\[1\]: b there, c here",
    ),
    "a transform": ({"train_data": Rows()}, {"train_data": Rows(transform=torch.neg)}, "data.train.inputs"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_refuses_another_training(name: str, tmp_path: Path) -> None:
    first, other, message = CHANGES[name]
    distill(tmp_path, **first)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=f"already holds another .*differs in .*{message}.*choose another folder"
    ):
        distill(tmp_path, **{**first, **other})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": luce.KDLoss},
        {"loss": lambda: lambda s, t, y: (s - t).square().mean()},
        {"loss": lambda: hint(1.0)},
        {"teacher": box},
        {"train_data": Rows},
    ],
)
def test_the_same_training_again_is_accepted(changes: dict[str, Any], tmp_path: Path) -> None:
    first, second = (distill(tmp_path, **{key: make() for key, make in changes.items()}) for _ in range(2))
    assert first.history == second.history
    for name, value in first.student.state_dict().items():
        assert torch.equal(value, second.student.state_dict()[name])


class Counting(nn.Module):
    """A user's network that counts its calls."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.body, self.calls = network(seed), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.body(inputs)


class Rescaled(nn.Module):
    """A user's loss with a parameter that is trained too."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        return (self.factor * student_logits - teacher_logits).square().mean()


def test_the_same_objects_again_are_the_same_training(tmp_path: Path) -> None:
    """The first call has trained the student and the loss; the second resumes its checkpoint."""
    parts = {"student": Counting(1), "teacher": Counting(2), "loss": Rescaled()}
    first, second = (distill(tmp_path / "a", **parts) for _ in range(2))
    assert first.history == second.history
    with pytest.raises(UserError, match=r"student\.weights"):  # trained by now, so another start
        distill(tmp_path / "a", **{**parts, "student": Counting(9)})
    distill(tmp_path / "b", **parts)
    with torch.no_grad():
        parts["student"].body[0].bias += 1
    with pytest.raises(UserError, match=r"student\.weights"):
        distill(tmp_path / "b", **parts)


def test_a_call_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = distill(tmp_path / "whole")
    forward, calls = luce.PLDLoss.forward, itertools.count(1)

    def stops(*arguments: Any) -> Tensor:
        if next(calls) == 6:  # three batches an epoch
            raise KeyboardInterrupt
        return forward(*arguments)

    student = network(1)
    with monkeypatch.context() as patch:
        patch.setattr(luce.PLDLoss, "forward", stops)
        with pytest.raises(KeyboardInterrupt):
            distill(tmp_path / "cut", student=student)
    with pytest.raises(UserError, match=r"teacher\.weights"):
        distill(tmp_path / "cut", teacher=network(5))
    again = distill(tmp_path / "cut", student=student)  # in the middle of its second epoch
    assert f"resumes in {tmp_path / 'cut'} after epoch 1" in caplog.text
    assert [line["train"] for line in again.history] == [line["train"] for line in whole.history]
    assert torch.equal(student[0].weight, whole.student.body[0].weight)


def test_random_states_of_the_user_are_left_alone(tmp_path: Path) -> None:
    noisy = Rows(transform=lambda values: values + torch.rand(()))
    with_folder, without = (distill(folder, train_data=noisy) for folder in (tmp_path, None))
    assert [line["train"] for line in with_folder.history] == [line["train"] for line in without.history]


def test_a_folder_of_an_earlier_version(tmp_path: Path) -> None:
    distill(tmp_path)
    (tmp_path / "identity.json").unlink()
    with pytest.raises(UserError, match=r"holds a training of an earlier version .*without identity\.json"):
        distill(tmp_path)


# luce.runs.run ----------------------------------------------------------------------------------------------


def test_a_finished_run_says_so(make_recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run(make_recipe(), tmp_path)
    assert "finished before" not in caplog.text
    assert run(make_recipe(), tmp_path) == result
    assert f"{tmp_path} was finished before, and nothing in it is trained again" in caplog.text
    identity = json.loads((tmp_path / "identity.json").read_text())
    assert identity["data"]["train"]["rows"] == 72
    assert identity["data"]["classes"] == ["0", "1", "2", "3"]


def weights(path: Path, seed: int) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = luce.models.build("mlp", classes=4, input_shape=(1, 8, 8), hidden=[6])
    save_file(network.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("part", ["teacher", "student", "peer"])
def test_weights_behind_a_name_that_changed(
    part: str, interrupted: bool, make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {
        "name": "mlp",
        "options": {"hidden": [6]},
        "checkpoint": weights(tmp_path / "weights.safetensors", 1),
    }
    changes: dict[str, Any] = {part: described, "training": {"epochs": 2}}
    if part == "peer":
        mutual = {"method": "MutualLearning", "peer": described}
        changes = {"loss": {"kd": {"loss": "KDLoss"}, "mutual": mutual}, "training": {"epochs": 1}}
    recipe = make_recipe()
    recipe = parse(Recipe, merge({"data": vars(recipe.data), "student": vars(recipe.student)}, changes))
    if part == "student":
        recipe.teacher = make_recipe().teacher
    if interrupted:

        def stops(*arguments: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "export", stops)
            with pytest.raises(KeyboardInterrupt):
                run(recipe, tmp_path / "run")
    else:
        run(recipe, tmp_path / "run")
    weights(tmp_path / "weights.safetensors", 2)
    with pytest.raises(UserError, match=rf"already holds another training; it differs in {part}.weights"):
        run(recipe, tmp_path / "run")


def test_data_behind_a_name_that_changed(make_recipe: Make, toy: ModuleType, tmp_path: Path) -> None:
    run(make_recipe(), tmp_path)
    images = toy.images

    def shown(content: data.Data, **changes: Any) -> Callable[[], data.Data]:
        train = content.train
        made = {"inputs": train.inputs, "targets": train.targets, **changes}
        return lambda: data.from_datasets(
            TensorDataset(made["inputs"], made["targets"]),
            TensorDataset(content.test.inputs, content.test.targets),
            classes=changes.get("classes"),
        )

    toy.images = shown(images())  # type: ignore[attr-defined]
    run(make_recipe(), tmp_path)
    pixel = images().train.inputs.clone()
    pixel[0, 0, 0, 0] += 0.01
    toy.images = shown(images(), inputs=pixel)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"data\.train\.inputs"):
        run(make_recipe(), tmp_path)
    toy.images = shown(images(), classes=list("dcba"))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"data\.classes\[0\]: 0 there, d here; .* and 1 more"):
        run(make_recipe(), tmp_path)


def test_code_behind_a_name_that_changed(make_recipe: Make, toy: ModuleType, tmp_path: Path) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs.flatten(1))

    toy.network = lambda seed=None: Body()  # type: ignore[attr-defined]
    recipe = make_recipe(teacher={"options": {}})
    run(recipe, tmp_path)
    Body.forward = lambda self, inputs: self.layer(inputs.flatten(1)).tanh()  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"student\.code: [0-9a-f]{6} there"):
        run(recipe, tmp_path)


def test_an_image_replaced_by_one_of_equal_size(make_recipe: Make, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0)
    for place in itertools.product(("train", "test"), "ab", range(8)):
        path = tmp_path / "images" / place[0] / place[1] / f"{place[2]}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    recipe = make_recipe(
        data={"name": f"imagefolder:{tmp_path / 'images'}", "options": {"image_size": 8}, "validation": 0.25},
        training={"epochs": 1},
    )
    run(recipe, tmp_path / "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "test" / "a" / "3.bmp")
    with pytest.raises(UserError, match=r"differs in data\.test\.inputs"):
        run(recipe, tmp_path / "run")


def test_wrong_values_are_told_before_another_recipe(make_recipe: Make, tmp_path: Path) -> None:
    run(make_recipe(), tmp_path)
    for changes, message in (
        ({"data": {"augment": "flop"}}, "unknown augmentation"),
        ({"student": {"name": "mlpp"}}, "unknown model"),
        ({"loss": {"pld": {"loss": "KDLos"}}}, "unknown loss"),
        ({"teacher": {"answers": "topk", "top_k": 9}}, "top_k"),
    ):
        with pytest.raises(UserError, match=message):
            run(make_recipe(**changes), tmp_path)


def test_fields_that_an_earlier_version_did_not_have(make_recipe: Make, tmp_path: Path) -> None:
    result = run(make_recipe(), tmp_path)
    recipe = tmp_path / "recipe.yaml"
    lines = recipe.read_text().splitlines(keepends=True)
    recipe.write_text("".join(line for line in lines if "patience" not in line))
    assert run(make_recipe(), tmp_path) == result


def test_an_interrupted_start_leaves_a_free_folder(make_recipe: Make, tmp_path: Path) -> None:
    """Identity and recipe are there, and no training: another recipe may have the folder."""
    run(make_recipe(), tmp_path)
    for path in tmp_path.iterdir():
        if path.name not in ("identity.json", "recipe.yaml"):
            path.unlink()
    run(make_recipe(training={"epochs": 1}), tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_evaluation_on_other_rows_is_stated(
    make_recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(data={"name": "sklearn:digits"}, student={"name": "mlp"}, teacher=None)
    recipe.loss = {"task": {"loss": "CrossEntropyLoss"}}
    recipe.teacher, recipe.training.epochs = None, 1
    run(recipe, tmp_path)
    evaluate(tmp_path, recipe)
    assert "evaluates on" not in caplog.text
    digits = data.load("sklearn:digits")
    fewer = TensorDataset(digits.test.inputs[:50], digits.test.targets[:50])
    module = ModuleType("other")
    module.digits = lambda: data.from_datasets(digits.train, fewer)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "other", module)
    recipe.data.name = "python:other.digits"
    evaluate(tmp_path, recipe)
    assert "evaluates on 50 test rows of datasets, not on those of the run" in caplog.text
    assert "data.test.rows: 500 there, 50 here" in caplog.text


def test_a_teacher_that_is_not_trained_yet(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = tmp_path / "nope"
    recipe = make_recipe(teacher={"checkpoint": str(nowhere)})
    with pytest.raises(UserError, match=f"no such file or folder; train .*luce train RECIPE --out {nowhere}"):
        run(recipe, tmp_path / "run")

    def stops(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "export", stops)
        with pytest.raises(KeyboardInterrupt):
            run(make_recipe(training={"epochs": 1}), nowhere)
    with pytest.raises(UserError, match=f"expected {nowhere} to be a finished run .*finish it first"):
        run(recipe, tmp_path / "run")


# luce.runs.compare ------------------------------------------------------------------------------------------

COMPARISON: dict[str, Any] = {
    "seeds": [0, 1],
    "baseline": "CE",
    "data": {"name": "python:toy.images", "validation": 0.2},
    "student": {"name": "mlp", "options": {"hidden": [6]}},
    "teacher": {"name": "mlp", "options": {"hidden": [8]}},
    "teacher_training": {"epochs": 1},
    "training": {"epochs": 1, "batch_size": 32},
    "methods": {"CE": {"task": {"loss": "CrossEntropyLoss"}}, "KD": {"kd": {"loss": "KDLoss"}}},
}


def comparison(**changes: Any) -> ComparisonRecipe:
    return parse(ComparisonRecipe, merge(COMPARISON, changes))


@pytest.mark.parametrize("grown", [False, True])
def test_finished_runs_of_a_comparison_are_compared(grown: bool, toy: ModuleType, tmp_path: Path) -> None:
    compare(comparison(), tmp_path)
    recipe = comparison(seeds=[0, 1, 2] if grown else [0, 1])
    assert compare(recipe, tmp_path) == ((6, 4) if grown else (4, 4))
    file = tmp_path / "all" / "KD" / "seed-1" / "identity.json"
    identity = json.loads(file.read_text())
    for part, field in (("student", "weights"), ("teacher", "weights"), ("data", "mean")):
        file.write_text(json.dumps(merge(identity, {part: {field: "other"}})))
        with pytest.raises(UserError, match=rf"seed-1 already holds another training.*{part}\.{field}"):
            compare(comparison(seeds=[*recipe.seeds, 7]) if grown else recipe, tmp_path)
    assert not (tmp_path / "all" / "KD" / "seed-7").exists()


def test_another_teacher_in_the_folder_of_a_comparison(toy: ModuleType, tmp_path: Path) -> None:
    compare(comparison(), tmp_path)
    file = tmp_path / "teacher" / "student.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    digests = tmp_path / "teacher" / "digests.json"
    if digests.exists():
        digests.unlink()
    with pytest.raises(UserError, match=r"teacher\.weights"):
        compare(comparison(), tmp_path)


def test_a_lost_teacher_of_a_finished_comparison_is_not_missed(toy: ModuleType, tmp_path: Path) -> None:
    compare(comparison(), tmp_path)
    for path in (tmp_path / "teacher").iterdir():
        path.unlink()
    assert compare(comparison(), tmp_path) == (4, 4)


def test_what_makes_another_comparison(toy: ModuleType, tmp_path: Path) -> None:
    compare(comparison(), tmp_path)
    for changes, message in (
        (
            {"training": {"epochs": 2}, "title": "B", "seeds": [0, 1, 2]},
            "training.epochs: 1 there, 2 here; choose",
        ),
        ({"seeds": [0]}, r"seeds: \[0, 1\] there, \[0\] here"),
        (
            {"methods": {"KD": {"kd": {"temperature": 3.0}}}},
            r"methods\.KD\.kd\.temperature: nothing there, 3",
        ),
    ):
        with pytest.raises(UserError, match=f"another recipe, comparison.yaml; it differs in {message}"):
            compare(comparison(**changes), tmp_path)


# Messages ---------------------------------------------------------------------------------------------------


def test_differences_name_fields_and_values() -> None:
    there = {"a": {"b": 1, "c": [1, 2]}, "d": "x" * 60, "e": float("nan"), "f": None}
    here = {"a": {"b": 1.0, "c": [1, 3]}, "d": "y", "e": float("nan"), "g": True}
    assert list(differences(there, here)) == [
        "a.c[1]: 2 there, 3 here",
        "d: " + "x" * 36 + " ... there, y here",
        "f: None there, nothing here",
        "g: nothing there, True here",
    ]


def test_code_of_another_python_tells_nothing() -> None:
    one, two = "3.10:" + "a" * 32, "3.11:" + "b" * 32
    assert not list(differences({"loss": {"code": one}}, {"loss": {"code": two}}))
    assert list(differences({"loss": {"code": "3.11:" + "a" * 32}}, {"loss": {"code": two}})) == [
        "loss.code: aaaaaa there, bbbbbb here"
    ]


def test_few_of_many_differences_are_named() -> None:
    assert named(["a", "b", "c"]) == "a; b; c"
    assert named(["a", "b", "c", "d", "e"]) == "a; b; c; and 2 more"


def test_a_teacher_that_only_wraps_a_network_is_that_network(tmp_path: Path) -> None:
    distill(tmp_path)
    distill(tmp_path, teacher=LiveTeacher(network(2)))
