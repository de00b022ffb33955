"""Data, augmentations and networks from the options of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from .. import data, files, log, models
from ..config import as_path
from ..data import Data, Examples
from ..errors import UserError
from ..models.classes import Match, align, class_names
from ..models.modes import in_evaluation
from ..models.text import check_tokens
from ..signals import Teacher
from ..training import checkpoint
from ..trust import Trusted
from .schema import ModelOptions, Recipe


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher for the training rows and for the test rows of a run.

    Attributes:
        train: Answers training batches.
        test: Answers test batches; None for a black box that must not be queried about them.
        description: Its name, size and test accuracy, as far as they are known.
        source: The network or the server that answers.
    """

    train: Teacher
    test: Teacher | None
    description: dict[str, Any]
    source: nn.Module | Teacher

    @property
    def summary(self) -> dict[str, Any]:
        """The description and the cost of all queries so far, for ``result.json``."""
        return self.description | self.train.cost


@dataclass(frozen=True)
class RunInputs:
    """Inputs that several runs can share: data, its splits, and the teacher (None before it is loaded)."""

    data: Data
    train: Examples
    validation: Examples
    test: Examples
    teacher: LoadedTeacher | None = None


def prepare_data(recipe: Recipe) -> RunInputs:
    """Load and split the data of a recipe, and try its augmentations.

    Raises:
        UserError: If the data cannot be loaded, or an augmentation or a cached teacher does not suit it.
    """
    options = recipe.data
    loaded = data.load(options.name, root=options.root, **options.options)
    train, validation, test = data.split(loaded, validation=options.validation, seed=options.split_seed)
    train = train.counted  # before a teacher is paid for its answers
    if options.labels_per_class is not None:
        train = data.keep_labels(train, per_class=options.labels_per_class, seed=options.split_seed)
    for name in (options.augment, options.strong_augment):
        _check_augmentation(name, train)
    _check_cacheable(recipe, train)
    return RunInputs(loaded, train, validation, test)


def augmentation(name: str) -> Callable[[Tensor], Tensor] | None:
    """Return the augmentation of training batches that a recipe names; None for ``none``."""
    return None if name == "none" else data.augment(name)


def _check_augmentation(name: str, rows: Examples) -> None:
    augment = augmentation(name)
    if augment is not None:
        with torch.random.fork_rng([]):
            augment(rows.batch([0])["input"])


def _check_cacheable(recipe: Recipe, train: Examples) -> None:
    if recipe.teacher is None or not recipe.teacher.cache_outputs:
        return
    if train.random:
        cause = "the random transforms of the data itself"
    elif recipe.data.strong_augment != "none":
        cause = f"a second view by `strong_augment: {recipe.data.strong_augment}`"
    elif recipe.data.augment != "none":
        cause = f"`augment: {recipe.data.augment}`"
    else:
        return
    raise UserError(
        "expected training rows that never change for `teacher.cache_outputs`, which keeps one answer per "
        f"row, got {cause}; leave out one of the two"
    )


def build_student(recipe: Recipe, loaded: Data) -> tuple[models.Classifier, dict[str, Any]]:
    """Build the student of a recipe with the initial weights of its seed.

    Returns:
        The network and its description; see `build_network`.
    Raises:
        UserError: As `build_network`.
    """
    set_seed(recipe.training.seed)
    return build_network(recipe.student, loaded, trusted=recipe.names)


def build_network(
    options: ModelOptions, loaded: Data, *, trusted: Trusted = False
) -> tuple[models.Classifier, dict[str, Any]]:
    """Build the network that a recipe names and check it on one row of the data.

    Args:
        options: Of the recipe.
        loaded: The data.
        trusted: Networks that a run folder as the checkpoint may name; see `luce.trust.Trusted`.
    Returns:
        The network, and the description from which `luce.training.checkpoint` builds it again.
    Raises:
        UserError: If it cannot be built, its checkpoint cannot be read, or it does not fit the data.
    """
    source = None if options.checkpoint is None else as_path(options.checkpoint)
    if source is not None:
        _check_trained(source)
    if source is not None and source.is_dir():
        network, description = checkpoint.load_student(source, trusted=trusted)
        _report_replaced(options, description, source)
        return network, adapt(network, description, loaded, str(source), options.match_classes)
    shape: dict[str, Any] = {"classes": len(loaded.classes), "input_shape": loaded.input_shape}
    if source is None:
        body = models.build(options.name, **shape, **options.options)
    else:
        body = checkpoint.build(options.name, options.options, weights=source, **shape)
    mean = list(loaded.mean) if options.mean is None else options.mean
    std = list(loaded.std) if options.std is None else options.std
    description = checkpoint.describe(
        options.name, options.options, loaded.classes, loaded.input_shape, mean, std
    )
    network = models.Classifier(body, mean, std)
    own = class_names(body)
    if source is None and own is None:
        check_fit(network, loaded)
        return network, description
    description["classes"] = own
    return network, adapt(network, description, loaded, str(source or options.name), options.match_classes)


