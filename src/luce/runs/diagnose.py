"""Analyse the knowledge of a teacher beyond the labels, and how much of it reaches a student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from .. import __version__, analysis, data, log, suggest_temperature
from ..analysis.page import DiagnosisReport
from ..checks import check_positive
from ..config import as_path, merge, parse, read_yaml
from ..data import Data, Examples
from ..data.sources import as_source
from ..errors import UserError
from ..recipes import Recipe, RunInputs
from ..recipes.build import build_network
from ..recipes.teacher import load_teacher
from ..reports.runs import Bin
from ..training import metrics
from ..training.batches import EVALUATION_BATCH
from ..training.setup import new_accelerator
from .folder import read_identity
from .identity import differences, named, of_data

SWEEP = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Temperatures at which the teacher is analysed too."""
SWEEP_ROWS = 8192
"""At most this number of rows, at even distances, for the sweep: its curves need no more."""
UNTRAINED = "an untrained student (all logits 0)"


@dataclass(frozen=True, kw_only=True)
class DiagnoseOptions:
    """Teacher, student and data of a diagnosis.

    Attributes:
        teacher: A run folder of Luce, or the name of a network.
        data: Name of the data, such as sklearn:digits; luce info lists the names.
        checkpoint: Weights of a network that is given by name.
        student: A run folder; an untrained student if not given.
        temperature: Temperature of the teacher's softmax.
        weight: The weight w of KD in (1 - w) CE + w KD.
        root: Folder of data that is not installed.
        held_out: Rows to compare the training rows with. If not given: the validation rows if the teacher is
            a run on the same data, as it was not trained on them, else the test rows.
        cpu: Use the CPU even if there is a GPU.
        trusted: Let run folders name code of others, such as python: networks.
        overrides: Further fields of a recipe's ``teacher`` and ``data``, as nested mappings.
    """

    teacher: str
    data: str
    checkpoint: str | None = None
    student: str | None = None
    temperature: float = 1.0
    weight: float = 0.9
    root: str | None = None
    held_out: Literal["validation", "test"] | None = None
    cpu: bool = False
    trusted: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive(temperature=self.temperature)
        if not 0 <= self.weight <= 1:
            raise UserError(f"expected `weight` in [0, 1], got {self.weight}")


