"""From a recipe to a finished run folder."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
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

from .. import data, models
from ..data import Data, Examples
from ..errors import UserError
from ..losses import _check
from ..methods import FeatureMethod, LogitMethod, MetaDistil, Method, MutualLearning, TwoViewMethod
from ..models.doors import fresh_weights_expected
from ..models.text import check_tokens
from ..signals import (
    BlackBox,
    LiveTeacher,
    LocalBlackBox,
    RememberedTeacher,
    RemoteTeacher,
    Teacher,
)
from ..signals.blackbox import FLOOR
from . import checkpoint, files, metrics
from .engine import Fit, build, check_own_steps, divide, fit, new_accelerator
from .environment import environment
from .options import parse
from .processes import processes
from .recipe import PROCEDURES, ModelOptions, Recipe, TeacherOptions, build_method, read_yaml
from .rows import KnownRows
from .session import checked_step, make_optimizer, refusals, signal_of

EVALUATION_BATCH = 256

REQUESTS_EACH = 8
"""In a row on each connection to a server, before its answers are looked at."""


@dataclass(frozen=True)
class KnownTeacher:
    """A teacher with what it says about the rows of a run.

    Attributes:
        train: Answers training batches.
        test: Answers test batches; None for a black box that is not to be asked about them.
        description: Its name, size and test accuracy, for the report, as far as they are known.
    """

    train: Teacher
    test: Teacher | None
    description: dict[str, Any]

    @property
    def described(self) -> dict[str, Any]:
        """The description, with what a black box has cost by now."""
        return self.description | (self.train.cost if isinstance(self.train, BlackBox) else {})


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
    return know_teacher(prepare_data(recipe), recipe)


def prepare_data(recipe: Recipe) -> Materials:
    """The part of `prepare` that needs no teacher."""
    options = recipe.data
    loaded = data.load(options.name, root=options.root, **options.options)
    train, validation, test = data.split(loaded, validation=options.validation, seed=options.split_seed)
    if options.labels_per_class is not None:
        train = data.keep_labels(train, per_class=options.labels_per_class, seed=options.split_seed)
    for name in (options.augment, options.strong_augment):
        check_augmentation(name, train)
    check_remembered(recipe, train)
    build_network(recipe.student, loaded)
    return Materials(loaded, train, validation, test, teacher=None)


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


def check_remembered(recipe: Recipe, train: Examples) -> None:
    """Refuse a teacher that remembers its answers to rows that change.

    Raises:
        UserError: If rows look different each time.
    """
    if recipe.teacher is None or not recipe.teacher.remember:
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
        "expected training rows that always look the same for `teacher.remember`, which keeps one "
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


def know_teacher(materials: Materials, recipe: Recipe) -> Materials:
    """The same materials with the recipe's teacher, if it has one.

    Raises:
        UserError: If the teacher cannot be loaded or does not fit the data.
    """
    options, loaded, test = recipe.teacher, materials.data, materials.test
    if options is None:
        return materials
    if options.url is not None:
        return dataclasses.replace(materials, teacher=know_server(materials, recipe, options))
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
    if options.remember:
        if box is not None:
            box.check_budget(box.price(_batches(materials.train)))
        ask_train = _remember(ask_train, materials.train, accelerator)
    # The network is at hand: figures are about all that it knows, and cost no queries.
    ask_test = _remember(live, test, accelerator)
    size = models.count_parameters(network)
    about = {"model": description["model"], "parameters": size, "test": _accuracy(ask_test, test)}
    about |= {} if box is None else box.cost
    return dataclasses.replace(materials, teacher=KnownTeacher(ask_train, ask_test, about))


def local_box(network: nn.Module, options: TeacherOptions, classes: int) -> LocalBlackBox:
    """A network that tells as little as a recipe says.

    Raises:
        UserError: If `top_k` does not go with the answers or the classes.
    """
    assert options.answers is not None
    return LocalBlackBox(
        network,
        answers=options.answers,
        classes=classes,
        top_k=options.top_k,
        budget=options.budget,
        floor=FLOOR if options.floor is None else options.floor,
    )


def know_server(materials: Materials, recipe: Recipe, options: TeacherOptions) -> KnownTeacher:
    """The teacher at a URL. A fixed set of rows is asked about now, if it does not exceed the budget.

    Raises:
        UserError: If the server cannot be asked, does not fit the data, or the budget is too small; what it
            has answered before is kept.
    """
    assert options.url is not None
    loaded, train, test = materials.data, materials.train.plain, materials.test
    box = RemoteTeacher(
        options.url,
        answers=options.answers,
        top_k=options.top_k,
        budget=options.budget,
        cache=options.cache,
        account=json.dumps(asdict(recipe.data)),  # whoever asks about the same rows shares it
        concurrency=options.concurrency,
        batch_size=options.batch_size,
        timeout=options.timeout,
        retries=options.retries,
        token=_token(options),
        floor=options.floor,
    )
    check_service(box, loaded)
    fixed = [*([train] if options.remember else []), *([test] if options.test else [])]
    if fixed:
        price = box.price(batch for rows in fixed for batch in _batches(rows))
        known = sum(map(len, fixed)) - price
        announce(box, f"{price} rows to ask about now ({known} rows need no question)")
        box.check_budget(price)
    accelerator = new_accelerator(recipe.training)
    size = box.batch_size * box.concurrency * REQUESTS_EACH
    with processes().main_process_first():  # the others find the answers in the cache
        ask_train = _remember(box, train, accelerator, size) if options.remember else box
        ask_test = _remember(box, test, accelerator, size) if options.test else None
    figures = None if ask_test is None else _accuracy(ask_test, test)
    about = {"model": box.service.model, "parameters": None, "test": figures, **box.cost}
    return KnownTeacher(ask_train, ask_test, about)


def check_service(box: RemoteTeacher, loaded: Data) -> None:
    """Refuse a server for other classes or inputs than the data has.

    Raises:
        UserError: If it is one.
    """
    service, names = box.service, tuple(loaded.classes)
    if service.classes != len(names):
        raise UserError(
            f"expected a teacher for the {len(names)} classes of `{loaded.name}`, got one for "
            f"{service.classes} from {box.url}"
        )
    if service.names is not None and service.names != names and sorted(service.names) == sorted(names):
        raise UserError(
            f"expected a teacher with the classes of `{loaded.name}` in their order, {', '.join(names[:5])} "
            f"..., got the same in another order from {box.url}: {', '.join(service.names[:5])} ..."
        )
    if service.input_shape not in (None, tuple(loaded.input_shape)):
        raise UserError(
            f"expected a teacher for the inputs of `{loaded.name}`, of shape {tuple(loaded.input_shape)}, got "
            f"one for {service.input_shape} from {box.url}"
        )


def announce(box: RemoteTeacher, what: str) -> None:
    """Say what is about to be spent."""
    if processes().is_main_process:
        limit = "no budget" if box.budget is None else f"budget {box.budget}, {box.queries} of it used"
        print(f"teacher {box.url} tells {box.answers}: {what}; {limit}", file=sys.stderr)


def _token(options: TeacherOptions) -> str | None:
    """The secret that a recipe only says where to find."""
    if options.token_env is not None:
        if options.token_env not in os.environ:
            raise UserError(f"expected the token in `{options.token_env}`, and there is no such variable")
        return os.environ[options.token_env].strip()
    if options.token_file is not None:
        try:
            return Path(options.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the token in {options.token_file} ({error})") from error
    return None


def _accuracy(teacher: RememberedTeacher, test: Examples) -> dict[str, float]:
    return {"accuracy": metrics.brief(teacher.logits[test.indices], test.targets)["accuracy"]}


def on_account(materials: Materials, recipe: Recipe, method: Method, folder: Path) -> Materials:
    """What one run of several has as its own: if its teacher is a black box, its queries are counted apart.

    Raises:
        BudgetError: If a method that asks about the training rows would ask about too many.
    """
    teacher = materials.teacher
    if teacher is None or not isinstance(teacher.train, BlackBox):
        return materials
    box = teacher.train.account(str(folder.resolve()))
    if isinstance(box, RemoteTeacher) and isinstance(method, LogitMethod) and method.needs_teacher:
        rows, options = materials.train, recipe.data
        rows = rows if method.uses_unlabelled else rows.labelled
        if rows.random or options.augment != "none":
            announce(
                box, f"up to {len(rows)} rows x {recipe.training.epochs} epochs, as they change each time"
            )
        else:
            price = box.price(_batches(rows))
            announce(box, f"{price} rows to ask about in training ({len(rows) - price} need no question)")
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
            _check.check_positive(peer_lr=peer_lr)
        training = recipe.training if peer_lr is None else dataclasses.replace(recipe.training, lr=peer_lr)

        def new_peer() -> nn.Module:
            assert loaded is not None
            with fresh_weights_expected():
                return build_network(network, loaded)[0]

        return MutualLearning(
            method, new_peer, optimizer=partial(make_optimizer, training), clip_norm=training.clip_norm
        )

    method = build_method(recipe.loss, {**PROCEDURES, "MutualLearning": mutual_learning})
    return method if recipe.data.strong_augment == "none" else TwoViewMethod(method)


def rehearse(recipe: Recipe, materials: Materials) -> None:
    """Make a step on one row with networks like a recipe's own, to hear of what does not fit before training.

    Raises:
        UserError: If a path, a shape or an option of a loss does not fit.
    """
    method = method_of(recipe, materials.data)
    teacher: Teacher | None = None
    with fresh_weights_expected():  # `prepare_data` has told of the student's, and the teacher may yet learn
        student, _ = build_network(recipe.student, materials.data)
        if recipe.teacher is not None:
            teacher = _stand_in(recipe.teacher, materials.data)
            if recipe.teacher.remember and isinstance(method, (FeatureMethod, MetaDistil)):
                teacher = RememberedTeacher(torch.empty(0))
    cpu = torch.device("cpu")
    check_own_steps(method, recipe.training)
    train, quiz = divide(method, materials.train, recipe.training.seed)
    row = build(method, student, teacher, train, cpu, seed=0)
    if method.two_views:
        row = {**row, "strong": row["input"]}
    asked = [row] * method.quiz_batches if quiz is not None else []
    with refusals():
        if method.wants_preparation and teacher is not None:
            method.prepare(teacher, KnownRows(train, cpu, at_most=1))
    with refusals(), method.attached(student, teacher):
        signal = None if teacher is None or not method.needs_teacher else signal_of(teacher, row)
        method.eval().before_round(student.eval(), [row] * method.batches_per_round, asked, 0.0)
        with torch.no_grad():
            checked_step(method, student, row, signal)


def _stand_in(options: TeacherOptions, loaded: Data) -> Teacher:
    """A teacher that answers in the form of the recipe's, and costs nothing."""
    classes = len(loaded.classes)
    if options.url is not None:
        silent = _Silent(classes)
        return LocalBlackBox(silent, answers=options.answers or "probs", classes=classes, top_k=options.top_k)
    network, _ = build_network(options, loaded)
    if options.answers is None:
        return LiveTeacher(network)
    return local_box(network, dataclasses.replace(options, budget=None), classes)


