"""From a recipe to a run folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import luce
from luce import data, models
from luce.config import parse
from luce.errors import UserError
from luce.methods import LogitMethod
from luce.recipes import Recipe, TeacherOptions, prepare
from luce.recipes.build import build_network
from luce.runs import evaluate, run
from luce.signals import CachedTeacher, LiveTeacher

Make = Callable[..., Recipe]
CE = {"pld": {"loss": "CrossEntropyLoss"}}


# Rows -------------------------------------------------------------------------------------------------------


def test_the_rows_of_the_three_parts_are_different_ones(make_recipe: Make) -> None:
    materials = prepare(make_recipe())
    parts = [
        {row.numpy().tobytes() for row in part.batch(range(len(part)))["input"]}
        for part in (materials.train, materials.validation, materials.test)
    ]
    assert [len(part) for part in parts] == [72, 18, 30]
    assert len(set.union(*parts)) == 120


def test_the_split_does_not_follow_the_training_seed(make_recipe: Make) -> None:
    a, b, c = (
        prepare(make_recipe(**changes)).validation.indices
        for changes in ({}, {"training": {"seed": 9}}, {"data": {"split_seed": 1}})
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_training_never_sees_validation_or_test_rows(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[bytes] = set()
    step = LogitMethod.step

    def spy(self: Any, student: Any, batch: Any, signal: Any) -> Any:
        seen.update(row.numpy().tobytes() for row in batch["input"])
        return step(self, student, batch, signal)

    monkeypatch.setattr(LogitMethod, "step", spy)
    recipe = make_recipe(training={"epochs": 1})
    run(recipe, tmp_path)
    materials = prepare(recipe)
    held_back = {
        row.numpy().tobytes()
        for part in (materials.validation, materials.test)
        for row in part.batch(range(len(part)))["input"]
    }
    assert len(seen) == 72
    assert not seen & held_back


@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "PLDLoss", "KDLoss"])
def test_few_labels(loss: str, make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[int] = []
    step = LogitMethod.step

    def spy(self: Any, student: Any, batch: Any, signal: Any) -> Any:
        targets.extend(batch["target"].tolist())
        return step(self, student, batch, signal)

    monkeypatch.setattr(LogitMethod, "step", spy)
    recipe = make_recipe(data={"labels_per_class": 2}, loss={"pld": {"loss": loss}}, training={"epochs": 1})
    run(recipe, tmp_path)
    (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == 5
    if loss == "CrossEntropyLoss":
        assert [targets.count(label) for label in (-1, 0, 1, 2, 3)] == [0, 18, 18, 18, 18]
    else:
        assert [targets.count(label) for label in (-1, 0, 1, 2, 3)] == [64, 2, 2, 2, 2]
    # Nobody's figures are made from rows whose labels were taken away.
    assert (prepare(recipe).validation.targets >= 0).all()


# Networks ---------------------------------------------------------------------------------------------------


def test_teacher_and_student_each_have_their_normalisation(make_recipe: Make, toy: ModuleType) -> None:
    seen: dict[str, Tensor] = {}

    class Spy(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.scale = name, nn.Parameter(torch.ones(4))

        def forward(self, inputs: Tensor) -> Tensor:
            seen[self.name] = inputs
            return self.scale * inputs.flatten(1)[:, :4]

    toy.spy = lambda name_of, **_: Spy(name_of)  # type: ignore[attr-defined]
    recipe = make_recipe(
        student={"name": "python:toy.spy", "options": {"name_of": "student"}},
        teacher={"name": "python:toy.spy", "mean": [0.25], "std": [4.0]},
    )
    recipe.teacher.options = {"name_of": "teacher"}  # type: ignore[union-attr]
    materials = prepare(recipe)
    network, description = build_network(recipe.student, materials.data)
    batch = materials.train.batch(range(10))
    network(batch["input"])
    materials.teacher.train.signal(batch)  # type: ignore[union-attr]
    (mean,), (std,) = materials.data.mean, materials.data.std
    torch.testing.assert_close(seen["student"], (batch["input"] - mean) / std)
    torch.testing.assert_close(seen["teacher"], (batch["input"] - 0.25) / 4)
    assert (description["mean"], description["std"]) == ([mean], [std])
    everything = materials.data.train.inputs  # type: ignore[attr-defined]
    assert mean == pytest.approx(everything.mean().item())
    assert std == pytest.approx(everything.std(correction=0).item(), rel=1e-4)


def test_the_exported_student_is_the_network_and_nothing_else(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(student={"name": "cnn", "options": {"widths": [3, 5]}}, training={"ema": 0.5})
    result = run(recipe, tmp_path)
    weights = load_file(tmp_path / "student.safetensors")
    plain = models.build("cnn", classes=4, input_shape=(1, 8, 8), widths=[3, 5])
    plain.load_state_dict(weights, strict=True)

    materials = prepare(recipe)
    description = json.loads((tmp_path / "student.json").read_text())
    batch = materials.test.batch(range(len(materials.test)))
    mean, std = (torch.tensor(description[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    logits = plain.eval()((batch["input"] - mean) / std)
    accuracy = (logits.argmax(-1) == batch["target"]).float().mean().item()
    assert result["best"]["test"]["accuracy"] == pytest.approx(accuracy)
    loss = torch.nn.functional.cross_entropy(logits, batch["target"]).item()
    assert result["best"]["test"]["nll"] == pytest.approx(loss, rel=1e-5)
    assert description["classes"] == ["0", "1", "2", "3"]
    assert result["student"] == {"model": "cnn", "parameters": sum(p.numel() for p in plain.parameters())}


def test_evaluating_a_run_again_gives_its_figures(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(student={"name": "mlp", "options": {"hidden": [8]}}, training={"lr": 0.3})
    result = run(recipe, tmp_path)
    assert evaluate(tmp_path, recipe) == result["best"]["test"]
    without = make_recipe(student={"name": "mlp"}, teacher=None)
    figures = evaluate(tmp_path, without)
    assert "kl" not in figures
    assert figures["accuracy"] == result["best"]["test"]["accuracy"]


def test_a_run_folder_is_a_teacher(make_recipe: Make, tmp_path: Path) -> None:
    first = make_recipe(student={"name": "mlp"}, teacher=None, loss=CE)
    result = run(first, tmp_path / "teacher")
    assert result["teacher"] is None
    second = run(make_recipe(teacher={"checkpoint": str(tmp_path / "teacher")}), tmp_path / "student")
    assert second["teacher"] == {
        "model": "mlp",
        "parameters": result["student"]["parameters"],
        "test": {"accuracy": result["best"]["test"]["accuracy"]},
    }
    weights = make_recipe(
        teacher={"name": "mlp", "options": {}, "checkpoint": str(tmp_path / "teacher/student.safetensors")}
    )
    weights.teacher.options = {}  # type: ignore[union-attr]
    assert prepare(weights).teacher.description == second["teacher"]  # type: ignore[union-attr]


def test_a_student_may_start_from_weights(make_recipe: Make, tmp_path: Path) -> None:
    plain = make_recipe(student={"name": "mlp"}, teacher=None, loss=CE)
    result = run(plain, tmp_path / "first")
    still = make_recipe(
        student={"name": "mlp", "checkpoint": str(tmp_path / "first" / "student.safetensors")},
        teacher=None,
        loss=CE,
        training={"epochs": 1, "lr": 1e-30, "weight_decay": 0.0},
    )
    again = run(still, tmp_path / "second")
    assert again["best"]["test"] == result["best"]["test"]


def test_a_native_teacher_needs_weights(make_recipe: Make) -> None:
    recipe = make_recipe(teacher={"name": "mlp"})
    recipe.teacher.options = {}  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"expected weights for the teacher, and a fresh `mlp` has none"):
        prepare(recipe)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), r"for the 4 classes .*shape \(1, 7\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(65, 4)), r"for the inputs .*shape \(1, 8, 8\)"),
        (lambda: nn.Conv2d(1, 4, 1), r"for the 4 classes .*shape \(1, 4, 8, 8\)"),
    ],
    ids=["classes", "inputs", "no logits"],
)
def test_networks_that_do_not_fit_the_data(
    who: str, build: Any, message: str, make_recipe: Make, toy: ModuleType, tmp_path: Path
) -> None:
    toy.wrong = build  # type: ignore[attr-defined]
    recipe = make_recipe()
    network = getattr(recipe, who)
    network.name, network.options = "python:toy.wrong", {}
    with pytest.raises(UserError, match=rf"expected a network {message}"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_for_other_classes(make_recipe: Make, tmp_path: Path) -> None:
    iris = parse(
        Recipe, {"data": {"name": "sklearn:iris"}, "loss": CE, "training": {"epochs": 1, "batch_size": 64}}
    )
    run(iris, tmp_path / "iris")
    with pytest.raises(UserError, match=r"expected a network for the 4 classes of .*, got one for 3 from"):
        prepare(make_recipe(teacher={"checkpoint": str(tmp_path / "iris")}))
    with pytest.raises(UserError, match=r"for the 4 classes of .*, got one for 3 from .*iris"):
        evaluate(tmp_path / "iris", make_recipe())
    wine = parse(Recipe, {"data": {"name": "sklearn:wine"}})  # three classes too, and other features
    with pytest.raises(UserError, match=r"for the inputs of `sklearn:wine`, of shape \(13,\)"):
        evaluate(tmp_path / "iris", wine)


def test_normalisation_of_the_wrong_length(make_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a finite `mean` and a positive `std` of equal length"):
        run(make_recipe(student={"mean": [0.5, 0.5]}), tmp_path / "run")
    with pytest.raises(UserError, match="expected a network for the inputs"):
        run(make_recipe(student={"mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The teacher's answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("few", [None, 2])
def test_a_remembered_teacher_says_what_the_live_one_says(
    few: int | None, make_recipe: Make, tmp_path: Path
) -> None:
    lines, kinds = {}, {}
    for remember in (False, True):
        recipe = make_recipe(teacher={"cache_outputs": remember}, data={"labels_per_class": few})
        kinds[remember] = type(prepare(recipe).teacher.train)  # type: ignore[union-attr]
        run(recipe, tmp_path / str(remember))
        text = (tmp_path / str(remember) / "metrics.jsonl").read_text()
        lines[remember] = [json.loads(line)["train"] for line in text.splitlines()]
    assert kinds == {False: LiveTeacher, True: CachedTeacher}
    for live, remembered in zip(lines[False], lines[True], strict=True):
        assert remembered == pytest.approx(live, rel=1e-5)


def test_a_remembered_teacher_is_asked_once_about_every_row(
    make_recipe: Make, toy: ModuleType, tmp_path: Path
) -> None:
    asked: list[int] = []

    def counting(classes: int, input_shape: tuple[int, ...]) -> nn.Module:
        network = toy.network(classes, input_shape, seed=5)
        network.register_forward_hook(lambda module, inputs, output: asked.append(len(output)))
        return network

    toy.counting = counting  # type: ignore[attr-defined]
    recipe = make_recipe(teacher={"name": "python:toy.counting", "cache_outputs": True})
    recipe.teacher.options = {}  # type: ignore[union-attr]
    run(recipe, tmp_path)
    assert sorted(asked) == [1, 30, 72]  # a row to see whether it fits, the test rows, the training rows


def test_a_remembered_teacher_refuses_augmentation(make_recipe: Make) -> None:
    with pytest.raises(
        UserError, match=r"that never change for `teacher.cache_outputs`.*got `augment: flip`"
    ):
        prepare(make_recipe(teacher={"cache_outputs": True}, data={"augment": "flip"}))


def test_a_remembered_teacher_refuses_a_second_view(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(teacher={"cache_outputs": True}, data={"strong_augment": "strong"})
    with pytest.raises(
        UserError, match=r"`teacher.cache_outputs`.*a second view by `strong_augment: strong`"
    ):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_recipe_of_two_views(make_recipe: Make, tmp_path: Path) -> None:
    both = {"kd": {"loss": "KDLoss"}, "task": {"loss": "CrossEntropyLoss"}, "pld": {"loss": "PLDLoss"}}
    run(make_recipe(data={"strong_augment": "strong"}, loss=both), tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["train"]
    total = line.pop("loss")
    assert line.keys() == {f"{view}{name}" for view in ("", "strong.") for name in both}
    assert total == pytest.approx(sum(line.values()), rel=1e-5)
    with pytest.raises(UserError, match="unknown augmentation `strange`; did you mean `strong`"):
        run(make_recipe(data={"strong_augment": "strange"}), tmp_path / "wrong")


def test_a_recipe_of_partial_kd(make_recipe: Make, tmp_path: Path) -> None:
    for keep in ("class_mean", "true_prob+class_mean"):
        result = run(
            make_recipe(loss={"pld": {"loss": "PartialKDLoss", "keep": keep}}, training={"epochs": 1}),
            tmp_path / keep,
        )
        assert result["epochs"] == 1
    recipe = make_recipe(loss={"pld": {"loss": "PartialKDLoss", "keep": "weight_sim"}})
    with pytest.raises(UserError, match="a recipe cannot give it, use `class_mean` there"):
        run(recipe, tmp_path / "weight_sim")


def test_a_remembered_teacher_refuses_data_that_crops_at_random(make_recipe: Make, tmp_path: Path) -> None:
    for part, shade in itertools.product(("train", "val"), (0, 255)):
        folder = tmp_path / part / f"shade-{shade}"
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (12, 12), (shade, 0, number)).save(folder / f"{number}.png")
    images = {"name": f"imagefolder:{tmp_path}", "options": {"image_size": 8}, "validation": 0.25}
    assert not prepare(make_recipe(teacher=None, data=images)).train.random
    images["options"]["random_crop"] = True
    recipe = make_recipe(teacher=None, data=images)
    assert prepare(recipe).train.random
    recipe.teacher = TeacherOptions(name="mlp", checkpoint="nowhere", cache_outputs=True)
    with pytest.raises(
        UserError, match=r"`teacher.cache_outputs`.*got the random transforms of the data itself"
    ):
        prepare(recipe)


# Folders ----------------------------------------------------------------------------------------------------


def test_what_lies_in_a_run_folder(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe()
    result = run(recipe, tmp_path / "deep" / "run")
    folder = tmp_path / "deep" / "run"
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml",
        "digests.json",
        "environment.json",
        "identity.json",
        "metrics.jsonl",
        "student.safetensors",
        "student-last.safetensors",
        "student.json",
        "result.json",
    }
    assert parse(Recipe, yaml.safe_load((folder / "recipe.yaml").read_text())) == recipe
    assert json.loads((folder / "result.json").read_text()) == result
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert result["epochs"] == 4
    assert result["seconds"] == pytest.approx(sum(line["seconds"] for line in lines))
    assert result["last"]["validation"] == lines[-1]["validation"]
    best = result["best"]["epoch"]
    assert result["best"]["validation"] == lines[best - 1]["validation"]
    assert result["best"]["validation"]["accuracy"] == max(line["validation"]["accuracy"] for line in lines)
    assert "18 validation rows" in result["selection"]


def test_a_folder_with_another_recipe_is_refused(make_recipe: Make, tmp_path: Path) -> None:
    run(make_recipe(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"another recipe, .*training.lr: 0.01 there, 0.02 here; choose"):
        run(make_recipe(training={"lr": 0.02}), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_with_other_things_is_refused(make_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="already holds other files"):
        run(make_recipe(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_somebody_s_own_recipe_is_not_overwritten(make_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("training: {epochs: 2}  # mine\n")
    with pytest.raises(UserError, match="another recipe"):
        run(make_recipe(), tmp_path)
    assert (tmp_path / "recipe.yaml").read_text().endswith("# mine\n")


def test_a_recipe_that_failed_before_training_does_not_keep_its_folder(
    make_recipe: Make, tmp_path: Path
) -> None:
    for wrong in (
        {"data": {"name": "python:toy.imagery"}},
        {"student": {"name": "python:toy.netwrk"}},
        {"data": {"augment": "flop"}},
        {"data": {"validation": 0.001}},
        {"teacher": None},
        {"training": {"precision": "fp16", "cpu": True}},
        {"training": {"trackers": ["paper"]}},
    ):
        with pytest.raises(UserError):
            run(make_recipe(**wrong), tmp_path / "run")
    run(make_recipe(), tmp_path / "run")


def test_sequences_of_python_and_of_yaml_are_the_same_recipe(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(student={"name": "mlp", "options": {"hidden": (8,)}})
    result = run(recipe, tmp_path)
    assert run(recipe, tmp_path) == result


def test_a_loss_that_is_no_number_leaves_no_result(
    make_recipe: Make, toy: ModuleType, tmp_path: Path
) -> None:
    class Nan(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.flatten(1)[:, :4] + torch.nan

    toy.nan = lambda: Nan()  # type: ignore[attr-defined]
    recipe = make_recipe()
    recipe.teacher.name, recipe.teacher.options = "python:toy.nan", {}  # type: ignore[union-attr]
    with pytest.raises(UserError, match="expected finite logits of the teacher, got NaN"):
        run(recipe, tmp_path)
    assert not (tmp_path / "result.json").exists()
    assert not list(tmp_path.glob("student*"))


def test_rows_of_a_data_set_that_is_wrong(make_recipe: Make, toy: ModuleType) -> None:
    def wrong_labels() -> data.Data:
        good = toy.images()
        rows = torch.utils.data.TensorDataset(good.test.inputs, torch.full((30,), 4))
        return data.Data("toy", good.train, rows, good.classes, good.input_shape, good.mean, good.std, "")

    def empty() -> data.Data:
        nothing = torch.utils.data.TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))
        return data.from_datasets(nothing)

    toy.wrong_labels, toy.empty = wrong_labels, empty  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"expected labels 0 \.\. 3 for 4 classes in the test part"):
        prepare(make_recipe(data={"name": "python:toy.wrong_labels"}))
    with pytest.raises(UserError, match="empty"):
        prepare(make_recipe(data={"name": "python:toy.empty"}))


# What a loss finds out about the teacher --------------------------------------------------------------------


@pytest.mark.parametrize("few", [None, 2])
@pytest.mark.parametrize("remember", [False, True])
def test_a_temperature_found_from_the_teacher(
    few: int | None, remember: bool, make_recipe: Make, tmp_path: Path
) -> None:
    """It is that of the teacher's logits on all training rows, and trains as if it were written out."""
    changes = {"teacher": {"cache_outputs": remember}, "data": {"labels_per_class": few}}
    auto = make_recipe(**changes, loss={"pld": {"loss": "PLDLoss", "teacher_temperature": "auto"}})
    materials = prepare(auto)
    rows = [materials.train.plain[row]["input"] for row in range(len(materials.train))]
    teacher, _ = build_network(auto.teacher, materials.data)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = luce.suggest_temperature(teacher.eval()(torch.stack(rows)))
    result = run(auto, tmp_path / "auto")
    assert result["prepared"] == {"pld.teacher_temperature": pytest.approx(expected, rel=1e-5)}

    found = result["prepared"]["pld.teacher_temperature"]
    written = make_recipe(**changes, loss={"pld": {"loss": "PLDLoss", "teacher_temperature": found}})
    run(written, tmp_path / "written")
    weights = [(tmp_path / which / "student.safetensors").read_bytes() for which in ("auto", "written")]
    assert weights[0] == weights[1]


def test_the_weight_of_a_term_grows_with_the_epochs(make_recipe: Make, tmp_path: Path) -> None:
    """With a learning rate of almost nothing only the weight changes what a term adds."""
    loss = {"pld": {"loss": "PLDLoss"}, "kd": {"loss": "KDLoss", "warmup": 4}}
    one_batch = {"lr": 1e-12, "epochs": 5, "batch_size": 72}
    run(make_recipe(loss=loss, training=one_batch, student={"name": "mlp"}), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    terms = [line["train"]["kd"] for line in lines]
    assert terms == pytest.approx([terms[-1] * share for share in (0.25, 0.5, 0.75, 1, 1)], rel=1e-3)
