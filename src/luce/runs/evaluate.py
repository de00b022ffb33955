"""Test figures of a student."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from .. import data
from ..errors import UserError
from ..recipes.build import RunInputs, check_fit
from ..recipes.schema import Recipe
from ..recipes.teacher import prepare
from ..training import checkpoint, metrics
from ..training.batches import EVALUATION_BATCH
from ..training.engine import new_accelerator


def evaluate(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Test figures of the exported student of a run, on the data and against the teacher of a recipe.

    Raises:
        UserError: If the folder holds no finished run, or the student does not fit the data.
    """
    student, description = checkpoint.load_student(folder)
    if (
        recipe.teacher is not None and recipe.teacher.url is not None
    ):  # training rows would be asked for nothing
        teacher = dataclasses.replace(recipe.teacher, cache_outputs=False) if recipe.teacher.test else None
        recipe = dataclasses.replace(recipe, teacher=teacher)
    materials = prepare(recipe)
    if len(description["classes"]) != len(materials.data.classes):
        raise UserError(
            f"expected data with the student's {len(description['classes'])} classes, "
            f"got `{materials.data.name}` with {len(materials.data.classes)}"
        )
    check_fit(student, materials.data)
    accelerator = new_accelerator(recipe.training)
    return test_figures(accelerator.prepare(student), accelerator, materials)


def test_figures(student: nn.Module, accelerator: Accelerator, materials: RunInputs) -> dict[str, Any]:
    batches = data.loader(materials.test, batch_size=EVALUATION_BATCH, seed=None)
    teacher = None if materials.teacher is None else materials.teacher.test
    return metrics.full(*metrics.collect(student, accelerator.prepare(batches), accelerator, teacher))
