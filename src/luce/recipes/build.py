"""Data, augmentations and networks from the options of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data, files, models
from ..data import Data, Examples
from ..errors import UserError
from ..models.text import check_tokens
from ..signals import Teacher
from ..training import checkpoint
from .schema import ModelOptions, Recipe


@dataclass(frozen=True)
class LoadedTeacher:
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
        return self.description | self.train.cost


@dataclass(frozen=True)
class RunInputs:
    """What several runs can share: data, its parts, and the teacher."""

    data: Data
    train: Examples
    validation: Examples
    test: Examples
    teacher: LoadedTeacher | None


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
