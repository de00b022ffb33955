"""User errors: exit status 2, one line, and no partial result."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from luce.errors import UserError
from luce.methods import LogitMethod

PLD = {"loss": {"task": {"loss": "PLDLoss"}}}
COMPARISON: dict[str, Any] = {
    "seeds": [0],
    "data": {"name": "sklearn:iris", "validation": 0.2},
    "teacher": {"name": "mlp"},
    "teacher_training": {"epochs": 1},
    "student": {"name": "mlp"},
    "training": {"epochs": 1},
    "methods": {"cross-entropy": {"task": {"loss": "CrossEntropyLoss"}}},
}


def nothing_half_done(folder: Path) -> bool:
    """Whether the folder holds no result and no temporary file."""
    names = [path.name for path in folder.rglob("*")] if folder.exists() else []
    return "result.json" not in names and not [name for name in names if name.endswith(".part")]


# Recipes and options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "distill", "compare"])
def test_no_recipe(command: str, refuses) -> None:
    assert "cannot read the recipe none.yaml" in refuses(command, "none.yaml")
    assert "cannot read the recipe ." in refuses(command, ".")
    for words in ((), ("--out", "x")):
        assert f"expected RECIPE; luce {command} --help describes" in refuses(command, *words)


@pytest.mark.parametrize("text", ["training: [", "a: b: c", "", "- 1", "{"])
def test_a_broken_recipe(text: str, refuses, place: Path) -> None:
    (place / "r.yaml").write_text(text)
    assert "r.yaml" in refuses("train", "r.yaml")
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--training.epoch", "3"], "unknown recipe key `training.epoch`; did you mean `training.epochs`"),
        (["--trainings.epochs", "3"], "unknown option `--trainings.epochs`; did you mean `--training"),
        (["--training.epochs", "many"], "training.epochs"),
        (["--training.epochs"], "expected a value after `--training.epochs`"),
        (["epochs=3"], "unexpected argument `epochs=3`"),
        (["--training.epochs", "--out", "x"], "expected a value after `--training.epochs`"),
        (["--data.workers", "null"], "expected `data.workers` as an integer, got nothing"),
        (["--training.lr", "[1"], "cannot read the value of `--training.lr`"),
        (["--training.epochs", "0"], "`training.epochs` to be at least 1, got 0"),
        (["--training.optimizer", "lamb"], "lamb"),
        (["--training.schedule", "linear"], "linear"),
        (["--training.seed", "-1"], "`training.seed`"),
        (["--training.lr", ".nan"], "cannot read the value of `--training.lr`: expected a number, got .nan"),
        (["--training.patience", "0"], "`training.patience` above 0, got 0"),
        (["--training.momentum", "-1"], "`training.momentum`"),
        (["--training.precision", "fp16", "--training.cpu", "true"], "expected a GPU"),
        (["--training.trackers", "[tensorbord]"], "did you mean `tensorboard`"),
        (["--training", "3", "--training.epochs", "3"], "both set `training`"),
        (["--loss.task.loss", "CrossEntropi"], "did you mean `CrossEntropyLoss`"),
        (["--loss.task.label_smooth", "0.1"], "did you mean `label_smoothing`"),
        (["--loss.task.label_smoothing", "7"], "`label_smoothing` in [0, 1), got 7"),
        (["--loss.task.weight", "-1"], "at least 0, got -1"),
        (["--data.name", "sklearn:irs"], "did you mean `sklearn:iris`"),
        (["--data.name", "cifar"], "unknown data `cifar`"),
        (["--data.name", "imagefolder:/nowhere"], "/nowhere"),
        (["--data.name", "python:nowhere.data"], "nowhere"),
        (["--data.options.size", "3"], "has no option `size`"),
        (["--data.options.root", "x"], "`root`"),
        (["--data.augment", "flop"], "did you mean `flip`"),
        (["--data.augment", "flip"], "augmentation `flip` expects images"),
        (["--data.validation", "2"], "`data.validation` as a share in (0, 1), got 2"),
        (["--data.split_seed", "-1"], "`data.split_seed`"),
        (["--data.labels_per_class", "0"], "`data.labels_per_class` of at least 1"),
        (["--training.milestones", "2,1", "--training.schedule", "step"], "rising epochs from 1, got [2, 1]"),
        (["--training.milestones", "-1", "--training.schedule", "step"], "rising epochs from 1, got [-1]"),
        (["--training.milestones", "2"], "expected `training.schedule: step` with `training.milestones`"),
        (["--student.mean", "[]"], "expected a finite `mean` and a positive `std` of equal length"),
        (["--loss.task.label_smoothing", "null"], "`label_smoothing` in [0, 1), got None"),
        (["--student.options.hidden", "[100000000000]"], "memory of the device or the machine is full"),
        (["--data.labels_per_class", "1000"], "expected at least 1000 labels"),
        (["--data.workers", "-1"], "`data.workers`"),
        (["--data.workers", "1000000"], "expected `data.workers` in 0 .. 256, got 1000000"),
        (["--student.name", "mlpp"], "unknown model `mlpp`; did you mean `mlp`"),
        (["--student.options.width", "3"], "has no option `width`"),
        (["--student.options.classes", "3"], "`classes`"),
        (["--student.name", "resnet20"], "model `resnet20` has no option `hidden`"),
        (["--student.name", "timmm:x"], "did you mean `timm`"),
        (["--student.mean", "[1, 2]", "--student.std", "[1, 1]"], "expected a network for the inputs"),
        (["--teacher.name", "mlp"], "expected a recipe without a `teacher`; to train with one: luce distill"),
    ],
)  # fmt: skip
def test_what_a_recipe_may_not_say(words: list[str], reason: str, write, refuses, place: Path) -> None:
    assert reason in refuses("train", write(), *words)
    assert nothing_half_done(place / "runs")


def test_a_field_of_the_file_is_named_with_its_line(refuses, place: Path) -> None:
    (place / "r.yaml").write_text("method: teacher\ntraining:\n  epochs:\n  lr: -1\ndata: {nam: x}\n")
    given = "r.yaml, line 3: expected `training.epochs` as an integer, got nothing"
    assert "r.yaml, line 5: unknown recipe key `data.nam`" in refuses("train", "r.yaml", "--training", "{}")
    assert given in refuses("train", "r.yaml", "--data", "{}")
    words = ("--data", "{}", "--training.epochs", "2")
    assert "r.yaml, line 4: expected `training.lr` above 0, got -1" in refuses("train", "r.yaml", *words)
    here = refuses("train", "r.yaml", *words, "--training.lr", "-2")
    assert here.startswith("luce train: expected `training.lr` above 0, got -2")


def test_unknown_commands(refuses) -> None:
    assert "unknown command `distil`; did you mean `distill`?" in refuses("distil")
    assert "unknown command `x`; known: check, compare, diagnose" in refuses("x")
    assert "unknown command `_parser`" in refuses("_parser")


def test_a_teacher_where_there_should_be_none_and_none_where_there_should_be_one(
    write, refuses, place: Path
) -> None:
    assert "expected a recipe without a `teacher`; to train with one: luce distill" in refuses(
        "train", write(teacher={"name": "mlp", "checkpoint": "x"})
    )
    assert "expected a `teacher` in the recipe; to train without one: luce train" in refuses(
        "distill", write(**PLD)
    )
    assert "expected a teacher for a loss" in refuses("train", write(**PLD))
    assert "expected weights for the teacher" in refuses("distill", write(**PLD, teacher={"name": "mlp"}))
    assert nothing_half_done(place)


def test_a_comparison_is_no_recipe_of_a_run(write, refuses) -> None:
    assert "expected the recipe of one run, got `methods` in" in refuses("train", write(base=COMPARISON))
    assert "expected `methods`, got `loss` in" in refuses("compare", write())


def test_debug_shows_where(write) -> None:
    from luce.cli import main

    with pytest.raises(UserError, match="unknown model"):
        main(["train", write(), "--student.name", "mlpp", "--debug"])
    with pytest.raises(UserError, match="unknown command"):
        main(["--debug", "distil"])


# Checkpoints ------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def checkpoint_of(kind: str, place: Path) -> str:
    good, path = place / "runs/teacher/student.safetensors", place / "weights.pt"
    if kind == "pickle":
        torch.save({"state_dict": Bomb(place / "exploded")}, path)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(Bomb(place / "exploded"), protocol=2))
    elif kind == "corrupt pt":
        torch.save({"w": torch.zeros(3)}, path)
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "folder":
        (place / "weights").mkdir()
        path = place / "weights"
    elif kind in ("misfit", "corrupt", "garbage"):
        path = path.with_suffix(".safetensors")
        content = {"misfit": good.read_bytes(), "corrupt": good.read_bytes()[:100], "garbage": b"weights"}
        path.write_bytes(content[kind])
    return str(path)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "cannot read the checkpoint"),
        ("corrupt", "cannot read the checkpoint"),
        ("garbage", "cannot read the checkpoint"),
        ("corrupt pt", "cannot read the checkpoint"),
        ("folder", "to be a finished run with an exported student"),
        ("misfit", "does not fit the network"),
        ("pickle", "holds more than tensors"),
        ("bare pickle", "holds more than tensors"),
    ],
)
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_checkpoints(kind: str, reason: str, who: str, teacher: Path, write, refuses, place: Path) -> None:
    path = checkpoint_of(kind, place)
    network = {"name": "mlp", "options": {"hidden": [9]}, "checkpoint": path}
    recipe = write(**{**PLD, "teacher": {"checkpoint": "runs/teacher"}, who: network})
    assert reason in refuses("distill", recipe, "--out", "out")
    assert not (place / "exploded").exists()
    assert nothing_half_done(place / "out")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"name": "sklearn:breast_cancer"}}, "for the 2 classes of `sklearn:breast_cancer`, got"),
        ({"data": {"name": "sklearn:wine"}}, "for the inputs of `sklearn:wine`, of shape (13,)"),
        ({"teacher": {"name": "python:toy.five", "checkpoint": None}}, "logits of shape (1, 5)"),
        ({"student": {"name": "python:toy.five"}}, "logits of shape (1, 5)"),
        ({"data": {"name": "python:toy.five_classes"}}, "for the 5 classes of"),
    ],
)
def test_classes_of_teacher_student_and_data(
    changes: dict[str, Any], reason: str, teacher: Path, write, refuses, place: Path
) -> None:
    base = {
        "data": {"name": "sklearn:iris", "validation": 0.25},
        "student": {"name": "mlp"},
        "teacher": {"checkpoint": "runs/teacher"},
        "loss": {"pld": {"loss": "PLDLoss"}},
        "training": {"epochs": 1},
    }
    assert reason in refuses("distill", write(base=base, **changes), "--out", "out")
    assert nothing_half_done(place / "out")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty", "empty"),
        ("no_test", "the test part of `datasets` is empty"),
        ("label_5", "expected labels 0 .. 2 for 3 classes in the test part of `datasets`, got 0 .. 5"),
        ("unlabelled", "expected labels in the test part of `datasets`, got none in 3 rows"),
    ],
)
def test_data_that_is_wrong(name: str, reason: str, write, refuses, place: Path) -> None:
    assert reason in refuses("train", write(data={"name": f"python:toy.{name}"}))
    assert nothing_half_done(place / "runs")


def test_a_teacher_that_answers_nan(write, refuses, place: Path) -> None:
    recipe = write(loss={"task": {"loss": "PLDLoss"}}, teacher={"name": "python:toy.nan"})
    reason = refuses("distill", recipe, "--out", "out")
    assert "expected finite logits of the teacher, got NaN or infinity for the first batch" in reason
    assert nothing_half_done(place / "out")


def test_a_loss_that_overflows_later_keeps_the_checkpoint(
    write, refuses, luce, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = LogitMethod.step, iter(range(1000))

    def fails(*arguments: Any) -> Any:
        terms = step(*arguments)
        return {name: value * (torch.inf if next(calls) > 5 else 1) for name, value in terms.items()}

    with monkeypatch.context() as patch:
        patch.setattr(LogitMethod, "step", fails)
        assert "stopped being a number in epoch 2" in refuses("train", write(), "--out", "out")
    assert (place / "out" / "checkpoint-1").is_dir()
    assert nothing_half_done(place / "out")
    assert luce("train", "recipe.yaml", "--out", "out").status == 0  # and the run goes on from there


# Folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "compare"])
def test_folders_that_cannot_be_written(command: str, write, refuses, place: Path) -> None:
    recipe = write() if command == "train" else write(base=COMPARISON)
    (place / "file").write_text("mine")
    for out in ("file", "file/below"):
        assert "expected a folder that can be written to" in refuses(command, recipe, "--out", out)
    assert (place / "file").read_text() == "mine"


def test_a_name_that_the_file_system_refuses(write, refuses) -> None:
    assert "result.json (File name too long)" in refuses("train", write(), "--out", "x" * 300)
    methods = {**COMPARISON["methods"], "x" * 300: {"task": {"loss": "CrossEntropyLoss"}}}
    recipe = write(base=COMPARISON, methods=methods)
    assert "(File name too long)" in refuses("compare", recipe)


def test_a_read_only_folder(write, refuses, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, *_: object, **__: object) -> None:  # permissions do not stop root
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "touch", read_only)
    message = refuses("train", write(), "--out", "run")
    assert "expected a folder that can be written to" in message
    assert "Read-only file system" in message


@pytest.mark.parametrize("command", ["train", "compare"])
def test_folders_with_other_contents(command: str, write, refuses, luce, place: Path) -> None:
    recipe = write() if command == "train" else write(base=COMPARISON)
    assert luce(command, recipe, "--out", "out").status == 0
    before = {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}
    assert "already holds another recipe" in refuses(command, recipe, "--out", "out", "--training.lr", "0.1")
    assert {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()} == before
    (place / "mine").mkdir()
    (place / "mine" / "notes.txt").write_text("mine")
    assert "mine" in refuses(command, recipe, "--out", "mine")
    assert [path.name for path in (place / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("after", range(11))
def test_a_disk_that_is_full(
    after: int, write, refuses, luce, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of the files that a run renames into place."""
    replace, calls = os.replace, []

    def full(source: Any, target: Any) -> None:
        calls.append(Path(target).name)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    recipe = write()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        reason = refuses("train", recipe, "--out", "out")
    assert "No space left on device" in reason
    assert calls[-1] in reason or "checkpoint" in reason
    assert nothing_half_done(place / "out")
    assert not (place / "out" / calls[-1]).exists() or calls[-1] == "metrics.jsonl"
    # With room again the same command finishes.
    assert luce("train", recipe, "--out", "out").status == 0
    assert (place / "out" / "result.json").exists()