def _check_trained(source: Path) -> None:
    """Refuse a checkpoint that is not there yet."""
    if not source.exists():
        raise UserError(
            f"cannot read the checkpoint {source}: there is no such file or folder; train that network "
            f"first, with `luce train RECIPE --out {source}`, or correct the path"
        )
    if (source / "recipe.yaml").exists() and not (source / "student.json").exists():
        raise UserError(
            f"expected {source} to be a finished run with an exported student, and its training is not "
            "finished; finish it first, with the command that began it"
        )


def _report_replaced(options: ModelOptions, description: dict[str, Any], folder: Path) -> None:
    """State the fields of a network that its run folder replaces; a default may not have been asked for."""
    default = ModelOptions()
    for ours, theirs in {"name": "model", "options": "options", "mean": "mean", "std": "std"}.items():
        asked, found = getattr(options, ours), description[theirs]
        if asked not in (getattr(default, ours), found):
            log.info(f"the run folder {folder} sets `{ours}` to {found}, not the {asked} beside `checkpoint`")


def adapt(
    network: models.Classifier, description: dict[str, Any], loaded: Data, source: str, match: Match
) -> dict[str, Any]:
    """Make a trained network answer in the classes of the data, in their order, and check it on one row.

    Args:
        network: From weights of its own; its logits are reordered if need be.
        description: As of `luce.training.checkpoint`; its ``classes`` are None if they have no names.
        loaded: The data.
        source: Where the network is from, for messages.
        match: How classes are matched; see `luce.models.classes.align`.
    Returns:
        The description with the data's names of the classes, in the order of the network's own logits.
    Raises:
        UserError: If the network does not fit the data.
    """
    classes, shape = list(loaded.classes), list(loaded.input_shape)
    own = description["classes"]
    network.order = align(
        len(classes) if own is None else own, classes, source=source, data=loaded.name, match=match
    )
    check_fit(network, loaded)
    if len(shape) > 1 and description["input_shape"] != shape:  # texts may have any length
        log.warning(
            f"{source} was trained on inputs of shape {tuple(description['input_shape'])}, and those of "
            f"`{loaded.name}` are {tuple(shape)}: resize them, or expect another accuracy"
        )
    if network.order is not None:
        classes = [classes[place] for place in network.order.argsort().tolist()]
    return {**description, "classes": classes}


@torch.no_grad()
def check_fit(network: models.Classifier, loaded: Data) -> None:
    """Check that a network returns one logit per class for a row of the data, and knows the tokens of texts.

    Raises:
        UserError: If it does not.
    """
    row = Examples(loaded.train, [0]).plain[0]["input"].unsqueeze(0)
    if loaded.tokenizer is not None:
        check_tokens(network.body, size=loaded.tokenizer.size, padding=loaded.tokenizer.padding)
    kind = "inputs" if loaded.tokenizer is None else "token ids"
    try:
        with in_evaluation(network):
            shape = tuple(network(row).shape)
    except Exception as error:  # networks raise anything at inputs they were not made for
        raise UserError(
            f"expected a network for the {kind} of `{loaded.name}`, of shape {loaded.input_shape}, "
            f"got one that fails on them ({files.reason(error)})"
        ) from error
    if shape != (1, len(loaded.classes)):
        raise UserError(
            f"expected a network for the {len(loaded.classes)} classes of `{loaded.name}`, got one that "
            f"returns logits of shape {shape} for one row"
        )
