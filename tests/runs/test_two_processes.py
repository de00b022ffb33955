"""Two processes that train together: one launch for all kinds of methods."""

from __future__ import annotations

import json
import math
import operator
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from luce.cli import main
from luce.config import parse
from luce.recipes import Recipe
from luce.runs import run

from .two_processes import FEATURES, figures_of_labelled_rows, train_on_features, train_with_auxiliary

# One launch of two processes that train in turn. tests/methods/test_processes.py keeps a fast launch.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two-processes-runs")]

TASK = {"task": {"loss": "CrossEntropyLoss"}}
KD = {"task": {"loss": "CrossEntropyLoss", "weight": 0.1}, "kd": {"loss": "KDLoss", "temperature": 4.0}}
DML = {"task": {"loss": "CrossEntropyLoss"}, "kd": {"loss": "KDLoss"}, "mutual": {"method": "MutualLearning"}}
MLP = {"name": "mlp", "options": {"hidden": [16]}}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {
        "method": "cross-entropy",
        "student": {"name": "binary:mlp", "options": {"hidden": [16, 16]}},  # parametrised weights too
        "loss": TASK,
        "training": {"epochs": 3, "ema": 0.9},
    },
    "mutual": {"method": "DML", "student": MLP, "loss": DML, "training": {"epochs": 3}},
    "metadistil": {
        "method": "MetaDistil",
        "student": {"name": "mlp", "options": {"hidden": [64]}},
        "teacher": {"name": "mlp", "checkpoint": "teacher"},
        "loss": {"meta": {"method": "MetaDistil", "teacher_lr": 0.01}, **KD},
        "training": {"epochs": 8},
    },
    "mekd": {
        "method": "MEKD",
        "student": MLP,
        "teacher": {"name": "mlp", "checkpoint": "teacher", "answers": "probs", "budget": 200},
        "loss": {
            "kd": {"loss": "KDLoss"},
            "mekd": {"method": "MEKD", "queries": 200, "gan_epochs": 1, "gan_width": 8},
        },
        "training": {"epochs": 1},
    },
}
BASE = {"data": {"validation": 0.2}}
TRAINING = {"batch_size": 32, "lr": 0.01, "cpu": True}


class Launch(NamedTuple):
    folder: Path
    stdout: str

    def history(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def result(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.folder / name / "result.json").read_text())
        return result

    def features(self, terms: str) -> list[dict[str, dict[str, torch.Tensor]]]:
        names = [self.folder / f"features-{FEATURES.index(terms)}-{rank}.pt" for rank in (0, 1)]
        return [torch.load(name, weights_only=True) for name in names]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    folder = tmp_path_factory.mktemp("two")
    teacher = {"loss": TASK, "training": {"epochs": 3, "lr": 0.01, "cpu": True}}
    run(parse(Recipe, {**BASE, **teacher}), folder / "teacher")
    for name, recipe in RECIPES.items():
        content = {**BASE, **recipe, "training": {**TRAINING, **recipe["training"]}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    script = Path(__file__).with_name("two_processes.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(folder)], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for name in RECIPES:
        assert [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] == [0, 0]
    return Launch(folder, done.stdout)


def test_they_share_the_rows_and_write_one_folder(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    # One of the two processes prints.
    assert launch.stdout.count("report: ") == launch.stdout.count("student: ") == len(RECIPES)
    history = launch.history("plain")
    rows = 1297 - round(0.2 * 1297)  # of the digits' training rows
    steps = math.ceil(math.ceil(rows / 32) / 2)  # each process takes every other batch
    assert [record["step"] for record in history] == [steps, 2 * steps, 3 * steps]
    assert history[-1]["train"]["task"] < history[0]["train"]["task"]
    assert not list((launch.folder / "plain").glob("checkpoint-*"))
    capsys.readouterr()
    assert main(["evaluate", str(launch.folder / "plain")]) == 0  # one process, equal weights and figures
    figures = json.loads(capsys.readouterr().out)
    assert figures["accuracy"] == pytest.approx(launch.result("plain")["best"]["test"]["accuracy"], abs=1e-6)


def test_both_networks_of_mutual_learning_learn(launch: Launch) -> None:
    first, *_, last = (record["train"] for record in launch.history("mutual"))
    for term in ("task", "peer.task"):
        assert last[term] < first[term]
    result = launch.result("mutual")
    assert result["last"]["test"]["accuracy"] > 0.7
    assert result["co_trained"]["peer"]["test"]["accuracy"] > 0.7


def test_a_wrapped_student_makes_the_pilots_pass(launch: Launch) -> None:
    """DDP wraps the student there, and must not count the pilot's passes."""
    result = launch.result("metadistil")
    assert result["train"]["teacher_gradient"] > 0
    assert result["co_trained"]["teacher"]["test"]["accuracy"] > 0.8
    assert result["last"]["test"]["accuracy"] > 0.8


def test_they_query_a_black_box_once(launch: Launch) -> None:
    result = launch.result("mekd")
    assert result["teacher"]["queries"] == result["prepared"]["queries"] == 200
    assert result["train"]["image"] > 0


@pytest.mark.parametrize("terms", ["task,vid", "vid"])  # of features alone nothing teaches the head
def test_they_learn_what_one_would(terms: str, launch: Launch) -> None:
    """Half of each batch each: a mean over rows is the mean of the two means."""
    first, second = launch.features(terms)
    alone = train_on_features(terms, 16, rank=0)
    for part in ("method", "student"):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())
        torch.testing.assert_close(first[part], alone[part], rtol=1e-5, atol=1e-6)


def test_they_keep_one_memory(launch: Launch) -> None:
    first, second = launch.features("task,crd,hint,iekd,norm")
    assert first["method"].keys() == second["method"].keys()
    learned = {"crd.student_bank", "hint.regressors.0.1.running_mean", "iekd.of_teacher.decoder.1.weight"}
    assert {f"losses.{name}" for name in learned} <= first["method"].keys()
    for part in ("method", "student"):
        for name, value in first[part].items():
            same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert same(value, second[part][name]), name
    lengths = first["method"]["losses.crd.student_bank"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(64))  # every row was in a batch of one of the two


def test_a_head_that_no_loss_sees_stays_as_it_was(launch: Launch) -> None:
    """DDP waits for the gradient of every parameter, unless it is told that some are unused."""
    alone = train_with_auxiliary(16)
    for rank in (0, 1):
        together, refused = torch.load(launch.folder / f"auxiliary-{rank}.pt", weights_only=True)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
        assert refused.startswith("expected a student that uses the same parameters in every step")


def test_rows_without_a_label_count_in_no_figure_of_theirs(launch: Launch) -> None:
    for rank in (0, 1):
        together = json.loads((launch.folder / f"figures-{rank}.json").read_text())
        assert together == pytest.approx(figures_of_labelled_rows())
