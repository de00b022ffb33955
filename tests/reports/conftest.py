"""Run folders with figures known in advance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml

ENVIRONMENT = {
    "luce": "0.1.0",
    "commit": "abc123",
    "python": "3.11.4",
    "torch": "2.9.0",
    "accelerate": "1.2.0",
    "platform": "Linux",
    "processor": "x86_64",
    "threads": 2,
    "device": "cpu",
    "started": "2030-01-02T03:04:05+00:00",
}


def figures_of(accuracy: float) -> dict[str, object]:
    """Test metrics that all follow from the accuracy."""
    return {
        "accuracy": accuracy,
        "nll": 1 - accuracy,
        "calibration_error": (1 - accuracy) / 4,
        "reliability": [
            {"confidence": 0.45, "accuracy": 0.40, "count": 10},
            {"confidence": 0.75, "accuracy": 0.65, "count": 30},
            {"confidence": 0.95, "accuracy": accuracy, "count": 160},
        ],
        "agreement": accuracy,
        "kl": 2 * (1 - accuracy),
        "kendall_tau": accuracy - 0.25,
        "topk_overlap": accuracy - 0.125,
    }


def write_run(
    folder: Path, method: str, seed: int, accuracy: float, best: float | None = None, epochs: int = 20
) -> Path:
    """A finished run with test accuracy ``accuracy`` at the last epoch and ``best`` five epochs earlier."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"method": method, "seed": seed}))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    lines = []
    for epoch in range(1, epochs + 1):
        reached = accuracy * (1 - math.exp(-epoch / 4))
        lines.append(
            {
                "epoch": epoch,
                "step": 16 * epoch,
                "seconds": 0.1,
                "lr": 0.01,
                "train": {"loss": 2 * math.exp(-epoch / 6), "task": math.exp(-epoch / 6)},
                "validation": {"accuracy": reached, "loss": 1.2 * math.exp(-epoch / 8) + 0.1},
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    validation = {"accuracy": accuracy, "loss": 0.2}
    result = {
        "student": {"model": "mlp", "parameters": 12345},
        "method": method,
        "seed": seed,
        "epochs": epochs,
        "seconds": 2.0,
        "selection": "highest validation accuracy",
        "last": {"epoch": epochs, "validation": validation, "test": figures_of(accuracy)},
        "best": {
            "epoch": epochs - 5,
            "validation": validation,
            "test": figures_of(accuracy if best is None else best),
        },
        "teacher": {"model": "cnn", "parameters": 60000, "test": {"accuracy": 0.98}},
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_comparison(
    folder: Path, accuracies: Mapping[str, Mapping[str, Sequence[float]]], **recipe: object
) -> Path:
    """A comparison folder from ``accuracies[setting][method][seed]``."""
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, object] = {
        "title": "Digits",
        "question": "Does it help?",
        "baseline": "cross-entropy",
        "command": "luce compare recipes/digits.yaml",
        "settings": {name: {"description": ""} for name in accuracies},
    }
    (folder / "comparison.yaml").write_text(yaml.safe_dump(options | recipe, sort_keys=False))
    for setting, methods in accuracies.items():
        for method, values in methods.items():
            for seed, value in enumerate(values):
                write_run(folder / setting / method / f"seed-{seed}", method, seed, value)
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", "PLD", 0, accuracy=0.91, best=0.93)


@pytest.fixture(name="write_run", scope="session")
def _write_run():
    return write_run


@pytest.fixture(name="write_comparison", scope="session")
def _write_comparison():
    return write_comparison
