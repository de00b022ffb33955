"""From a recipe to a finished run folder."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import Progress
from torch import Tensor, nn

from .. import checks, data, files, models
from ..config import parse
from ..data import Data, Examples
from ..errors import UserError
from ..methods import Method, MutualLearning, Samples, TwoViewMethod
from ..models.loaders import fresh_weights_expected
from ..models.text import check_tokens
from ..signals import LiveTeacher, Teacher
from . import checkpoint, metrics
from .engine import Fit, build, check_own_steps, divide, fit, new_accelerator
from .environment import environment
from .processes import processes
from .recipe import PROCEDURES, ModelOptions, Recipe, build_method, read_yaml
from .rows import TrainingBatches
from .session import checked_step, make_optimizer, refusals, signal_of
from .teachers import (
    EVALUATION_BATCH,
    CacheStandIn,
    LoadedTeacher,
    accuracy,
    announce,
    in_order,
    load_remote_teacher,
    local_box,
    remember,
    stand_in,
)


@dataclass(frozen=True)
class RunInputs:
    """What several runs can share: data, its parts, and the teacher."""

    data: Data
    train: Examples
    validation: Examples
    test: Examples
    teacher: LoadedTeacher | None


def prepare(recipe: Recipe) -> RunInputs:
    """Load and check everything that a recipe names, before any training.

    Raises:
        UserError: On an unknown name, unreadable files, or parts that do not fit together.
    """
    return load_teacher(prepare_data(recipe), recipe)


def prepare_data(recipe: Recipe) -> RunInputs:
    """The part of `prepare` that needs no teacher."""
    options = recipe.data
    loaded = data.load(options.name, root=options.root, **options.options)
    train, validation, test = data.split(loaded, validation=options.validation, seed=options.split_seed)
    if options.labels_per_class is not None:
        train = data.keep_labels(train, per_class=options.labels_per_class, seed=options.split_seed)
    for name in (options.augment, options.strong_augment):
        check_augmentation(name, train)
    check_cacheable(recipe, train)
    build_network(recipe.student, loaded)
    return RunInputs(loaded, train, validation, test, teacher=None)


def augmentation(name: str) -> Callable[[Tensor], Tensor] | None:
    """What a recipe does to training batches; None for nothing."""
    return None if name == "none" else data.augment(name)


def check_augmentation(name: str, rows: Examples) -> None:
    """Try an augmentation on one row, leaving the draws that follow alone.

    Raises:
        UserError: If there is none of this name, or the rows are not what it changes.
    """
    augment = augmentation(name)
    if augment is not None:
        with torch.random.fork_rng([]):
            augment(rows.batch([0])["input"])


def check_cacheable(recipe: Recipe, train: Examples) -> None:
    """Refuse a teacher that remembers its answers to rows that change.

    Raises:
        UserError: If rows look different each time.
    """
    if recipe.teacher is None or not recipe.teacher.cache_outputs:
        return
    if train.random:
        what = "the random transforms of the data itself"
    elif recipe.data.strong_augment != "none":
        what = f"a second view by `strong_augment: {recipe.data.strong_augment}`"
    elif recipe.data.augment != "none":
        what = f"`augment: {recipe.data.augment}`"
    else:
        return
    raise UserError(
        "expected training rows that always look the same for `teacher.cache_outputs`, which keeps one "
        f"answer for each, got {what}; leave out one of the two"
    )


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
        check_fit(network, loaded)
        return network, description
    shape: dict[str, Any] = {"classes": len(loaded.classes), "input_shape": loaded.input_shape}
    if source is None:
        body = models.build(options.name, **shape, **options.options)
    else:
        body = checkpoint.build(options.name, options.options, weights=source, **shape)
    mean, std = options.mean or list(loaded.mean), options.std or list(loaded.std)
    description = checkpoint.describe(
        options.name, options.options, loaded.classes, loaded.input_shape, mean, std
    )
    network = models.Classifier(body, mean, std)
    check_fit(network, loaded)
    return network, description


@torch.no_grad()
def check_fit(network: models.Classifier, loaded: Data) -> None:
    """Ask a network about one row of the data: it must answer with a logit for each class.

    Of texts it must also know the tokens.

    Raises:
        UserError: If it does not.
    """
    row = Examples(loaded.train, [0]).plain[0]["input"].unsqueeze(0)
    if loaded.tokenizer is not None:
        check_tokens(network.body, size=loaded.tokenizer.size, padding=loaded.tokenizer.padding)
    what = "inputs" if loaded.tokenizer is None else "token ids"
    try:
        answer = tuple(network.eval()(row).shape)
    except Exception as error:  # networks fail in many ways at inputs they were not made for
        raise UserError(
            f"expected a network for the {what} of `{loaded.name}`, of shape {loaded.input_shape}, "
            f"got one that fails at them ({files.reason(error)})"
        ) from error
    if answer != (1, len(loaded.classes)):
        raise UserError(
            f"expected a network for the {len(loaded.classes)} classes of `{loaded.name}`, got one that "
            f"answers a row with logits of shape {answer}"
        )


def load_teacher(materials: RunInputs, recipe: Recipe) -> RunInputs:
    """The same materials with the recipe's teacher, if it has one.

    Raises:
        UserError: If the teacher cannot be loaded or does not fit the data.
    """
    options, loaded, test = recipe.teacher, materials.data, materials.test
    if options is None:
        return materials
    if options.url is not None:
        device = new_accelerator(recipe.training).device
        known = load_remote_teacher(options, recipe.data, loaded, materials.train, test, device)
        return dataclasses.replace(materials, teacher=known)
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
    box = None if options.answers is None else local_box(network, options, len(loaded.classes))
    if box is not None:
        ask_train = box
    if options.cache_outputs:
        if box is not None:
            box.check_budget(box.price(in_order(materials.train)))
        ask_train = remember(ask_train, materials.train, accelerator.device)
    # The network is at hand: figures are about all that it knows, and cost no queries.
    ask_test = remember(live, test, accelerator.device)
    size = models.count_parameters(network)
    about = {"model": description["model"], "parameters": size, "test": accuracy(ask_test, test)}
    about |= {} if box is None else box.cost
    return dataclasses.replace(materials, teacher=LoadedTeacher(ask_train, ask_test, about))


def with_budget_account(materials: RunInputs, recipe: Recipe, method: Method, folder: Path) -> RunInputs:
    """What one run of several has as its own: if its teacher is a black box, its queries are counted apart.

    Raises:
        BudgetError: If a method that asks about the training rows would ask about too many.
    """
    teacher = materials.teacher
    box = None if teacher is None else teacher.train.account(str(folder.resolve()))
    if teacher is None or box is None:
        return materials
    if box.repeats_are_free and method.needs_teacher:
        rows, options = materials.train, recipe.data
        rows = rows if method.uses_unlabelled else rows.labelled
        if rows.random or options.augment != "none" or method.two_views:
            views = "two views of " if method.two_views else ""
            announce(
                box,
                f"up to {views}{len(rows)} rows x {recipe.training.epochs} epochs, which change each time",
            )
        else:
            price = box.price(in_order(rows))
            announce(box, f"{price} rows to query in training ({len(rows) - price} are cached)")
            box.check_budget(price)
    return dataclasses.replace(materials, teacher=dataclasses.replace(teacher, train=box))


def method_of(recipe: Recipe, loaded: Data | None = None) -> Method:
    """The method that a recipe describes.

    Args:
        recipe: Its loss, and for networks that a method trains along, how they are trained.
        loaded: The data for such networks; None if the method is to be looked at, not used.
    Raises:
        UserError: As `build_method` does.
    """

    def mutual_learning(
        method: Method, *, peer: dict[str, Any] | None = None, peer_lr: float | None = None
    ) -> MutualLearning:
        """With a peer like the student, trained like it, but for what is given."""
        if not isinstance(peer, dict | None):
            raise UserError(f"expected a mapping for `peer`, such as {{name: resnet20}}, got {peer!r}")
        network = recipe.student if peer is None else parse(ModelOptions, peer)
        if peer is not None and "name" not in peer:
            raise UserError(
                f"expected a `name` for `peer`, or no `peer` for one like the student, got {peer!r}"
            )
        if peer_lr is not None:
            checks.check_positive(peer_lr=peer_lr)
        training = recipe.training if peer_lr is None else dataclasses.replace(recipe.training, lr=peer_lr)

        def new_peer() -> nn.Module:
            assert loaded is not None
            with fresh_weights_expected():
                return build_network(network, loaded)[0]

        return MutualLearning(
            method, new_peer, optimizer=partial(make_optimizer, training), clip_norm=training.clip_norm
        )

    method = build_method(recipe.loss, {**PROCEDURES, "MutualLearning": mutual_learning})
    if method.generates_inputs and recipe.teacher is not None and recipe.teacher.cache_outputs:
        raise UserError(
            f"expected a teacher that can be asked about the inputs that {type(method).__name__} makes, got "
            "one that remembers its answers to the rows; set `teacher.cache_outputs: false`"
        )
    return method if recipe.data.strong_augment == "none" else TwoViewMethod(method)


def dry_run(recipe: Recipe, materials: RunInputs) -> None:
    """Make a step on one row with networks like a recipe's own, to hear of what does not fit before training.

    Raises:
        UserError: If a path, a shape or an option of a loss does not fit.
    """
    method = method_of(recipe, materials.data)
    teacher: Teacher | None = None
    with fresh_weights_expected():  # `prepare_data` has told of the student's, and the teacher may yet learn
        student, _ = build_network(recipe.student, materials.data)
        if recipe.teacher is not None:
            options, classes = recipe.teacher, len(materials.data.classes)
            if options.url is not None:
                teacher = stand_in(options, classes)
            else:
                network, _ = build_network(options, materials.data)
                teacher = LiveTeacher(network)
                if options.answers is not None:
                    teacher = local_box(network, options, classes)
            if options.cache_outputs:
                teacher = CacheStandIn(teacher)
    cpu = torch.device("cpu")
    check_own_steps(method, recipe.training)
    train, quiz = divide(method, materials.train, recipe.training.seed)
    row = build(method, student, teacher, train, cpu, seed=0)
    if teacher is not None:
        teacher.budget = None  # a dry run pays for no query
    if method.two_views:
        row = {**row, "strong": row["input"]}
    asked = [row] * method.quiz_batches if quiz is not None else []
    with refusals():
        if method.needs_preparation and teacher is not None:
            method.prepare(teacher, TrainingBatches(train, cpu, at_most=1))
    with refusals(), method.hooks(student, teacher):
        signal = None if teacher is None or not method.needs_teacher else signal_of(teacher, row)
        method.eval().before_round(student.eval(), [row] * method.batches_per_round, asked, 0.0)
        with torch.no_grad():
            checked_step(method, student, row, signal)


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
    if holds(folder, "recipe.yaml", asdict(recipe)) and done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    method_of(recipe)  # what makes no sense is told before the data is loaded
    materials = materials or prepare(recipe)
    method = method_of(recipe, materials.data)
    materials = with_budget_account(materials, recipe, method, folder)
    teacher = materials.teacher
    claim(folder, "recipe.yaml", asdict(recipe))

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
            name: {"test": _test(network, fitted.accelerator, materials)}
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
    return _test(accelerator.prepare(student), accelerator, materials)


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
        "test": _test(fitted.student, fitted.accelerator, materials),
    }


def _test(student: nn.Module, accelerator: Accelerator, materials: RunInputs) -> dict[str, Any]:
    batches = data.loader(materials.test, batch_size=EVALUATION_BATCH, seed=None)
    teacher = None if materials.teacher is None else materials.teacher.test
    return metrics.full(*metrics.collect(student, accelerator.prepare(batches), accelerator, teacher))


def holds(folder: Path, name: str, recipe: dict[str, Any], **notes: str) -> bool:
    """Whether a folder holds this recipe; False for one that is free, as after a run that trained nothing.

    Raises:
        UserError: If it holds another recipe, or anything else.
    """
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if name in there and {**read_yaml(folder / name), **notes} == yaml.safe_load(
        _as_yaml({**recipe, **notes})
    ):
        return True
    if there and there != {name, "environment.json"}:
        what = f"another recipe, {name}" if name in there else "other files"
        raise UserError(f"{folder} already holds {what}; choose another folder (--out), or delete it")
    return False


def claim(folder: Path, name: str, recipe: dict[str, Any], *, replace: bool = False, **notes: str) -> None:
    """Make the folder and put the recipe into it, unless it is there already.

    Args:
        folder: To be used for this recipe alone.
        name: Of the file.
        recipe: Plain values.
        replace: Put it in the place of the recipe that is there.
        notes: Kept beside the recipe; they do not tell recipes apart.
    Raises:
        UserError: If the folder cannot be written or belongs to another recipe.
    """
    processes().wait_for_everyone()  # until all have seen the folder as it was
    with processes().main_process_first():
        if replace or not holds(folder, name, recipe, **notes):
            files.make_folder(folder)
            files.write_text(folder / name, _as_yaml({**recipe, **notes}))


def _as_yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
