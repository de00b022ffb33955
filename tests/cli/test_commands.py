"""The commands when they succeed, and the help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from luce import __version__, cli

RECIPE_COMMANDS = ("train", "distill", "compare")
STUDENT = {"method": "PLD", "loss": {"task": {"loss": "PLDLoss"}}, "teacher": {"checkpoint": "runs/teacher"}}
COMPARISON: dict[str, Any] = {
    "title": "Irises",
    "seeds": [0, 1],
    "data": {"name": "sklearn:iris", "validation": 0.2},
    "teacher": {"name": "mlp", "options": {"hidden": [16]}},
    "teacher_training": {"epochs": 2, "lr": 0.05},
    "student": {"name": "mlp", "options": {"hidden": [4]}},
    "training": {"epochs": 2, "lr": 0.05, "batch_size": 32},
    "methods": {
        "cross-entropy": {"task": {"loss": "CrossEntropyLoss"}},
        "PLD": {"pld": {"loss": "PLDLoss"}},
    },
}


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help(word: str, luce) -> None:
    answer = luce(word)
    assert (answer.status, answer.err) == (0, "")
    assert all(f"  {command}" in answer.out for command in cli.COMMANDS)


def test_help_imports_nothing(luce) -> None:
    before = set(sys.modules)
    assert luce("--help").status == 0
    assert set(sys.modules) == before


def test_the_version(luce) -> None:
    answer = luce("--version")
    assert (answer.status, answer.out, answer.err) == (0, f"luce {__version__}\n", "")


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_helps(command: str, flag: str, luce) -> None:
    answer = luce(command, flag)
    assert (answer.status, answer.err) == (0, "")
    assert f"luce {command}" in answer.out
    if command in RECIPE_COMMANDS:
        for option in ("--training.epochs", "--data.labels_per_class", "--student.name", "--training.lr"):
            assert option in answer.out
        assert "Number of labels to keep per c" in " ".join(answer.out.split())  # the text under the field


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_is_a_file(command: str) -> None:
    assert (Path(cli.__file__).parent / f"{command}.py").is_file()


def test_without_words_the_usage_is_an_error(luce) -> None:
    answer = luce()
    assert answer.status == 2
    assert "usage: luce COMMAND" in answer.out + answer.err


def test_train_distill_evaluate_and_report(teacher: Path, write, luce, place: Path) -> None:
    answer = luce("distill", write("student.yaml", **STUDENT), "--training.epochs", "3", "--out", "out/a")
    assert (answer.status, answer.err) == (0, "")
    folder = place / "out" / "a"
    assert "student: out/a/student.safetensors" in answer.out
    assert "report: out/a/report.html" in answer.out
    assert (folder / "report.html").stat().st_size > 1000
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["training"]["epochs"] == 3
    assert recipe["teacher"]["checkpoint"] == "runs/teacher"
    result = json.loads((folder / "result.json").read_text())
    assert result["epochs"] == 3

    answer = luce("evaluate", "out/a")
    assert (answer.status, answer.err) == (0, "")
    assert json.loads(answer.out) == result["best"]["test"]

    (folder / "report.html").unlink()
    answer = luce("report", "out/a")
    assert (answer.status, answer.err) == (0, "")
    assert (folder / "report.html").exists()

    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert luce("distill", "student.yaml", "--out", "out/a", "--training.epochs=3").status == 0
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before


def test_results_go_to_a_folder_named_like_the_recipe(write, luce, place: Path) -> None:
    assert luce("train", write("mine.yaml")).status == 0
    assert (place / "runs/mine/result.json").exists()


def test_evaluate_with_a_teacher_from_the_options(teacher: Path, luce) -> None:
    figures = json.loads(luce("evaluate", "runs/teacher", "--teacher.checkpoint", "runs/teacher").out)
    assert figures["agreement"] == 1
    assert figures["kl"] == pytest.approx(0, abs=1e-6)
    assert "kl" not in json.loads(luce("evaluate", "runs/teacher").out)


def test_compare_and_report(write, luce, place: Path) -> None:
    recipe = write("irises.yaml", base=COMPARISON)
    answer = luce("compare", recipe)
    assert (answer.status, answer.err) == (0, "")
    assert "PLD" in answer.out
    assert "report: runs/irises/report.html" in answer.out
    page = (place / "runs/irises/report.html").read_text()
    assert "Irises" in page
    assert "luce compare irises.yaml" in page

    (place / "runs/irises/all/PLD/seed-1/result.json").unlink()
    answer = luce("compare", f"./{recipe}")  # the command is spelled otherwise, the recipe is the same
    assert answer.status == 0
    assert answer.err == (
        "luce compare: runs/irises/teacher was finished before, and nothing in it is trained again\n"
    )
    assert "skipped 3 of 4 runs, already finished" in answer.out
    assert (place / "runs/irises/all/PLD/seed-1/result.json").exists()
    assert luce("report", "runs/irises").status == 0


def test_info(luce) -> None:
    answer = luce("info")
    assert (answer.status, answer.err) == (0, "")
    for word in ("torch", "resnet20", "sklearn:digits", "PLDLoss", "extra vision"):
        assert word in answer.out


def test_an_interruption_says_how_to_go_on(write, luce, monkeypatch: pytest.MonkeyPatch) -> None:
    from luce.methods import LogitMethod

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LogitMethod, "step", stop)
    answer = luce("train", write())
    assert answer.status == 130
    assert answer.err == "luce: stopped; run the same command again to resume from the last checkpoint\n"


def test_a_defect_of_luce_has_status_1(write, luce, monkeypatch: pytest.MonkeyPatch) -> None:
    from luce.methods import LogitMethod

    monkeypatch.setattr(LogitMethod, "step", lambda *_: 1 / 0)
    answer = luce("train", write())
    assert answer.status == 1
    assert len(answer.err.splitlines()) == 1
    assert "unexpected ZeroDivisionError" in answer.err
    with pytest.raises(ZeroDivisionError):
        luce("train", "recipe.yaml", "--debug")


def test_python_m_luce(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "luce", "distil"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "luce distil: unknown command `distil`; did you mean `distill`?\n"


def test_data_of_a_module_that_lies_here(luce, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    Path("flowers_of_mine.py").write_text(
        "from luce import data\n\n\ndef flowers():\n    return data.load('sklearn:iris')\n"
    )
    Path("recipe.yaml").write_text(
        "data: {name: 'python:flowers_of_mine.flowers'}\nloss: {task: {loss: CrossEntropyLoss}}\n"
        "student: {name: mlp, options: {hidden: []}}\ntraining: {epochs: 1}\n"
    )
    answer = luce("train", "recipe.yaml", "--out", "run")
    assert answer.status == 0, answer.err
    assert Path("run/result.json").exists()