def test_the_disk_test_meets_every_file(write, luce, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, names = os.replace, []
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(Path(b).name), replace(a, b)))
    assert luce("train", write(), "--out", "out").status == 0
    ours = names[: names.index("result.json") + 1]
    assert len(ours) == 13
    assert {"recipe.yaml", "checkpoint-2", "student.safetensors", "student.json"} <= set(ours[:11])


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_folders_without_a_run(command: str, refuses, place: Path) -> None:
    (place / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        assert folder in refuses(command, folder)
    assert "expected FOLDER" in refuses(command)
    assert "unknown option `--seeds`" in refuses(command, "--seeds")


def test_a_report_of_nothing_says_what_writes_a_folder(refuses) -> None:
    expected = "expected a folder that luce train, distill or compare has written, got runs/nowhere"
    assert expected in refuses("report", "runs/nowhere")


def test_evaluating_a_folder_without_a_recipe(refuses) -> None:
    assert "expected the folder of a finished run, got nowhere" in refuses("evaluate", "nowhere")


def test_a_run_without_its_student(teacher: Path, refuses) -> None:
    (teacher / "student.safetensors").write_bytes(b"lost")
    assert "runs/teacher/student.safetensors is damaged" in refuses("evaluate", "runs/teacher")
    (teacher / "student.json").unlink()
    assert "finished run with an exported student" in refuses("evaluate", "runs/teacher")


def test_evaluating_on_data_of_another_kind(teacher: Path, refuses) -> None:
    assert "for the 10 classes of `sklearn:digits`, got one for 3 from runs/teacher" in refuses(
        "evaluate", "runs/teacher", "--data.name", "sklearn:digits"
    )
    assert "for the inputs of `sklearn:wine`" in refuses(
        "evaluate", "runs/teacher", "--data.name", "sklearn:wine"
    )
    assert "unknown option `--dat.name`; did you mean `--data`" in refuses(
        "evaluate", "runs/teacher", "--dat.name", "x"
    )


def test_a_damaged_checkpoint(write, refuses, luce, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("luce.training.checkpoint.export", stop)
        assert luce("train", write(), "--out", "out").status == 130
    (place / "out/checkpoint-2/optimizer.bin").write_bytes(b"lost")
    assert "cannot resume from out/checkpoint-2" in refuses("train", "recipe.yaml", "--out", "out")
    shutil.rmtree(place / "out/checkpoint-2")
    assert luce("train", "recipe.yaml", "--out", "out").status == 0


def test_a_long_reason_stays_on_one_line(write, refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise UserError("first\nsecond\n  third")

    monkeypatch.setattr(LogitMethod, "step", fails)
    assert refuses("train", write()) == "luce train: first second third"
