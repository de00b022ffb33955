"""From a recipe to a finished run folder."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import Progress

from .. import files, log, models
from ..documents import read_json
from ..methods import Samples
from ..recipes.build import RunInputs, augmentation, build_student, prepare_data
from ..recipes.methods import build_method
from ..recipes.schema import Recipe
from ..recipes.teacher import load_teacher, open_teacher, with_budget_account
from ..training import checkpoint
from ..training.engine import Fit, fit
from ..training.processes import processes
from ..training.setup import new_accelerator
from .environment import environment
from .evaluate import test_figures
from .folder import claim_folder, folder_matches
from .identity import Identity, of_inputs, of_peers, of_student


def run(
    recipe: Recipe,
    folder: Path,
    inputs: RunInputs | None = None,
    *,
    accelerator: Accelerator | None = None,
    known: Identity | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train and evaluate the student of a recipe in a folder of its own.

    A finished run returns its result, an interrupted one resumes from its last checkpoint, and both only if
    recipe, data, teacher and the student's first weights are those that ``identity.json`` in the folder
    describes. A finished run does not ask the server of ``teacher.url``, so whether that has another model by
    now is not compared.

    Args:
        recipe: To run.
        folder: Empty, or that of this very recipe.
        inputs: From `luce.recipes.prepare`, where several runs share them; loaded unless given.
        accelerator: From `luce.training.setup.new_accelerator`, for this recipe and folder; made unless
            given.
        known: Of these inputs, from `luce.runs.identity.of_inputs`; computed unless given.
        progress: Display that this run adds its bars to.
    Returns:
        The content of ``result.json``.
    Raises:
        UserError: If the folder cannot be written, or holds another recipe or training; if a part of the
            recipe cannot be loaded or does not fit the others; if another process works in the folder.
    """
    build_method(recipe)  # refuses wrong terms before anything is loaded
    inputs = inputs or prepare_data(recipe)
    student, description = build_student(recipe, inputs.data)  # before the teacher is queried and paid for
    done = (folder / "result.json").exists()
    opened = None
    # A finished run needs no server, which may be gone: its answers are then not compared.
    asks = not (done and recipe.teacher is not None and recipe.teacher.url is not None)
    if asks and inputs.teacher is None:
        opened = open_teacher(inputs, recipe)
    shared = known or of_inputs(inputs, opened, teacher=asks)
    peers = of_peers(build_method(recipe, inputs.data))
    identity = {**shared, "student": of_student(student), **peers}
    if (finished := _finished(recipe, folder, identity)) is not None:  # may be in a folder that is only read
        return finished
    with files.locked(folder):
        if (finished := _finished(recipe, folder, identity)) is not None:
            return finished
        accelerator = accelerator or new_accelerator(recipe.training, folder)
        if inputs.teacher is None:
            inputs = load_teacher(inputs, recipe, accelerator.device, opened)
        return _train(recipe, folder, inputs, (student, description), identity, accelerator, progress)


def _finished(recipe: Recipe, folder: Path, identity: Identity) -> dict[str, Any] | None:
    """Return the result of a finished run; None for a folder that is free or holds an interrupted one."""
    if folder_matches(folder, "recipe.yaml", recipe, identity) and (folder / "result.json").exists():
        log.info(f"{folder} was finished before, and nothing in it is trained again")
        checkpoint.clear(folder)  # it may have been killed just before
        return read_json(folder / "result.json")
    return None


def _train(
    recipe: Recipe,
    folder: Path,
    inputs: RunInputs,
    described_student: tuple[models.Classifier, dict[str, Any]],
    identity: Identity,
    accelerator: Accelerator,
    progress: Progress | None,
) -> dict[str, Any]:
    student, description = described_student
    method = build_method(recipe, inputs.data)
    inputs = with_budget_account(inputs, recipe, method, folder)

    claim_folder(folder, "recipe.yaml", recipe, identity)
    files.write_json(folder / "environment.json", environment())
    fitted = fit(
        student,
        method,
        inputs.train,
        inputs.validation,
        teacher=None if inputs.teacher is None else inputs.teacher.train,
        options=recipe.training,
        augment=augmentation(recipe.data.augment),
        strong_augment=augmentation(recipe.data.strong_augment),
        workers=recipe.data.workers,
        folder=folder,
        accelerator=accelerator,
        progress=progress,
    )

    last = _epoch_figures(fitted, len(fitted.history), inputs)
    checkpoint.export(folder / "student-last.safetensors", fitted.student.plain.state_dict())
    fitted.student.plain.load_state_dict(fitted.best_weights)
    best = _epoch_figures(fitted, fitted.best_epoch, inputs)
    checkpoint.export(folder / "student.safetensors", fitted.best_weights)
    checkpoint.seal(folder, description)
    if (generates := method.capabilities.generates_inputs) is not None:
        files.write_json(folder / "samples.json", _samples_as_json(generates.samples, inputs.data.classes))
    result = {
        "student": {"model": description["model"], "parameters": models.count_parameters(student)},
        "method": recipe.method,
        "seed": recipe.training.seed,
        "epochs": len(fitted.history),
        "seconds": sum(record["seconds"] for record in fitted.history),
        "prepared": fitted.prepared,
        "selection": f"highest accuracy, then lowest loss, on {len(inputs.validation)} validation rows",
        "train": fitted.history[-1]["train"],
        "last": last,
        "co_trained": {
            name: {"test": test_figures(network, accelerator, inputs)}
            for name, network in fitted.co_trained.items()
        },
        "teacher": None if inputs.teacher is None else inputs.teacher.summary,
        "best": best,
    }
    files.write_json(folder / "result.json", result)
    checkpoint.clear(folder)
    processes().wait_for_everyone()  # the next run may read files that only the main process writes
    return result


def _epoch_figures(fitted: Fit, epoch: int, inputs: RunInputs) -> dict[str, Any]:
    """Figures of the student as it is, which has the weights of this epoch."""
    return {
        "epoch": epoch,
        "validation": fitted.history[epoch - 1]["validation"],
        "test": test_figures(fitted.student, fitted.accelerator, inputs),
    }


def _samples_as_json(samples: Samples, classes: Sequence[str]) -> dict[str, Any]:
    """Images as base64 of their bytes, row by row, with the most probable class of each."""
    pixels = (samples.images.clamp(0, 1) * 255).round().to(torch.uint8)
    best = samples.answers.softmax(-1).max(-1)
    return {
        "shape": list(pixels.shape),
        "pixels": base64.b64encode(pixels.numpy().tobytes()).decode(),
        "classes": [classes[index] for index in best.indices.tolist()],
        "confidence": best.values.tolist(),
    }
