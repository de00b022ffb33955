"""The teacher that a recipe names: a network, or a black box, local or behind a URL."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import models
from ..data import Data, Examples
from ..errors import UserError
from ..methods import Method
from ..remote import RemoteTeacher
from ..signals import BlackBox, CachedTeacher, Kind, LiveTeacher, LocalBlackBox, Signal, Teacher
from ..signals.blackbox import FLOOR
from ..signals.teachers import Batch
from ..training import metrics
from ..training.batches import EVALUATION_BATCH, in_order
from ..training.engine import new_accelerator
from ..training.processes import processes
from .build import LoadedTeacher, RunInputs, build_network, prepare_data
from .schema import DataOptions, Recipe, TeacherOptions

REQUESTS_EACH = 8
"""In a row on each connection to a server, before its answers are looked at."""


def prepare(recipe: Recipe) -> RunInputs:
    """Load and check everything that a recipe names, before any training.

    Raises:
        UserError: On an unknown name, unreadable files, or parts that do not fit together.
    """
    return load_teacher(prepare_data(recipe), recipe)


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


def load_remote_teacher(
    options: TeacherOptions,
    data_options: DataOptions,
    loaded: Data,
    train: Examples,
    test: Examples,
    device: torch.device,
) -> LoadedTeacher:
    """The teacher at a URL. A fixed set of rows is asked about now, if it does not exceed the budget.

    Args:
        options: Of the teacher.
        data_options: Who asks about the same rows, by these, shares an account.
        loaded: The data that it should fit.
        train: Rows to ask about now, if the answers are to be remembered.
        test: Likewise, if it is to be tested.
        device: For the rows.
    Raises:
        UserError: If the server cannot be asked, does not fit the data, or the budget is too small; what it
            has answered before is kept.
    """
    assert options.url is not None
    box = RemoteTeacher(
        options.url,
        answers=options.answers,
        top_k=options.top_k,
        budget=options.budget,
        cache=options.cache,
        account=json.dumps(asdict(data_options)),
        concurrency=options.concurrency,
        batch_size=options.batch_size,
        timeout=options.timeout,
        retries=options.retries,
        token=_token(options),
        floor=options.floor,
    )
    check_service(box, loaded)
    fixed = [*([train] if options.cache_outputs else []), *([test] if options.test else [])]
    if fixed:
        price = box.price(batch for rows in fixed for batch in in_order(rows))
        known = sum(map(len, fixed)) - price
        announce(box, f"{price} rows to query now ({known} are cached)")
        box.check_budget(price)
    size = box.batch_size * box.concurrency * REQUESTS_EACH
    with processes().main_process_first():  # the others find the answers in the cache
        ask_train = remember(box, train, device, size) if options.cache_outputs else box
        ask_test = remember(box, test, device, size) if options.test else None
    figures = None if ask_test is None else accuracy(ask_test, test)
    about = {"model": box.service.model, "parameters": None, "test": figures, **box.cost}
    return LoadedTeacher(ask_train, ask_test, about)


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
            f"expected a teacher for the inputs of `{loaded.name}`, of shape {tuple(loaded.input_shape)}, "
            f"got one for {service.input_shape} from {box.url}"
        )


def announce(box: BlackBox, plan: str) -> None:
    """Print the queries that are about to be made and the budget that is left."""
    if processes().is_main_process:
        limit = "no budget" if box.budget is None else f"budget {box.budget}, {box.queries} of it used"
        print(f"teacher {box.address} answers with {box.answers}: {plan}; {limit}", file=sys.stderr)


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


def accuracy(teacher: CachedTeacher, test: Examples) -> dict[str, float]:
    return {"accuracy": metrics.brief(teacher.logits[test.indices], test.targets)["accuracy"]}


def stand_in(options: TeacherOptions, classes: int) -> LocalBlackBox:
    """A black box that answers in the form of the one at a URL, says nothing, and costs nothing."""
    silent = _Silent(classes)
    return LocalBlackBox(
        silent,
        answers=options.answers or "probs",
        classes=classes,
        top_k=options.top_k,
        budget=options.budget,
    )


class CacheStandIn(Teacher):
    """Answers like another teacher, with the limits of a `CachedTeacher`; for a dry run without a cache."""

    answers_new_inputs = False

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    @property
    def kind(self) -> Kind:
        return self.teacher.kind

    @property
    def description(self) -> str:
        return CachedTeacher(torch.empty(0)).description

    def to(self, device: torch.device) -> None:
        self.teacher.to(device)

    def signal(self, batch: Batch) -> Signal:
        return self.teacher.signal(batch)


class _Silent(nn.Module):
    """Says the same of everything."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.zeros(len(inputs), self.classes, device=inputs.device)


def remember(
    teacher: Teacher, examples: Examples, device: torch.device, size: int = EVALUATION_BATCH
) -> CachedTeacher:
    on_device = (
        {name: part.to(device) for name, part in batch.items()} for batch in in_order(examples, size)
    )
    return CachedTeacher.of(teacher, on_device, rows=len(examples.source))
