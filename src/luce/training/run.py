"""From a recipe to a finished run folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from rich.progress import Progress

from .. import data, models
from ..data import Data, Examples
from ..errors import UserError
from ..methods import LogitMethod
from ..signals import LiveTeacher, RememberedTeacher, Teacher
from . import checkpoint, files, metrics
from .engine import Fit, fit, new_accelerator
from .environment import environment
from .recipe import ModelOptions, Recipe, build_loss, read_yaml

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class KnownTeacher:
    """A teacher with what it says about the rows of a run.

    Attributes:
        train: Answers training batches.
        test: Answers test batches.
        description: Its name, size and test accuracy, for the report.
    """

    train: Teacher
    test: Teacher
    description: dict[str, Any]


@dataclass(frozen=True)
class Materials:
    """What several runs can share: data, its parts, and the teacher."""

    data: Data
    train: Examples
    validation: Examples
    test: Examples
    teacher: KnownTeacher | None


def prepare(recipe: Recipe) -> Materials:
    """Load and check everything that a recipe names, before any training.

    Raises:
        UserError: On an unknown name, unreadable files, or parts that do not fit together.
    """
    options = recipe.data
    loaded = data.load(options.name, root=options.root, **options.options)
    train, validation, test = data.split(loaded, validation=options.validation, seed=options.split_seed)
    if options.labels_per_class is not None:
        train = data.keep_labels(train, per_class=options.labels_per_class, seed=options.split_seed)
    teacher = None
    if recipe.teacher is not None:
        teacher = _know(recipe, loaded, train, test)
    return Materials(loaded, train, validation, test, teacher)


def build_network(options: ModelOptions, loaded: Data) -> tuple[models.Classifier, dict[str, Any]]:
    """The network that a recipe names, for its data, with the description that an export needs.

    Raises:
        UserError: If it cannot be built, or its checkpoint cannot be read or does not fit.
    """
    source = Path(options.checkpoint) if options.checkpoint is not None else None
    if source is not None and source.is_dir():
        network, description = checkpoint.load_student(source)
        if len(description["classes"]) != len(loaded.classes):
            raise UserError(
                f"expected a network for the {len(loaded.classes)} classes of `{loaded.name}`, "
                f"got one for {len(description['classes'])} from {source}"
            )
        return network, description
    body = models.build(
        options.name, classes=len(loaded.classes), input_shape=loaded.input_shape, **options.options
    )
    if source is not None:
        checkpoint.load_weights(body, source)
    mean, std = options.mean or list(loaded.mean), options.std or list(loaded.std)
    description = checkpoint.describe(
        options.name, options.options, loaded.classes, loaded.input_shape, mean, std
    )
    return models.Classifier(body, mean, std), description


def _know(recipe: Recipe, loaded: Data, train: Examples, test: Examples) -> KnownTeacher:
    options = recipe.teacher
    assert options is not None
    if options.checkpoint is None and options.name in models.names():
        raise UserError(
            f"expected weights for the teacher, and a fresh `{options.name}` has none: "
            "name a run folder or a file as `teacher.checkpoint`"
        )
    network, description = build_network(options, loaded)
    accelerator = new_accelerator(recipe.training)
    live = LiveTeacher(network)
    live.to(accelerator.device)
    ask_train: Teacher = live
    if options.remember:
        if recipe.data.augment != "none":
            raise UserError(
                f"`teacher.remember` keeps one answer per row, but `data.augment` is {recipe.data.augment}; "
                "turn one of them off"
            )
        ask_train = _remember(live, train, accelerator)
    ask_test = _remember(live, test, accelerator)
    logits = ask_test.logits[test.indices]
    if logits.shape[-1] != len(loaded.classes):
        raise UserError(
            f"expected a teacher for the {len(loaded.classes)} classes of `{loaded.name}`, got one for "
            f"{logits.shape[-1]}"
        )
    accuracy = metrics.brief(logits, test.targets)["accuracy"]
    size = models.count_parameters(network)
    return KnownTeacher(
        ask_train,
        ask_test,
        {"model": description["model"], "parameters": size, "test": {"accuracy": accuracy}},
    )


def _remember(live: LiveTeacher, examples: Examples, accelerator: Accelerator) -> RememberedTeacher:
    batches = data.loader(examples.plain, batch_size=EVALUATION_BATCH, seed=None)
    on_device = ({name: part.to(accelerator.device) for name, part in batch.items()} for batch in batches)
    return RememberedTeacher.of(live, on_device, rows=len(examples.source))


def run(
    recipe: Recipe, folder: Path, materials: Materials | None = None, progress: Progress | None = None
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
    claim(folder, "recipe.yaml", asdict(recipe))
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    method = LogitMethod(build_loss(recipe.loss))
    materials = materials or prepare(recipe)
    teacher = materials.teacher
    files.write_json(folder / "environment.json", environment())

    set_seed(recipe.training.seed)
    student, description = build_network(recipe.student, materials.data)
    fitted = fit(
        student,
        method,
        materials.train,
        materials.validation,
        teacher=None if teacher is None else teacher.train,
        options=recipe.training,
        augment=None if recipe.data.augment == "none" else data.augment(recipe.data.augment),
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
        "selection": f"highest accuracy on {len(materials.validation)} validation rows",
        "last": _moment(fitted, len(fitted.lines), materials),
        "teacher": None if teacher is None else teacher.description,
    }
    checkpoint.export(folder / "student-last.safetensors", fitted.student.body.state_dict())
    fitted.student.body.load_state_dict(fitted.best_weights)
    result["best"] = _moment(fitted, fitted.best_epoch, materials)
    checkpoint.export(folder / "student.safetensors", fitted.best_weights)
    files.write_json(folder / "student.json", description)
    files.write_json(done, result)
    checkpoint.clear(folder)
    return result


def evaluate(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Test figures of the exported student of a run, on the data and against the teacher of a recipe.

    Raises:
        UserError: If the folder holds no finished run, or the student does not fit the data.
    """
    student, description = checkpoint.load_student(folder)
    materials = prepare(recipe)
    if len(description["classes"]) != len(materials.data.classes):
        raise UserError(
            f"expected data with the student's {len(description['classes'])} classes, "
            f"got `{materials.data.name}` with {len(materials.data.classes)}"
        )
    accelerator = new_accelerator(recipe.training)
    return _test(accelerator.prepare(student), accelerator, materials)


