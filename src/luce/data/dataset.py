"""`Data`, which every loader returns, and the wrapper for your own datasets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import log
from ..errors import UserError, listed
from ..labels import IGNORED, UNLABELLED, has_label
from .forms import NUMBERED, check_same_classes, stated_classes
from .images import check_arrays
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
        UserError: If a split is empty, no row of it has a label, or a label is neither in
            ``0 .. len(classes) - 1`` nor -1 (unlabelled) or -100 (ignored).
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
            source, name = as_source(getattr(self, part)), f"the {part} part of `{self.name}`"
            object.__setattr__(self, part, source)
            missing = _missing(source.targets, self.classes, name)
            if missing and part == "train":
                log.warning(f"{missing}; check the numbers of the classes, which begin at 0")
            elif missing:
                log.info(missing)
            check_arrays(source, name)


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
    names = _numbered(train.targets) if classes is None else _class_names(classes)
    mean, std = UNKNOWN_STATISTICS
    if isinstance(train, InMemory):
        mean, std = channel_statistics(train.inputs)
    elif isinstance(train, LazyImages):
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    shape = tuple(_same_form(train, test).shape)
    return Data(name, train, test, names, shape, mean, std, licence, tokenizer)


def _same_form(train: Source, test: Source) -> Tensor:
    """Return the first training row if the first test row is like it; images may differ in size."""
    first = train.plain.read(0)
    other = test.plain.read(0) if len(test) else first
    size = -2 if first.ndim == 3 else first.ndim
    if first.is_floating_point() != other.is_floating_point() or (
        first.is_floating_point() and (first.ndim, first.shape[:size]) != (other.ndim, other.shape[:size])
    ):
        raise UserError(
            f"expected test rows like the training rows, {first.dtype} of shape {tuple(first.shape)}, got "
            f"{other.dtype} of shape {tuple(other.shape)}"
        )
    return first


def say_rows(data: Data, *remarks: str) -> Data:
    """Tell how many rows and classes were read, of data that is no fixed collection; return the data."""
    train, test = len(as_source(data.train)), len(as_source(data.test))
    counts = f"{train} training rows, {test} test rows, {len(data.classes)} classes"
    log.info("; ".join([f"`{data.name}`: {counts}", *remarks]))
    return data


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
    if test is train:
        log.warning("`test` is `train`: no row is held out for testing")
    named = stated_classes(train)
    check_same_classes(named, stated_classes(test), "`train` and `test`")
    if classes is None:
        classes = named or getattr(train, "classes", None)
    if not len(source):
        raise UserError("expected at least one row in `train`, got an empty dataset")
    if test is None:
        kept, held_out = stratified(source.targets, 0.25, seed=0)
        source, rest = _part(source, kept), _part(source, held_out)
    else:
        rest = as_source(test)
    data = describe("datasets", source, rest, classes=classes, licence="unknown", tokenizer=tokenizer)
    return say_rows(data)


def _numbered(targets: Tensor) -> tuple[str, ...]:
    """Name the classes by their numbers, 0 to the largest label."""
    labels = targets[has_label(targets)]
    classes = int(labels.max()) + 1 if len(labels) else 0
    if classes > len(labels):  # before names of 2**31 classes are made
        raise UserError(
            f"expected classes numbered 0 .. C-1, got {len(torch.unique(labels))} classes in {len(labels)} "
            f"labelled rows with labels up to {classes - 1}; {NUMBERED}"
        )
    return tuple(map(str, range(classes)))


def _class_names(classes: Any) -> tuple[str, ...]:
    if isinstance(classes, str | Mapping) or not isinstance(classes, Iterable):
        raise UserError(f"expected `classes` as a list of names, got {classes!r}")
    return tuple(map(str, classes))


def _part(source: Source, indices: Tensor) -> Source:
    if isinstance(source, InMemory):
        return InMemory(source.inputs[indices], source.targets[indices])
    return Part(source, indices)


def stratified(targets: Tensor, size: float | int, seed: int) -> tuple[Tensor, Tensor]:
    """Two sorted sets of rows, the second of ``size`` labelled ones, with the classes' shares kept.

    Args:
        targets: Labels; rows without one stay in the first set.
        size: A share of the labelled rows, or a count.
        seed: Of the draw.

    Raises:
        UserError: If a class would be missing from either.
    """
    from sklearn.model_selection import train_test_split

    rows = has_label(targets).nonzero().squeeze(1)
    labels = targets[rows]
    count = round(size * len(labels)) if isinstance(size, float) else size
    rows_of_class = torch.unique(labels, return_counts=True)[1]
    classes = len(rows_of_class)
    if not classes:
        raise UserError(f"expected labelled rows to hold out from, got none in {len(targets)} rows")
    if classes <= count <= len(labels) - classes and int(rows_of_class.min()) > 1:
        _, chosen = train_test_split(
            np.arange(len(labels)), test_size=count, stratify=labels.numpy(), random_state=seed
        )
        held_out = torch.zeros(len(targets), dtype=torch.bool)
        held_out[rows[torch.from_numpy(chosen)]] = True
        parts = (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)
        if all(len(torch.unique(targets[part][has_label(targets[part])])) == classes for part in parts):
            return parts
    raise UserError(
        f"cannot hold out {count} of {len(labels)} rows so that each of the {classes} classes is on both "
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


def _missing(targets: Tensor, classes: Sequence[str], part: str) -> str:
    """Refuse labels of no class; return a sentence that names the classes without rows, empty for none."""
    if not len(targets):
        raise UserError(f"{part} is empty")
    labels = torch.unique(targets)
    named = has_label(labels) & (labels < len(classes))
    if not bool((named | (labels == UNLABELLED) | (labels == IGNORED)).all()):
        raise UserError(
            f"expected labels 0 .. {len(classes) - 1} for {len(classes)} classes in {part}, got "
            f"{int(labels.min())} .. {int(labels.max())}; {NUMBERED}, or name all classes"
        )
    without = int((~has_label(targets)).sum())
    if without == len(targets):
        raise UserError(f"expected labels in {part}, got none in {without} rows; name another split")
    if without:
        log.info(f"{part}: {without} of {len(targets)} rows have no label; accuracy leaves them out")
    present = set(labels.tolist())
    missing = [f"`{name}` ({label})" for label, name in enumerate(classes) if label not in present]
    if not missing:
        return ""
    return f"{len(missing)} of {len(classes)} classes have no row in {part}: {listed(missing, 5)}"
