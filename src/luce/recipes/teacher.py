"""The teacher of a recipe: a network, or a black box, local or behind a URL."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from .. import log, models
from ..config import as_path
from ..data import Data, Examples
from ..errors import UserError
from ..methods import Method
from ..models.classes import Match, align, assume, class_names
from ..models.loaders import FreshWeights
from ..remote import RemoteTeacher
from ..signals import BlackBox, CachedTeacher, LiveTeacher, LocalBlackBox, Teacher
from ..signals.blackbox import FLOOR
from ..training import metrics
from ..training.batches import EVALUATION_BATCH, in_order
from ..training.networks import judge_accuracy
from ..training.processes import processes
from ..training.setup import new_accelerator
from .build import LoadedTeacher, RunInputs, build_network, prepare_data
from .schema import Recipe, TeacherOptions

OpenTeacher: TypeAlias = tuple[models.Classifier, dict[str, Any]] | RemoteTeacher
"""A network with its description, or a server."""
REQUESTS_EACH = 8
"""Requests in a row on each connection to a server before its answers are stored."""


def prepare(recipe: Recipe) -> RunInputs:
    """Load data and teacher of a recipe.

    Raises:
        UserError: On an unknown name, unreadable files, or parts that do not fit together.
    """
    return load_teacher(prepare_data(recipe), recipe, new_accelerator(recipe.training).device)


def open_teacher(inputs: RunInputs, recipe: Recipe, *, trusted: bool = False) -> OpenTeacher | None:
    """Build the recipe's teacher, or connect to its server, without a query; None for a recipe without one.

    Args:
        inputs: Data and its splits.
        recipe: That names the teacher.
        trusted: Whether a run folder as the checkpoint may name any code.
    Raises:
        UserError: If the teacher cannot be loaded or does not fit the data.
    """
    options = recipe.teacher
    if options is None:
        return None
    if options.url is not None:
        return _connect(recipe, options, inputs)
    if options.checkpoint is None and options.name in models.names():
        raise UserError(
            f"expected weights for the teacher, and a fresh `{options.name}` has none: "
            "name a run folder or a file as `teacher.checkpoint`"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FreshWeights)
            network, description = build_network(options, inputs.data, trusted=trusted or recipe.names)
    except FreshWeights as fresh:
        raise UserError(f"expected a trained teacher: {fresh}") from fresh
    named = options.checkpoint is not None or class_names(network.body) is not None
    if not named and options.match_classes == "name":
        assume(options.name, inputs.data.name)
    if options.answers is not None:
        local_box(network, options, len(inputs.data.classes))  # refuses wrong limits
    return network, description


def load_teacher(
    inputs: RunInputs,
    recipe: Recipe,
    device: torch.device,
    opened: OpenTeacher | None = None,
    *,
    trusted: bool = False,
) -> RunInputs:
    """Return the inputs with the recipe's teacher; unchanged for a recipe without one.

    Args:
        inputs: Data and its splits.
        recipe: That names the teacher.
        device: Where the teacher computes.
        opened: From `open_teacher`; opened unless given.
        trusted: Whether a run folder as the checkpoint may name any code.
    Raises:
        UserError: If the teacher cannot be loaded or does not fit the data.
    """
    opened = opened or open_teacher(inputs, recipe, trusted=trusted)
    options = recipe.teacher
    if options is None or opened is None:
        return inputs
    if isinstance(opened, RemoteTeacher):
        teacher = _ask_server(opened, options, inputs, device)
    else:
        teacher = _ask_network(*opened, options, inputs, device)
    return dataclasses.replace(inputs, teacher=teacher)


def _ask_network(
    network: models.Classifier,
    description: dict[str, Any],
    options: TeacherOptions,
    inputs: RunInputs,
    device: torch.device,
) -> LoadedTeacher:
    """Use a network as it is, or behind a local black box."""
    live = LiveTeacher(network)
    live.to(device)
    box = None if options.answers is None else local_box(network, options, len(inputs.data.classes))
    train: Teacher = live if box is None else box
    if options.cache_outputs:
        if box is not None:
            # Before the first query: a budget that ends halfway would be spent for nothing.
            box.check_budget(box.price(in_order(inputs.train)))
        train = cache(train, inputs.train, device)
    # Not through the box: test figures compare with the whole output and must cost no queries.
    test = cache(live, inputs.test, device)
    summary = {
        "model": description["model"],
        "parameters": models.count_parameters(network),
        "test": _accuracy(test, inputs.test),
        **({} if box is None else box.cost),
    }
    return LoadedTeacher(train, test, summary, network)


def local_box(network: nn.Module, options: TeacherOptions, classes: int) -> LocalBlackBox:
    """Hide a network behind the answers that a recipe allows.

    Raises:
        UserError: If `top_k` does not fit the answers or the classes.
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