def _moment(fitted: Fit, epoch: int, materials: Materials) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "validation": fitted.lines[epoch - 1]["validation"],
        "test": _test(fitted.student, fitted.accelerator, materials),
    }


def _test(student: models.Classifier, accelerator: Accelerator, materials: Materials) -> dict[str, Any]:
    batches = data.loader(materials.test, batch_size=EVALUATION_BATCH, seed=None)
    teacher = None if materials.teacher is None else materials.teacher.test
    return metrics.full(*metrics.collect(student, accelerator.prepare(batches), accelerator, teacher))


def claim(folder: Path, name: str, recipe: dict[str, Any], **notes: str) -> None:
    """Make the folder and put the recipe into it, or see that it is the one that is there already.

    Args:
        folder: To be used for this recipe alone.
        name: Of the file.
        recipe: Plain values.
        notes: Kept beside the recipe; they do not tell recipes apart.
    Raises:
        UserError: If the folder cannot be written or belongs to another recipe.
    """
    path = folder / name
    with PartialState().main_process_first():
        if path.exists():
            there = {key: value for key, value in read_yaml(path).items() if key not in notes}
            if there != recipe:
                raise UserError(
                    f"{folder} already holds another recipe, {name}; choose another folder with --out, "
                    "or delete it"
                )
            return
        files.make_folder(folder)
        if any(folder.iterdir()):
            raise UserError(
                f"expected an empty folder or one that holds this recipe, got {folder}; "
                "choose another with --out"
            )
        files.write_text(path, yaml.safe_dump({**recipe, **notes}, sort_keys=False, allow_unicode=True))
