"""Sources of rows: tensors in memory, images read on demand, and wrapped datasets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from .. import log
from ..errors import UserError, one_line
from .forms import as_tensor, class_index, class_indices, count_rows, pair_of

if TYPE_CHECKING:
    from PIL import Image

LOOKS = 16
"""Items that are compared with `targets` at once; all others are when they are read."""
MANY = 1000
"""Items whose reading for their labels is announced."""


class Source(Dataset[tuple[Tensor, int]]):
    """A map-style dataset of ``(input, label)`` whose labels are known without reading inputs.

    Attributes:
        targets: Class of every row, int64, shape ``(N,)``.
    """

    targets: Tensor

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """Read the input of one row, without a batch dimension."""

    def batch(self, indices: Tensor) -> Tensor:
        """Read the inputs of several rows, shape ``(len(indices), ...)``.

        Raises:
            UserError: If their shapes or dtypes differ, or one is not finite.
        """
        rows = [self.read(i) for i in indices.tolist()]
        for index, row in zip(indices.tolist(), rows, strict=True):
            if row.shape != rows[0].shape or row.dtype != rows[0].dtype:
                raise UserError(
                    f"expected inputs of one shape and dtype, row {int(indices[0])} has "
                    f"{tuple(rows[0].shape)} of {rows[0].dtype} and row {index} {tuple(row.shape)} of "
                    f"{row.dtype}; resize, pad or convert them in the dataset"
                )
        inputs = torch.stack(rows)
        check_finite(inputs, indices)
        return inputs

    @property
    def plain(self) -> Source:
        """The same rows without random transforms, for validation and stored teachers."""
        return self

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(index), int(self.targets[index])


class InMemory(Source):
    """Rows in one tensor, so that a batch is one indexing operation.

    uint8 stays uint8 (a quarter of the memory) and is converted to float32 in [0, 1] when read; float64 is
    stored as float32; other dtypes, such as token ids, are returned unchanged.

    Args:
        inputs: Shape ``(N, ...)``, a tensor or an array.
        targets: Class of every row, shape ``(N,)`` or ``(N, 1)``.

    Raises:
        UserError: If there is not one label per input, a label is no class index, or an input not finite.

    Example:
        >>> image, label = InMemory(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), torch.tensor([3]))[0]
        >>> image.tolist(), label
        ([[[0.0, 1.0]]], 3)
    """

    def __init__(self, inputs: Any, targets: Any) -> None:
        inputs, self.targets = as_tensor(inputs, "the inputs"), class_indices(targets)
        if inputs.ndim < 2 or 0 in inputs.shape[1:]:
            raise UserError(
                f"expected inputs of shape (N, ...), with values in each row, got {tuple(inputs.shape)}; one "
                "value per row needs a dimension of its own: `inputs.unsqueeze(1)`"
            )
        if len(inputs) != len(self.targets):
            raise UserError(
                f"expected one label per input, got {len(inputs)} inputs and {len(self.targets)} labels"
            )
        self.inputs = inputs.float() if inputs.dtype == torch.float64 else inputs
        check_finite(self.inputs)

    def read(self, index: int) -> Tensor:
        return as_input(self.inputs[index])

    def batch(self, indices: Tensor) -> Tensor:
        return as_input(self.inputs.index_select(0, indices))


class LazyImages(Source):
    """Images opened on demand.

    Args:
        open_image: From the index of a row to its RGB image.
        targets: Class of every row, shape ``(N,)``.
        transform: From an image to the input tensor; may be random.
        plain_transform: Deterministic replacement, required if ``transform`` is random.
        files: A folder, and the names in it of the files of all rows in order; None if rows are no files.
    """

    def __init__(
        self,
        open_image: Callable[[int], Image.Image],
        targets: Tensor,
        transform: Callable[[Image.Image], Tensor],
        plain_transform: Callable[[Image.Image], Tensor] | None = None,
        *,
        files: tuple[Path, np.ndarray] | None = None,
    ) -> None:
        self.open_image = open_image
        self.targets = targets
        self.transform = transform
        self.plain_transform = plain_transform
        self.files = files

    def read(self, index: int) -> Tensor:
        return self.transform(self.open_image(index))

    @property
    def plain(self) -> Source:
        if self.plain_transform is None:
            return self
        return LazyImages(self.open_image, self.targets, self.plain_transform, files=self.files)


class Wrapped(Source):
    """A wrapped map-style dataset with items ``(input, label)`` or dicts of ``input`` and ``target``.

    Labels come from the dataset's ``targets`` if it has them; otherwise every item is read once. A dataset
    may also change labels as it reads items, so each label that is read later is compared.

    Raises:
        UserError: If the dataset cannot be read, a label is no class index, or ``targets`` differ from the
            labels of the items.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.rows = rows = count_rows(dataset)
        self.dataset = dataset
        labels = getattr(dataset, "targets", None)
        # With torchvision's `target_transform`, `targets` differs from the labels of the items.
        self.stated = (
            labels is not None and not callable(labels) and getattr(dataset, "target_transform", None) is None
        )
        if not self.stated:
            if rows >= MANY:
                log.info(
                    f"{self.kind} has no `targets`: all {rows} items are read once for their labels, which "
                    "takes time if reading an item does"
                )
            self.targets = torch.tensor([self._item(i)[1] for i in range(rows)], dtype=torch.int64)
            return
        self.targets = class_indices(labels, f"the `targets` of {self.kind}")
        if len(self.targets) != rows:
            raise UserError(
                f"expected `targets` of {self.kind} with a label for each of its {rows} items, got "
                f"{len(self.targets)}; make them agree, or remove the attribute `targets`"
            )
        for index in sorted({i * (rows - 1) // (LOOKS - 1) for i in range(LOOKS)} if rows else ()):
            self._compare(index, self._item(index)[1])

    @property
    def kind(self) -> str:
        """The name of the dataset in errors."""
        return f"the dataset `{type(self.dataset).__name__}`"

    def read(self, index: int) -> Tensor:
        value, label = self._item(index)
        self._compare(index, label)
        return as_input(as_tensor(value, f"the input of item {index}"))

    def _item(self, index: int) -> tuple[Any, int]:
        try:
            item = self.dataset[index]
        except UserError:
            raise
        except Exception as error:  # of the user's own code: anything
            way = "; make `__len__` and `__getitem__` agree" if isinstance(error, IndexError) else ""
            raise UserError(
                f"cannot read item {index} of {self.kind} with {self.rows} items, whose code raised "
                f"{type(error).__name__}: {one_line(error)}{way}"
            ) from error
        value, label = pair_of(item, index)
        return value, class_index(label, f"the label of item {index}")

    def _compare(self, index: int, label: int) -> None:
        expected = int(self.targets[index])
        if label == expected:
            return
        if self.stated:
            raise UserError(
                f"expected item {index} of {self.kind} to have the label {expected} that its `targets` "
                f"state, got {label}; make them agree, or remove the attribute `targets` to train on the "
                "labels of the items"
            )
        raise UserError(
            f"expected item {index} of {self.kind} to keep its label, which was {expected} when labels were "
            f"read and is now {label}; draw random labels once, when the dataset is made"
        )


class Part(Source):
    """A subset of another source, with indices from 0."""

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source = source
        self.indices = indices
        self.targets = source.targets[indices]

    def read(self, index: int) -> Tensor:
        return self.source.read(int(self.indices[index]))

    def batch(self, indices: Tensor) -> Tensor:
        return self.source.batch(self.indices[indices])

    @property
    def plain(self) -> Source:
        plain = self.source.plain
        return self if plain is self.source else Part(plain, self.indices)


def as_source(dataset: Any) -> Source:
    """Return a dataset as a source.

    Args:
        dataset: A source, which is returned unchanged; a ``TensorDataset`` of inputs and labels or a pair of
            arrays, which stay in memory; or another map-style dataset, which is wrapped.

    Raises:
        UserError: If it is something else, or its labels are no class indices.
    """
    if isinstance(dataset, Source):
        return dataset
    # A subclass may change labels as it reads items.
    if isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__:
        parts: Any = dataset.tensors
    elif isinstance(dataset, tuple | list) and dataset and hasattr(dataset[0], "__array__"):
        parts = dataset
    else:
        return Wrapped(dataset)
    if len(parts) != 2:
        raise UserError(f"expected a pair of arrays, (inputs, labels), got {len(parts)} arrays")
    return InMemory(*parts)


def as_input(values: Tensor) -> Tensor:
    """Convert uint8 to float32 in [0, 1] and float64 to float32; return other dtypes unchanged."""
    if values.dtype == torch.uint8:
        return values.float().div_(255)
    return values.float() if values.dtype == torch.float64 else values


def check_finite(inputs: Tensor, rows: Tensor | None = None) -> None:
    """Raise UserError if an input holds NaN or infinity, with its row: of ``rows``, else its position."""
    if not inputs.is_floating_point() or bool(inputs.sum(dtype=torch.float32).isfinite()):
        return  # a sum over finite values may overflow, but one over others is never finite
    for position, row in enumerate(inputs):
        if not bool(row.isfinite().all()):
            bad = row[~row.isfinite()][0]
            index = position if rows is None else int(rows[position])
            raise UserError(
                f"expected finite inputs, row {index} holds {bad:g}; remove the row, or fill in its missing "
                "values"
            )
