"""Test figures of a student."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from .. import data, log
from ..models.classes import Match
from ..recipes.build import RunInputs, adapt, prepare_data
from ..recipes.schema import Recipe
from ..recipes.teacher import load_teacher
from ..training import checkpoint, metrics
from ..training.batches import EVALUATION_BATCH
from ..training.setup import new_accelerator
from .folder import read_identity
from .identity import differences, named, of_data


def evaluate(
    folder: Path, recipe: Recipe, *, match_classes: Match = "name", trusted: bool = False
) -> dict[str, Any]:
    """Return test figures of the exported student of a run.

    Args:
        folder: Of a finished run.
        recipe: Names the test data, and the teacher to compare with; usually the run's own, from
            `luce.recipes.read_stored`.
        match_classes: How the student's classes are matched with the data's; that of the recipe was for the
            checkpoint from which the student started. On data of other classes than the run's, the teacher's
            are matched likewise.
        trusted: Whether the folder, and a run folder as the teacher's checkpoint, may name any code; they may
            name the networks of the recipe anyway.
    Raises:
        UserError: If the folder holds no finished run, or the student does not fit the data.
    """
    student, description = checkpoint.load_student(folder, trusted=trusted or recipe.names)
    teacher = recipe.teacher
    if teacher is not None and teacher.url is not None:  # training rows would cost queries for nothing
        teacher = dataclasses.replace(teacher, cache_outputs=False) if teacher.test else None
        recipe = dataclasses.replace(recipe, teacher=teacher)
    accelerator = new_accelerator(recipe.training)
    inputs = prepare_data(recipe)
    adapt(student, description, inputs.data, str(folder), match_classes)
    trained_on = read_identity(folder).get("data")  # None of an earlier version
    _say_which_rows(folder, inputs, trained_on)
    if recipe.teacher is not None and trained_on and trained_on["classes"] != list(inputs.data.classes):
        # The recipe's own rule was for the classes of the run.
        teacher = dataclasses.replace(recipe.teacher, match_classes=match_classes)
        recipe = dataclasses.replace(recipe, teacher=teacher)
    inputs = load_teacher(inputs, recipe, accelerator.device, trusted=trusted)
    return test_figures(accelerator.prepare(student), accelerator, inputs)


def _say_which_rows(folder: Path, inputs: RunInputs, there: dict[str, Any] | None) -> None:
    """State on which rows a student is evaluated, if it was tested on others at the end of its run."""
    if there is None:
        return
    here = of_data(inputs.data, {"test": inputs.test})
    if found := list(differences({name: there.get(name) for name in here}, here, "data")):
        log.info(
            f"evaluates on {len(inputs.test)} test rows of {inputs.data.name}, not on those of the run "
            f"{folder}: {named(found)}"
        )


def test_figures(student: nn.Module, accelerator: Accelerator, inputs: RunInputs) -> dict[str, Any]:
    """Return the figures of `luce.training.metrics.full` on the test rows, with the teacher's if it has any.

    Args:
        student: On the accelerator's device.
        accelerator: Splits the rows over the processes.
        inputs: Test rows and teacher.
    """
    batches = data.loader(inputs.test, batch_size=EVALUATION_BATCH, seed=None)
    teacher = None if inputs.teacher is None else inputs.teacher.test
    return metrics.full(*metrics.collect(student, accelerator.prepare(batches), accelerator, teacher))
