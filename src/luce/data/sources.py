"""Sources of rows: tensors in memory, images read on demand, and wrapped datasets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ..errors import UserError

if TYPE_CHECKING:
    from PIL import Image


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
        """Read the inputs of several rows, shape ``(len(indices), ...)``."""
        return torch.stack([self.read(i) for i in indices.tolist()])

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
        inputs: Shape ``(N, ...)``.
        targets: Class of every row, shape ``(N,)``.

    Example:
        >>> image, label = InMemory(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), torch.tensor([3]))[0]
        >>> image.tolist(), label
        ([[[0.0, 1.0]]], 3)
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise UserError(
                f"expected one label per input, got {len(inputs)} inputs and {len(targets)} labels"
            )
        self.inputs = inputs.float() if inputs.dtype == torch.float64 else inputs
        self.targets = _class_indices(targets)

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

    Labels come from the dataset's ``targets`` if it has them; otherwise every item is read once.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        labels = getattr(dataset, "targets", None)
        # With torchvision's `target_transform`, `targets` differs from the labels of the items.
        if labels is None or getattr(dataset, "target_transform", None) is not None:
            labels = [int(self._item(i)[1]) for i in range(len(dataset))]  # type: ignore[arg-type]
        self.targets = _class_indices(torch.as_tensor(labels))

    def read(self, index: int) -> Tensor:
        value = self._item(index)[0]
        if not isinstance(value, Tensor | np.ndarray):
            raise UserError(
                f"expected the input of item {index} to be a tensor or an array, got {type(value).__name__}; "
                "let the dataset's transform make it a tensor"
            )
        return as_input(torch.as_tensor(value))

    def _item(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        if isinstance(item, Mapping) and {"input", "target"} <= item.keys():
            return item["input"], item["target"]
        if isinstance(item, tuple | list) and len(item) == 2:
            return item[0], item[1]
        raise UserError(
            f"expected item {index} of the dataset to be (input, label) or a dict with `input` and `target`, "
            f"got {type(item).__name__}"
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


def as_source(dataset: Dataset[Any]) -> Source:
    """Return a dataset as a source: a source unchanged, a ``TensorDataset`` in memory, others wrapped."""
    if isinstance(dataset, Source):
        return dataset
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return InMemory(*dataset.tensors)
    return Wrapped(dataset)


def as_input(values: Tensor) -> Tensor:
    """Convert uint8 to float32 in [0, 1] and float64 to float32; return other dtypes unchanged."""
    if values.dtype == torch.uint8:
        return values.float().div_(255)
    return values.float() if values.dtype == torch.float64 else values


def _class_indices(targets: Tensor) -> Tensor:
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
        raise UserError(
            "expected labels to be class indices of shape (N,), "
            f"got {targets.dtype} of shape {tuple(targets.shape)}"
        )
    return targets.long()