def _connect(recipe: Recipe, options: TeacherOptions, inputs: RunInputs) -> RemoteTeacher:
    assert options.url is not None
    box = RemoteTeacher(
        options.url,
        answers=options.answers,
        top_k=options.top_k,
        budget=options.budget,
        cache=options.cache,
        account=json.dumps(asdict(recipe.data)),  # runs on the same rows share one query count
        concurrency=options.concurrency,
        batch_size=options.batch_size,
        timeout=options.timeout,
        retries=options.retries,
        token=_token(options),
        floor=options.floor,
    )
    check_service(box, inputs.data, options.match_classes)
    return box


def _ask_server(
    box: RemoteTeacher, options: TeacherOptions, inputs: RunInputs, device: torch.device
) -> LoadedTeacher:
    """Query the rows to be cached, if the budget allows all of them.

    Answers that arrived before an error stay in the cache.
    """
    fixed = [*([inputs.train] if options.cache_outputs else []), *([inputs.test] if options.test else [])]
    if fixed:
        price = box.price(batch for rows in fixed for batch in in_order(rows))
        announce(box, f"{price} rows to query now ({sum(map(len, fixed)) - price} are cached)")
        box.check_budget(price)
    size = box.batch_size * box.concurrency * REQUESTS_EACH
    with processes().main_process_first():  # the other processes then read the answers from the cache
        train = cache(box, inputs.train, device, size) if options.cache_outputs else box
        test = cache(box, inputs.test, device, size) if options.test else None
    accuracy = None if test is None else _accuracy(test, inputs.test)
    summary = {"model": box.service.model, "parameters": None, "test": accuracy, **box.cost}
    return LoadedTeacher(train, test, summary, box)


def check_service(box: RemoteTeacher, loaded: Data, match: Match = "name") -> None:
    """Check that a server classifies the inputs of the data into its classes, and put them in its order.

    Raises:
        UserError: If it does not.
    """
    service = box.service
    own = service.classes if service.names is None else service.names
    box.order = align(own, loaded.classes, source=box.url, data=loaded.name, match=match)
    if service.input_shape not in (None, tuple(loaded.input_shape)):
        raise UserError(
            f"expected a teacher for the inputs of `{loaded.name}`, of shape {tuple(loaded.input_shape)}, "
            f"got one for {service.input_shape} from {box.url}"
        )


def with_budget_account(inputs: RunInputs, recipe: Recipe, method: Method, folder: Path) -> RunInputs:
    """Return the inputs with a query count for this run alone, if its teacher is a black box.

    Raises:
        BudgetError: If the method will query more training rows than the budget allows.
    """
    teacher = inputs.teacher
    box = None if teacher is None else teacher.train.account(str(folder.resolve()))
    if teacher is None or box is None:
        return inputs
    if box.repeats_are_free and method.needs_teacher:
        rows, options = inputs.train, recipe.data
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
    return dataclasses.replace(inputs, teacher=dataclasses.replace(teacher, train=box))


def announce(box: BlackBox, plan: str) -> None:
    """State the queries that are about to be made and the budget that is left."""
    limit = "no budget" if box.budget is None else f"budget {box.budget}, {box.queries} of it used"
    log.info(f"teacher {box.address} answers with {box.answers}: {plan}; {limit}")


def cache(
    teacher: Teacher, examples: Examples, device: torch.device, batch_size: int = EVALUATION_BATCH
) -> CachedTeacher:
    """Query a teacher about all rows once and keep its answers."""
    # Lazily: the device holds one batch at a time, not the data set.
    batches = (
        {name: part.to(device) for name, part in batch.items()} for batch in in_order(examples, batch_size)
    )
    return CachedTeacher.of(teacher, batches, rows=len(examples.source))


def _accuracy(teacher: CachedTeacher, test: Examples) -> dict[str, float]:
    """Return the teacher's accuracy on the test rows, and warn of one that is no better than chance."""
    logits, target = teacher.logits[test.indices], test.targets
    right, rows = int((logits.argmax(-1) == target).sum()), int((target >= 0).sum())
    if problem := judge_accuracy(right, rows, logits.shape[-1], "test rows"):
        log.warning(problem)
    return {"accuracy": metrics.brief(logits, target)["accuracy"]}


def _token(options: TeacherOptions) -> str | None:
    """Read the secret from where the recipe says it is; recipes are stored and must not hold it."""
    if options.token_env is not None:
        if options.token_env not in os.environ:
            raise UserError(f"expected the token in `{options.token_env}`, and there is no such variable")
        # A line break at the end, as editors and shells add one, is not valid in an HTTP header.
        return os.environ[options.token_env].strip()
    if options.token_file is not None:
        try:
            return as_path(options.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the token in {options.token_file} ({error})") from error
    return None