class _Silent(nn.Module):
    """Says the same of everything."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.zeros(len(inputs), self.classes, device=inputs.device)


def _batches(examples: Examples, size: int = EVALUATION_BATCH) -> Iterable[dict[str, Tensor]]:
    return data.loader(examples.plain, batch_size=size, seed=None)


def _remember(
    teacher: Teacher, examples: Examples, accelerator: Accelerator, size: int = EVALUATION_BATCH
) -> RememberedTeacher:
    on_device = (
        {name: part.to(accelerator.device) for name, part in batch.items()}
        for batch in _batches(examples, size)
    )
    return RememberedTeacher.of(teacher, on_device, rows=len(examples.source))


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
    done = folder / "result.json"
    if holds(folder, "recipe.yaml", asdict(recipe)) and done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    method_of(recipe)  # what makes no sense is told before the data is loaded
    materials = materials or prepare(recipe)
    method = method_of(recipe, materials.data)
    materials = on_account(materials, recipe, method, folder)
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
        "companions": {
            name: {"test": _test(network, fitted.accelerator, materials)}
            for name, network in fitted.companions.items()
        },
        "teacher": None if teacher is None else teacher.described,
    }
    checkpoint.export(folder / "student-last.safetensors", fitted.student.body.state_dict())
    fitted.student.body.load_state_dict(fitted.best_weights)
    result["best"] = _moment(fitted, fitted.best_epoch, materials)
    checkpoint.export(folder / "student.safetensors", fitted.best_weights)
    files.write_json(folder / "student.json", description)
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
    if recipe.teacher is not None and recipe.teacher.url is not None and not recipe.teacher.test:
        recipe = dataclasses.replace(recipe, teacher=None)  # it would be asked for nothing
    materials = prepare(recipe)
    if len(description["classes"]) != len(materials.data.classes):
        raise UserError(
            f"expected data with the student's {len(description['classes'])} classes, "
            f"got `{materials.data.name}` with {len(materials.data.classes)}"
        )
    check_fit(student, materials.data)
    accelerator = new_accelerator(recipe.training)
    return _test(accelerator.prepare(student), accelerator, materials)


def _moment(fitted: Fit, epoch: int, materials: Materials) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "validation": fitted.lines[epoch - 1]["validation"],
        "test": _test(fitted.student, fitted.accelerator, materials),
    }


def _test(student: nn.Module, accelerator: Accelerator, materials: Materials) -> dict[str, Any]:
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
