"""`Data`, which every loader returns, and the wrapper for your own datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from .sources import InMemory, LazyImages, Part, Source, as_source
from .text import Tokenizer
from .transforms import IMAGENET_MEAN, IMAGENET_STD

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
UNKNOWN_STATISTICS: Statistics = (0.0,), (1.0,)


@dataclass(frozen=True)
class Data:
    """A classification data set: training rows, test rows and their description.

    Inputs are *not* normalised: images lie in [0, 1], and each network normalises them with ``mean`` and
    ``std``. Map-style datasets are wrapped as :class:`~luce.data.Source`.

    Attributes:
        name: As given to :func:`luce.data.load`.
        train: Rows for training and selection; items are ``(input, label)``.
        test: Rows for the final evaluation only.
        classes: Class names; labels are indices into them.
        input_shape: Shape of one input, such as ``(1, 8, 8)``.
        mean: Mean per channel (first dimension of an input) over the training inputs; ``(0.0,)`` if unknown.
        std: Population standard deviation per channel; ``(1.0,)`` if unknown. Never 0.
        licence: Licence of the data, as far as its source states it.
        tokenizer: Tokenizer of text inputs, which are token ids; None for other data.

    Raises:
        UserError: If a split is empty or has labels outside ``0 .. len(classes) - 1``.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            source = as_source(getattr(self, part))
            object.__setattr__(self, part, source)
            _check_labels(source.targets, len(self.classes), f"the {part} part of `{self.name}`")


def describe(
    name: str,
    train: Source,
    test: Source,
    *,
    classes: Sequence[str] | None = None,
    licence: str,
    tokenizer: Tokenizer | None = None,
) -> Data:
    """Build `Data`; derive input shape, channel statistics and, if not given, class names from the rows."""
    if not len(train):
        raise UserError(f"the train part of `{name}` is empty")
    if classes is None:
        classes = [str(label) for label in range(int(train.targets.max()) + 1)]
    mean, std = UNKNOWN_STATISTICS
    if isinstance(train, InMemory):
        mean, std = channel_statistics(train.inputs)
    elif isinstance(train, LazyImages):
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    shape = tuple(train.plain.read(0).shape)
    return Data(name, train, test, tuple(classes), shape, mean, std, licence, tokenizer)


def from_datasets(
    train: Dataset[Any],
    test: Dataset[Any] | None = None,
    classes: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Data:
    """Build `Data` from your own map-style datasets.

    A ``TensorDataset`` of inputs and labels stays in memory, is read in batches, and gives ``mean`` and
    ``std``. Every item of another dataset is read once for its label, unless the dataset has ``targets``.

    Leave random transforms to ``loader(augment=...)``: validation rows are split from ``train`` and would be
    transformed too.

    Args:
        train: Items ``(input, label)`` or dicts with ``input`` and ``target``; inputs are tensors or arrays,
            and uint8 is divided by 255.
        test: As ``train``; None holds out a fixed stratified quarter of ``train``.
        classes: Class names; None uses ``train.classes`` if it exists, else the labels as text.
        tokenizer: Tokenizer of the inputs if they are token ids; networks are checked against it.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> pairs = TensorDataset(torch.rand(40, 5), torch.arange(40) % 2)
        >>> data = from_datasets(pairs, classes=["no", "yes"])
        >>> len(data.train), len(data.test), data.input_shape
        (30, 10, (5,))
    """
    source = as_source(train)
    if classes is None:
        classes = getattr(train, "classes", None)
    if not len(source):
        raise UserError("expected at least one row in `train`, got an empty dataset")
    if test is None:
        kept, held_out = stratified(source.targets, 0.25, seed=0)
        source, rest = _part(source, kept), _part(source, held_out)
    else:
        rest = as_source(test)
    return describe("datasets", source, rest, classes=classes, licence="unknown", tokenizer=tokenizer)


def _part(source: Source, indices: Tensor) -> Source:
    if isinstance(source, InMemory):
        return InMemory(source.inputs[indices], source.targets[indices])
    return Part(source, indices)


def stratified(targets: Tensor, size: float | int, seed: int) -> tuple[Tensor, Tensor]:
    """Two sorted sets of rows, the second of ``size`` (a share or a count), with the classes' shares kept.

    Raises:
        UserError: If a class would be missing from either.
    """
    from sklearn.model_selection import train_test_split

    count = round(size * len(targets)) if isinstance(size, float) else size
    rows_of_class = torch.unique(targets, return_counts=True)[1]
    classes = len(rows_of_class)
    if classes <= count <= len(targets) - classes and int(rows_of_class.min()) > 1:
        kept, held_out = train_test_split(
            np.arange(len(targets)), test_size=count, stratify=targets.numpy(), random_state=seed
        )
        parts = torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(held_out))
        if all(len(torch.unique(targets[part])) == classes for part in parts):
            return parts
    raise UserError(
        f"cannot hold out {count} of {len(targets)} rows so that each of the {classes} classes is on both "
        "sides; hold out another number, or remove the rarest classes"
    )


def channel_statistics(inputs: Tensor) -> Statistics:
    """Return mean and population standard deviation per channel (dimension 1); uint8 counts as [0, 1].

    A constant channel gets the deviation 1, so that division by it is safe. Integers other than uint8, such
    as token ids, are not measured.

    Example:
        >>> channel_statistics(torch.tensor([[0, 7], [255, 7]], dtype=torch.uint8))
        ((0.5, 0.027450980392156862), (0.5, 1.0))
    """
    if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
        return UNKNOWN_STATISTICS
    scale = 255 if inputs.dtype == torch.uint8 else 1
    # In chunks, because a float64 copy of CIFAR takes gigabytes; in two passes, because E[x²] - E[x]²
    # cancels.
    chunks = torch.split(inputs.reshape(*inputs.shape[:2], -1), 2048)
    count = inputs[:, 0].numel()
    mean = sum((chunk.double().sum((0, 2)) for chunk in chunks), torch.zeros(())) / count
    squares = sum(
        ((chunk.double() - mean[:, None]).square().sum((0, 2)) for chunk in chunks), torch.zeros(())
    )
    std = (squares / count).sqrt()
    std[std == 0] = scale
    return tuple((mean / scale).tolist()), tuple((std / scale).tolist())


def _check_labels(targets: Tensor, classes: int, part: str) -> None:
    if not len(targets):
        raise UserError(f"{part} is empty")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"expected labels 0 .. {classes - 1} for {classes} classes in {part}, got {low} .. {high}"
        )
