"""Students with binary weights through the training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luce.models.binary import binary_layers
from luce.recipes import Recipe
from luce.runs import run
from luce.spiking import obstacles
from luce.training import checkpoint

Make = Callable[..., Recipe]
STUDENT = {"name": "binary:vgg_pool", "options": {"widths": [4, 6], "hidden": [5]}}
METHODS: dict[str, dict[str, Any]] = {
    "KD": {"kd": {"loss": "KDLoss", "temperature": 4.0}},
    "PLD": {"pld": {"loss": "PLDLoss"}},
    "a loss on features": {"hint": {"loss": "SPLoss", "student": "stages.0", "teacher": "body.0"}},
    "MetaDistil": {
        "meta": {"method": "MetaDistil", "quiz": 0.2, "teacher_lr": 0.01},
        "kd": {"loss": "KDLoss"},
    },
    "mutual learning": {"mutual": {"method": "MutualLearning"}, "kl": {"loss": "KDLoss"}},
}


@pytest.mark.parametrize("method", METHODS)
def test_any_method_trains_them(method: str, make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(student=STUDENT, loss=METHODS[method], training={"epochs": 2, "ema": 0.5})
    if method == "mutual learning":
        recipe.teacher = None
    result = run(recipe, tmp_path / "run")
    assert result["epochs"] == 2
    student, description = checkpoint.load_student(tmp_path / "run")
    assert description["model"] == "binary:vgg_pool"
    assert not obstacles(student.body)
    for layer in binary_layers(student.body).values():
        assert all(len(row.unique()) == 2 for row in layer.weight.detach().flatten(1))


def test_latent_weights_learn(make_recipe: Make, tmp_path: Path) -> None:
    """The sign of some of them changes, the first and last layer learn too."""
    ends = []
    for epochs in (1, 6):
        recipe = make_recipe(student=STUDENT, training={"epochs": epochs, "schedule": "constant", "lr": 0.02})
        run(recipe, tmp_path / str(epochs))
        ends.append(checkpoint.read_weights(tmp_path / str(epochs) / "student-last.safetensors"))
    for name, early in ends[0].items():
        assert not torch.equal(early, ends[1][name]), name
        if "parametrizations" in name:
            centred = [latent - latent.mean(1, keepdim=True) for latent in (early, ends[1][name])]
            assert ((centred[0] >= 0) != (centred[1] >= 0)).any(), name
