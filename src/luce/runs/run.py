"""From a recipe to a finished run folder."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.progress import Progress

from .. import files, models
from ..methods import Samples
from ..models.loaders import fresh_weights_expected
from ..recipes.build import RunInputs, augmentation, build_network
from ..recipes.methods import method_of
from ..recipes.schema import Recipe
from ..recipes.teacher import prepare, with_budget_account
from ..training import checkpoint
from ..training.engine import Fit, fit
from ..training.processes import processes
from .environment import environment
from .evaluate import test_figures
from .folder import claim_folder, folder_matches


def run(
    recipe: Recipe, folder: Path, materials: RunInputs | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Train and evaluate what a recipe says, in a folder of its own; what is there already is not done again.

    Args:
        recipe: What to do.
        folder: Holds nothing, or this very recipe: then the run goes on where it stopped.
        materials: `prepare(recipe)`, if other runs share it.
        progress: Bars to add this run to.
    Returns:
        The content of ``result.json``.
    Raises:
        UserError: If the folder cannot be written or holds another recipe, and as `prepare` and `fit` do.
    """
    done = folder / "result.json"
    if folder_matches(folder, "recipe.yaml", asdict(recipe)) and done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    method_of(recipe)  # what makes no sense is told before the data is loaded
    materials = materials or prepare(recipe)
    method = method_of(recipe, materials.data)
    materials = with_budget_account(materials, recipe, method, folder)
    teacher = materials.teacher
    claim_folder(folder, "recipe.yaml", asdict(recipe))

    set_seed(recipe.training.seed)
    with fresh_weights_expected():
        student, description = build_network(recipe.student, materials.data)
    files.write_json(folder / "environment.json", environment())
    fitted = fit(
        student,
        method,
        materials.train,
        materials.validation,
        teacher=None if teacher is None else teacher.train,
        options=recipe.training,
        augment=augmentation(recipe.data.augment),
        strong_augment=augmentation(recipe.data.strong_augment),
        workers=recipe.data.workers,
        folder=folder,
        progress=progress,
    )
    result = {
        "student": {"model": description["model"], "parameters": models.count_parameters(student)},
        "method": recipe.method,
        "seed": recipe.training.seed,
        "epochs": len(fitted.lines),
        "seconds": sum(line["seconds"] for line in fitted.lines),
        "prepared": fitted.prepared,
        "selection": f"highest accuracy, then lowest loss, on {len(materials.validation)} validation rows",
        "train": fitted.lines[-1]["train"],
        "last": _moment(fitted, len(fitted.lines), materials),
        "co_trained": {
            name: {"test": test_figures(network, fitted.accelerator, materials)}
            for name, network in fitted.co_trained.items()
        },
        "teacher": None if teacher is None else teacher.described,
    }
    checkpoint.export(folder / "student-last.safetensors", fitted.student.body.state_dict())
    fitted.student.body.load_state_dict(fitted.best_weights)
    result["best"] = _moment(fitted, fitted.best_epoch, materials)
    checkpoint.export(folder / "student.safetensors", fitted.best_weights)
    files.write_json(folder / "student.json", description)
    if (samples := method.samples) is not None:
        files.write_json(folder / "samples.json", _described(samples, materials.data.classes))
    files.write_json(done, result)
    checkpoint.clear(folder)
    processes().wait_for_everyone()  # the next run may read what the main process has just written
    return result


def _described(samples: Samples, classes: Sequence[str]) -> dict[str, Any]:
    """Images as bytes in base64, row by row, and of each the best class with its probability."""
    pixels = (samples.images.clamp(0, 1) * 255).round().to(torch.uint8)
    best = samples.answers.softmax(-1).max(-1)
    return {
        "shape": list(pixels.shape),
        "pixels": base64.b64encode(pixels.numpy().tobytes()).decode(),
        "classes": [classes[index] for index in best.indices.tolist()],
        "confidence": best.values.tolist(),
    }


def _moment(fitted: Fit, epoch: int, materials: RunInputs) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "validation": fitted.lines[epoch - 1]["validation"],
        "test": test_figures(fitted.student, fitted.accelerator, materials),
    }
