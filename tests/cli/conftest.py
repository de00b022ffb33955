"""Run commands in this process, and small recipes for them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from luce import data
from luce.cli import main
from luce.config import merge, parse
from luce.recipes import Recipe
from luce.runs import run

TEACHER: dict[str, Any] = {
    "method": "teacher",
    "data": {"name": "sklearn:iris", "validation": 0.2},
    "student": {"name": "mlp", "options": {"hidden": [8]}},
    "loss": {"task": {"loss": "CrossEntropyLoss"}},
    "training": {"epochs": 2, "batch_size": 32, "lr": 0.05},
}


class NanTeacher(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, :3] * torch.nan


def rows(count: int = 40, classes: int = 3) -> TensorDataset:
    return TensorDataset(torch.rand(count, 4), torch.arange(count) % classes)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a module `toy` with networks and data."""
    toy = ModuleType("toy")
    toy.nan = lambda: NanTeacher()  # type: ignore[attr-defined]
    toy.five = lambda: nn.Linear(4, 5)  # type: ignore[attr-defined]
    toy.five_classes = lambda: data.from_datasets(rows(classes=5))  # type: ignore[attr-defined]
    toy.empty = lambda: data.from_datasets(rows(0))  # type: ignore[attr-defined]
    toy.no_test = lambda: data.from_datasets(rows(), rows(0))  # type: ignore[attr-defined]
    toy.label_5 = lambda: data.from_datasets(rows(), rows(classes=6))  # type: ignore[attr-defined]
    toy.unlabelled = lambda: data.from_datasets(  # type: ignore[attr-defined]
        rows(), TensorDataset(torch.rand(3, 4), torch.full((3,), -1))
    )
    monkeypatch.setitem(sys.modules, "toy", toy)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(place: Path) -> Callable[..., str]:
    """Write a recipe and return its path."""

    def write(name: str = "recipe.yaml", base: dict[str, Any] = TEACHER, **changes: Any) -> str:
        (place / name).write_text(yaml.safe_dump(merge(base, changes)))
        return name

    return write


@dataclass(frozen=True)
class Answer:
    status: int
    out: str
    err: str


@pytest.fixture
def luce(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run a command; capture the output of other libraries too."""

    def luce(*words: str) -> Answer:
        capfd.readouterr()
        status = main(words)
        return Answer(status, *capfd.readouterr())

    return luce


@pytest.fixture
def refuses(luce: Callable[..., Answer]) -> Callable[..., str]:
    """Run a command that must fail with status 2 and an error of one line, the last one; return it."""

    def refuses(*words: str) -> str:
        answer = luce(*words)
        assert answer.status == 2, answer
        lines = answer.err.splitlines()
        # Before it stands what was read until then.
        assert all(line.startswith(f"luce {words[0]}: ") for line in lines), answer.err
        assert len(lines) <= 3, answer.err
        assert len(lines[-1]) < 600
        return lines[-1]

    return refuses


@pytest.fixture(scope="session")
def trained_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that all tests share."""
    folder = tmp_path_factory.mktemp("trained") / "teacher"
    with torch.random.fork_rng():
        run(parse(Recipe, TEACHER), folder)
    return folder


@pytest.fixture
def teacher(trained_teacher: Path, place: Path) -> Path:
    """A finished run at runs/teacher."""
    return Path(shutil.copytree(trained_teacher, place / "runs" / "teacher"))
