"""Data, augmentations and networks from the options of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from .. import data, files, models
from ..data import Data, Examples
from ..errors import UserError
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
    source = Path(options.checkpoint) if options.checkpoint is not None else None
    if source is not None and source.is_dir():
        network, description = checkpoint.load_student(source, trusted=trusted)
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
