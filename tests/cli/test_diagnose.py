"""``luce diagnose`` and ``luce landscape``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from luce import data, runs, suggest_temperature
from luce.analysis import diagnose as of_tensors
from luce.cli.landscape import read_loss
from luce.errors import UserError
from luce.training import checkpoint

STUDENT = {"method": "PLD", "loss": {"task": {"loss": "PLDLoss"}}, "teacher": {"checkpoint": "runs/teacher"}}


def test_a_run_is_diagnosed_on_its_own_split(teacher: Path, luce, place: Path) -> None:
    answer = luce("diagnose", "runs/teacher", "sklearn:iris", "--out", "out", "--temperature", "2")
    assert (answer.status, answer.err) == (0, "")
    for word in (
        "Departure from the labels",
        "instance confidence %",
        "label smoothing",
        "page: out/diagnose.html",
    ):
        assert word in answer.out
    assert sorted(path.name for path in (place / "out").iterdir()) == ["diagnose.html", "diagnose.json"]
    figures = json.loads((place / "out/diagnose.json").read_text())
    network, _ = checkpoint.load_student(teacher)
    train, validation, _ = data.split(data.load("sklearn:iris"), validation=0.2, seed=0)
    for name, part in (("training", train), ("held_out", validation)):
        with torch.no_grad():
            logits = network(part.batch(range(len(part)))["input"])
        expected = of_tensors(logits, part.targets, temperature=2.0).teacher
        assert figures[name]["teacher"]["rows"] == len(part)
        assert figures[name]["teacher"]["departure"] == pytest.approx(expected.departure, rel=1e-4)
        if name == "training":
            assert figures["suggested_temperature"] == pytest.approx(suggest_temperature(logits), rel=1e-4)
    assert figures["held_out"]["which"] == "validation rows"
    assert figures["classes"] == list(data.load("sklearn:iris").classes)
    assert "luce diagnose runs/teacher sklearn:iris" in (place / "out/diagnose.html").read_text()


def test_from_python(teacher: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs.diagnose(runs.DiagnoseOptions(teacher="runs/teacher", data="sklearn:iris"))
    assert "validation rows are not those" not in caplog.text
    overrides = {"data": {"validation": 0.5}}
    options = runs.DiagnoseOptions(teacher="runs/teacher", data="sklearn:iris", overrides=overrides)
    report = runs.diagnose(options)
    assert report.held_out_rows == "validation rows"
    assert "the validation rows are not those of runs/teacher" in caplog.text
    assert "data.validation.rows: 22 there, 56 here" in caplog.text
    assert report.train.teacher.rows == round(len(data.load("sklearn:iris").train) * 0.5)
    assert "untrained" in report.student
    with pytest.raises(UserError, match=r"expected `weight` in \[0, 1\], got 2"):
        runs.DiagnoseOptions(teacher="runs/teacher", data="sklearn:iris", weight=2)
    with pytest.raises(UserError, match=r"did you mean `data\.validation`"):
        runs.diagnose(
            runs.DiagnoseOptions(teacher="mlp", data="sklearn:iris", overrides={"data": {"validatio": 1}})
        )


def test_json_is_all_that_is_printed(teacher: Path, luce) -> None:
    answer = luce("diagnose", "runs/teacher", "sklearn:iris", "--json", "--held_out", "test")
    assert (answer.status, answer.err) == (0, "")
    figures = json.loads(answer.out)
    assert figures["held_out"]["which"] == "test rows"
    assert figures["held_out"]["teacher"]["rows"] == len(data.load("sklearn:iris").test)
    assert figures["temperature"] == 1
    assert "untrained" in figures["student"]


def test_a_student_is_pulled_at(teacher: Path, write, luce) -> None:
    assert luce("distill", write("student.yaml", **STUDENT), "--out", "runs/student").status == 0
    words = ("diagnose", "runs/teacher", "sklearn:iris", "--json")
    by, fresh = (
        json.loads(luce(*words, *more).out)["training"]["teacher"]["pull"]
        for more in (("--student", "runs/student", "--weight", "0.5"), ())
    )
    assert by["norms"]["cross_entropy"] != fresh["norms"]["cross_entropy"]
    assert by["correlation"] is not None
    assert fresh["correlation"] is None


def test_a_network_by_name_is_diagnosed_on_all_training_rows(teacher: Path, luce) -> None:
    weights = teacher / "student.safetensors"
    words = ("--checkpoint", str(weights), "--teacher.options.hidden", "[8]", "--json")
    figures = json.loads(luce("diagnose", "mlp", "sklearn:iris", *words).out)
    iris = data.load("sklearn:iris")
    assert figures["training"]["teacher"]["rows"] == len(iris.train)
    assert figures["held_out"]["which"] == "test rows"
    few = json.loads(luce("diagnose", "mlp", "sklearn:iris", *words, "--data.labels_per_class", "3").out)
    assert few["training"]["teacher"]["rows"] == 9
    assert few["training"]["unlabelled"] == len(iris.train) - 9


def test_files_that_are_there_are_replaced(teacher: Path, luce, place: Path) -> None:
    (place / "out").mkdir()
    for name in ("diagnose.json", "diagnose.html"):
        (place / "out" / name).write_text("old")
    assert luce("diagnose", "runs/teacher", "sklearn:iris", "--out", "out", "--temperature", "4").status == 0
    assert (place / "out/diagnose.html").read_text() != "old"
    assert json.loads((place / "out/diagnose.json").read_text())["temperature"] == 4


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "expected TEACHER and DATA; luce diagnose --help"),
        (["runs/teacher"], "expected DATA; luce diagnose --help"),
        (["runs/nowhere", "sklearn:iris"], "expected a run folder or the name of a network"),
        (["mlpp", "sklearn:iris"], "unknown model `mlpp`; did you mean `mlp`"),
        (["mlp", "sklearn:iris"], "a fresh `mlp` has none"),
        (["mlp", "sklearn:iris", "--checkpoint", "no.pt"], "cannot read the checkpoint no.pt"),
        (["runs/teacher", "sklearn:iris", "--checkpoint", "x.pt"], "no `--checkpoint` for runs/teacher"),
        (["runs/teacher", "sklearn:irises"], "did you mean `sklearn:iris`"),
        (["runs/teacher", "sklearn:wine"], "for the inputs of `sklearn:wine`"),
        (["runs/teacher", "sklearn:digits"], "for the 10 classes of `sklearn:digits`"),
        (["runs/teacher", "sklearn:iris", "--student", "runs"], "finished run with an exported student"),
        (["runs/teacher", "sklearn:iris", "--temperatur", "2"], "did you mean `--temperature`"),
        (["runs/teacher", "sklearn:iris", "--temperature", "0"], "`--temperature` to be a finite number"),
        (["runs/teacher", "sklearn:iris", "--temperature", "hot"], "`--temperature` as a number, got 'hot'"),
        (["runs/teacher", "sklearn:iris", "--weight", "2"], "`--weight` in [0, 1]"),
        (["runs/teacher", "sklearn:iris", "--held_out", "train"], "as one of validation, test, got 'train'"),
        (["runs/teacher", "sklearn:iris", "--data.validatio", "0.3"], "did you mean `data.validation`"),
        (["runs/teacher", "sklearn:iris", "--out", "file"], "expected a folder that can be written to"),
        (["python:toy.nan", "sklearn:iris"], "got NaN"),
        (["python:toy.five", "sklearn:iris"], "logits of shape (1, 5)"),
        (["python:toy.one", "python:toy.one_class"], "at least 1 row and 2 classes, got"),
        (["runs/teacher", "python:toy.unlabelled"], "expected labels in the test part of"),
    ],
)  # fmt: skip
def test_what_cannot_be_diagnosed(
    words: list[str], reason: str, teacher: Path, refuses, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy

    rows = torch.utils.data.TensorDataset(torch.rand(40, 4), torch.zeros(40).long())
    monkeypatch.setattr(toy, "one", lambda: torch.nn.Linear(4, 1), raising=False)
    monkeypatch.setattr(toy, "one_class", lambda: data.from_datasets(rows), raising=False)
    (place / "file").write_text("mine")
    before = sorted(place.rglob("*"))
    assert reason in refuses("diagnose", *words, *(() if "--out" in words else ("--out", "new/out")))
    assert sorted(place.rglob("*")) == before
    assert (place / "file").read_text() == "mine"


@pytest.mark.parametrize("words", [("--temperature", "0"), ("--weight", "2")])
def test_wrong_figures_are_refused_before_anything_is_done(
    words: tuple[str, str], teacher: Path, refuses, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("data were loaded"))
    refuses("diagnose", "runs/teacher", "sklearn:iris", "--out", "runs/new", *words)
    assert not (place / "runs" / "new").exists()


def test_a_folder_without_a_recipe_can_be_a_teacher(teacher: Path, luce, place: Path) -> None:
    (place / "bare").mkdir()
    for name in ("student.json", "student.safetensors"):
        shutil.copy(teacher / name, place / "bare" / name)
    figures = json.loads(luce("diagnose", "bare", "sklearn:iris", "--json").out)
    assert figures["held_out"]["which"] == "test rows"


# Landscapes -------------------------------------------------------------------------------------------------


def test_landscapes_are_drawn_and_written_down(luce, place: Path) -> None:
    losses = ("PLDLoss", "KDLoss", "temperature=4", "CrossEntropyLoss", "weight=0.1", "+", "KDLoss")
    answer = luce("landscape", *losses, "--points", "9", "--out", "out/shape.png")
    assert (answer.status, answer.err) == (0, "")
    assert "KDLoss temperature=4: lowest 0 at a = 0, b = 0" in answer.out
    assert (place / "out/shape.png").read_bytes().startswith(b"\x89PNG")
    grids = json.loads((place / "out/shape.json").read_text())["landscapes"]
    assert [grid["loss"] for grid in grids] == [
        " ".join(words) for words in (losses[:1], losses[1:3], losses[3:])
    ]
    assert grids[0]["label"] == 0
    assert sorted(path.name for path in (place / "out").iterdir()) == ["shape.json", "shape.png"]


def test_a_loss_that_needs_preparation_is_prepared_with_the_teacher(luce, place: Path) -> None:
    answer = luce("landscape", "PLDLoss", "teacher_temperature=auto", "--points", "5", "--teacher", "4,1,0")
    assert (answer.status, answer.err) == (0, "")
    [grid] = json.loads((place / "runs/landscape.json").read_text())["landscapes"]
    assert all(value is not None for row in grid["values"] for value in row)


def test_teachers_of_landscapes(luce, place: Path) -> None:
    words = ("landscape", "KDLoss", "--points", "5")
    assert luce(*words, "--teacher", "[0, 3.5, -1]", "--label", "2").status == 0
    grid = json.loads((place / "runs/landscape.json").read_text())["landscapes"][0]
    assert (grid["teacher_logits"], grid["label"]) == ([0, 3.5, -1], 2)
    assert luce(*words, "--teacher=-1,0,2").status == 0
    assert json.loads((place / "runs/landscape.json").read_text())["landscapes"][0]["label"] == 2
    assert luce(*words, "--classes", "6", "--radius", "3").status == 0
    grid = json.loads((place / "runs/landscape.json").read_text())["landscapes"][0]
    assert len(grid["teacher_logits"]) == 6
    assert sum(value**2 for value in grid["teacher_logits"]) == pytest.approx(1)
    assert grid["steps"][-1] == 3


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "expected LOSSES; luce landscape --help"),
        (["PLDLos"], "unknown loss in `PLDLos`: `PLDLos`; did you mean `PLDLoss`"),
        (["FitNetLoss"], "expected a loss on logits in `FitNetLoss`, got FitNetLoss"),
        (["KDLoss", "temp=3"], "did you mean `temperature`"),
        (["KDLoss", "temperature"], "unknown loss in `"),
        (["temperature=3"], "expected LOSS OPTION=VALUE ... + LOSS ..., got `temperature=3`"),
        (["KDLoss", "+"], "expected a loss after `+`"),
        (["KDLoss", "temperature=-3"], "`temperature`"),
        (["KDLoss", "temperature=["], "cannot read the value of `temperature=[`"),
        (["KDLoss", "--teacher", "a,b"], "expected `--teacher[0]` as a number, got 'a'"),
        (["KDLoss", "--teacher", "1"], "at least 2 finite logits"),
        (["KDLoss", "--label", "3"], "`--label` in [0, 3), got 3"),
        (["KDLoss", "--classes", "1"], "expected `--classes` of at least 2, got 1"),
        (["KDLoss", "--classes", "4", "--teacher", "1,2"], "expected `--teacher` or `--classes`, got both"),
        (["KDLoss", "--points", "4"], "`--points` as an odd number"),
        (["KDLoss", "--out", "x.svg"], "expected a file that ends in .png as `--out`"),
        (["KDLoss", "--colour", "red"], "unknown option `--colour`"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn(words: list[str], reason: str, refuses, place: Path) -> None:
    assert reason in refuses("landscape", *words)
    assert not list(place.rglob("*.png"))
    assert not (place / "runs").exists()


def test_reading_losses() -> None:
    assert read_loss(["KDLoss", "temperature=4", "scale_by_temperature=false"]) == {
        "1": {"loss": "KDLoss", "temperature": 4, "scale_by_temperature": False}
    }
    with pytest.raises(UserError, match="expected a loss after `\\+`"):
        read_loss(["KDLoss", "+"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["KDLoss", "temprature=3"], "unknown option of KDLoss in `KDLoss temprature=3`: `temprature`"),
        (["CrossEntropyLoss", "+", "KDLos"], "unknown loss in `CrossEntropyLoss + KDLos`: `KDLos`"),
        (["KDLoss", "weight=-1"], "weight of KDLoss"),
        (["KDLoss", "temperature=1", "temperature=2"], "expected `temperature` once, got it twice"),
        (["KDLoss", "KDLoss"], "expected different losses, got one of them twice"),
        (["+", "KDLoss"], "expected LOSS OPTION=VALUE"),
        (["KDLoss", "--teacher", "[]"], "expected `teacher_logits` as one row of at least 2"),
        (["KDLoss", "--points", "100001"], "at most 2001, got 100001"),
    ],
)
def test_landscapes_that_are_refused(words: list[str], message: str, refuses) -> None:
    assert message in refuses("landscape", *words)
