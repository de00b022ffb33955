"""Small data and networks under `python:` names, and recipes of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from luce import data
from luce.config import merge, parse
from luce.recipes import Recipe

CLASSES = 4


def images(rows: int = 120) -> data.Data:
    """Noisy pictures of four patterns, all different, 8x8 pixels."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(rows) % CLASSES
    patterns = torch.rand(CLASSES, 1, 8, 8, generator=generator)
    pixels = (patterns[targets] + 0.7 * torch.randn(rows, 1, 8, 8, generator=generator)).sigmoid()
    return data.from_datasets(TensorDataset(pixels, targets))


def network(classes: int, input_shape: tuple[int, ...], seed: int | None = None) -> nn.Module:
    """Everything that makes a resumed training hard: dropout, batch normalisation, both in one network."""
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(input_shape[0], 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(4 * input_shape[1] * input_shape[2], classes),
        )


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that the recipes of `make_recipe` name."""
    module = ModuleType("toy")
    module.images, module.network = images, network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy", module)
    return module


@pytest.fixture
def make_recipe(toy: ModuleType) -> Callable[..., Recipe]:
    base = {
        "data": {"name": "python:toy.images", "validation": 0.2},
        "student": {"name": "python:toy.network"},
        "teacher": {"name": "python:toy.network", "options": {"seed": 5}},
        "training": {"epochs": 4, "batch_size": 16, "lr": 0.01},
    }

    def make(**changes: Any) -> Recipe:
        return parse(Recipe, merge(base, changes))

    return make


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for how long it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    for record in (*lines, result):
        assert record.pop("seconds") >= 0
    weights = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert weights.keys() == {"student.safetensors", "student-last.safetensors"}
    return {"lines": lines, "result": result, **weights}


@pytest.fixture(name="outcome")
def _outcome() -> Callable[[Path], dict[str, Any]]:
    return outcome


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a package look as if it were not installed."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)