def diagnose(options: DiagnoseOptions, *, command: str = "") -> DiagnosisReport:
    """Analyse a teacher's logits on training and held-out rows.

    Each row is seen once, without augmentation. Writes nothing: `luce.analysis.page` makes the JSON and the
    page. `luce.analysis.diagnose` is the same analysis for tensors.

    Args:
        options: Teacher, student, data and settings.
        command: Command that reproduces the report.
    Returns:
        The shares of smoothing, classes and rows in the teacher's knowledge, the gradient that KD gives the
        student, the sweep over temperatures, and the calibration of the teacher.
    Raises:
        UserError: If teacher, student or data cannot be loaded, or do not fit together.
    Example:
        >>> options = DiagnoseOptions(teacher="runs/digits-teacher", data="sklearn:digits", temperature=4.0)
        >>> diagnose(options).suggested_temperature  # doctest: +SKIP
        3.1
    """
    recipe, same_data = _recipe(options)
    loaded = data.load(recipe.data.name, root=recipe.data.root, **recipe.data.options)
    which = options.held_out or ("validation" if same_data else "test")
    parts = _parts(recipe, loaded, which, split=same_data or which == "validation")
    train, held_out = parts.values()
    if same_data and which == "validation":
        _check_held_out(as_path(options.teacher), loaded, held_out)
    accelerator = new_accelerator(recipe.training)
    inputs = RunInputs(loaded, train, held_out, held_out)
    teacher = load_teacher(inputs, recipe, accelerator.device, trusted=options.trusted).teacher
    assert teacher is not None
    assert teacher.test is not None  # `_recipe` sets `teacher.test`
    teacher_logits = {
        name: source.signal({"index": part.indices}).logits
        for (name, part), source in zip(parts.items(), (teacher.train, teacher.test), strict=True)
    }
    if options.student is None:
        student = UNTRAINED
        student_logits = {
            name: torch.zeros_like(logits, dtype=torch.float32) for name, logits in teacher_logits.items()
        }
    else:
        model, student_logits = _student_logits(recipe, loaded, parts, accelerator, options.trusted)
        student = f"the student {options.student} ({model})"
    spaced = slice(None, None, -(-len(train) // SWEEP_ROWS))
    sample = teacher_logits["training"][spaced]
    try:
        diagnoses = {
            name: analysis.diagnose(
                teacher_logits[name],
                part.targets,
                temperature=options.temperature,
                student_logits=student_logits[name],
                weight=options.weight,
            )
            for name, part in parts.items()
        }
        sweep = tuple(
            analysis.diagnose(sample, train.targets[spaced], temperature=temperature, references=False)
            for temperature in sorted({*SWEEP, options.temperature})
        )
        suggested = suggest_temperature(teacher_logits["training"])
        limits = analysis.limits(student_logits["training"][spaced], sample, temperature=options.temperature)
    except ValueError as error:  # logits that are not finite, or one class alone
        raise UserError(str(error)) from error
    parameters = teacher.description["parameters"]
    size = "" if parameters is None else f", {parameters:,} parameters"
    return DiagnosisReport(
        teacher=options.teacher,
        data=options.data,
        classes=loaded.classes,
        student=student,
        train=diagnoses["training"],
        held_out=diagnoses["held out"],
        held_out_rows=f"{which} rows",
        sweep=sweep,
        limits=limits,
        suggested_temperature=suggested,
        reliability={name: _reliability(teacher_logits[name], part.targets) for name, part in parts.items()},
        command=command,
        facts=(
            ("teacher", teacher.description["model"] + size),
            ("luce", __version__),
            ("torch", torch.__version__),
        ),
    )


def _recipe(options: DiagnoseOptions) -> tuple[Recipe, bool]:
    """The options as a recipe, and whether the teacher was trained on this data.

    Raises:
        UserError: If the teacher is neither a run folder nor a name, or an override is unknown.
    """
    content: dict[str, Any] = {"name": options.data}
    folder, same_data = as_path(options.teacher), False
    if folder.is_dir():
        teacher: dict[str, Any] = {"checkpoint": options.teacher}
        if options.checkpoint is not None:
            raise UserError(f"expected no `checkpoint` for {folder}, a run folder, which has its own")
        if (folder / "recipe.yaml").exists():
            trained_on = read_yaml(folder / "recipe.yaml").get("data") or {}
            if same_data := trained_on.get("name") == options.data:
                content = {**trained_on, "labels_per_class": None}
    elif len(folder.parts) > 1 and ":" not in options.teacher:
        raise UserError(f"expected a run folder or the name of a network as `teacher`, got {options.teacher}")
    else:
        teacher = {"name": options.teacher, "checkpoint": options.checkpoint}
    if options.root is not None:
        content["root"] = options.root
    base = {
        "data": content,
        "teacher": teacher,
        "student": {"checkpoint": options.student},
        "training": {"cpu": options.cpu},
    }
    recipe = parse(Recipe, merge(base, options.overrides))
    recipe.data.augment = "none"
    assert recipe.teacher is not None
    recipe.teacher.cache_outputs = recipe.teacher.test = True
    recipe.student.match_classes = recipe.teacher.match_classes
    return recipe, same_data


def _parts(recipe: Recipe, loaded: Data, held_out: str, *, split: bool) -> dict[str, Examples]:
    """Training rows and held-out rows without augmentation."""
    options = recipe.data
    if split:
        train, validation, test = data.split(loaded, validation=options.validation, seed=options.split_seed)
    else:
        train, test = (
            Examples(part, torch.arange(len(as_source(part)))) for part in (loaded.train, loaded.test)
        )
    if options.labels_per_class is not None:
        train = data.keep_labels(train, per_class=options.labels_per_class, seed=options.split_seed)
    return {"training": train.plain, "held out": (validation if held_out == "validation" else test).plain}


def _check_held_out(folder: Path, loaded: Data, held_out: Examples) -> None:
    """Warn if the held-out rows are not the teacher's validation rows, so that it may have learned them."""
    there = read_identity(folder).get("data", {}).get("validation")
    here = of_data(loaded, {"validation": held_out})["validation"]
    if there is not None and (found := list(differences(there, here, "data.validation"))):
        log.warning(
            f"the validation rows are not those of {folder}, so that the teacher may have been trained on "
            f"some: {named(found)}; give it the data and the split of its run, or set `held_out` to test"
        )


def _student_logits(
    recipe: Recipe, loaded: Data, parts: Mapping[str, Examples], accelerator: Accelerator, trusted: bool
) -> tuple[str, dict[str, Tensor]]:
    """Name of the student's network, and its logits on each part."""
    network, description = build_network(recipe.student, loaded, trusted=trusted or recipe.names)
    network = accelerator.prepare(network)
    logits = {}
    for name, part in parts.items():
        batches = data.loader(part, batch_size=EVALUATION_BATCH, seed=None, workers=recipe.data.workers)
        logits[name], _, _ = metrics.collect(network, accelerator.prepare(batches), accelerator)
    return description["model"], logits


def _reliability(logits: Tensor, targets: Tensor) -> list[Bin]:
    """Confidence and accuracy of the teacher at temperature 1 on the labelled rows, by bins of confidence."""
    figures = metrics.full(logits.float(), None, targets)
    return [Bin(**bar) for bar in figures["reliability"]]
