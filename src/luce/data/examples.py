"""Labelled rows: splits, settings with few labels, and the items that training reads."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from ..labels import IGNORED, UNLABELLED, has_label
from .dataset import Data, stratified
from .forms import class_indices
from .sources import as_source


class Examples(Dataset[dict[str, Any]]):
    """Rows of a dataset with their labels.

    An item is ``{"input": Tensor, "target": scalar LongTensor, "index": int}``. ``index`` is the position in
    ``source``. It stays the same through splits, shuffles and repeats, and stored teacher signals are looked
    up by it.

    Args:
        source: A map-style dataset of ``(input, label)``.
        indices: Rows of ``source``, in order, repeats allowed; shape ``(N,)``.
        targets: A class per entry of ``indices``, :data:`UNLABELLED`, or -100 in rows that losses skip; None
            uses the labels of the source.

    Raises:
        UserError: If there is no row, or an index is outside the source.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> pairs = TensorDataset(torch.arange(6.).reshape(3, 2), torch.tensor([0, 1, 1]))
        >>> Examples(pairs, [2, 0])[0]
        {'input': tensor([4., 5.]), 'target': tensor(1), 'index': 2}
    """

    def __init__(
        self,
        source: Dataset[Any],
        indices: Tensor | Sequence[int],
        targets: Tensor | Sequence[int] | None = None,
    ) -> None:
        self.source = as_source(source)
        self.indices = _row_numbers(indices)
        if not len(self.indices):
            raise UserError("expected at least one example, got none")
        low, high = int(self.indices.min()), int(self.indices.max())
        if low < 0 or high >= len(self.source):
            raise UserError(
                f"expected indices 0 .. {len(self.source) - 1} into the source, got {low} .. {high}"
            )
        if targets is None:
            targets = self.source.targets[self.indices]
        self.targets = class_indices(targets, "`targets`")
        if self.targets.shape != self.indices.shape:
            raise UserError(f"expected {len(self.indices)} targets like `indices`, got {len(self.targets)}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> dict[str, Any]:
        index = int(self.indices[row])
        return {"input": self.source.read(index), "target": self.targets[row], "index": index}

    def __getitems__(self, rows: list[int]) -> LazyRows:
        return LazyRows(self, rows)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Read several rows at once: ``input`` ``(N, ...)``, ``target`` ``(N,)`` and ``index`` ``(N,)``."""
        at = torch.as_tensor(rows, dtype=torch.int64)
        indices = self.indices[at]
        return {"input": self.source.batch(indices), "target": self.targets[at], "index": indices}

    @property
    def plain(self) -> Examples:
        """The same rows without random transforms, for evaluation and stored teachers."""
        return Examples(self.source.plain, self.indices, self.targets)

    @property
    def random(self) -> bool:
        """Whether the source applies random transforms."""
        return self.source.plain is not self.source

    @property
    def labelled(self) -> Examples:
        """The rows that have a label."""
        rows = has_label(self.targets).nonzero().squeeze(1)
        if not len(rows):
            raise UserError(f"expected at least one example with a label, got none in {len(self)} rows")
        return self._at(rows)

    @property
    def counted(self) -> Examples:
        """The rows that losses do not skip."""
        rows = (self.targets != IGNORED).nonzero().squeeze(1)
        if not len(rows):
            raise UserError(
                f"expected training rows that count, got {IGNORED} as the label of all {len(self)}"
            )
        return self if len(rows) == len(self) else self._at(rows)

    def repeat_to(self, size: int) -> Examples:
        """Repeat the rows until there are ``size`` of them, so that epochs have equal numbers of steps."""
        if size < len(self):
            raise UserError(f"expected `size` to be at least the {len(self)} examples, got {size}")
        return self._at(torch.arange(size) % len(self))

    def _at(self, rows: Tensor) -> Examples:
        return Examples(self.source, self.indices[rows], self.targets[rows])


class LazyRows(Sequence[dict[str, Any]]):
    """A lazy list of rows of `Examples`.

    PyTorch's fetcher passes the result of ``__getitems__`` to ``collate_fn``. Any collate function can read
    this object as the list of samples that it expects; the one of `luce.data.loader` reads the whole batch in
    one indexing operation.
    """

    def __init__(self, examples: Examples, rows: list[int]) -> None:
        self.examples = examples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return LazyRows(self.examples, self.rows[position])
        return self.examples[self.rows[position]]

    def collated(self) -> dict[str, Tensor]:
        return self.examples.batch(self.rows)


def split(data: Data, *, validation: float | int, seed: int) -> tuple[Examples, Examples, Examples]:
    """Split data into training, validation and test examples.

    Validation is a stratified part of ``data.train`` for the choice of epochs and settings, so that test rows
    are used once, at the end. Its rows have no random transforms.

    Args:
        data: From :func:`luce.data.load` or :func:`luce.data.from_datasets`.
        validation: Share of the training rows in (0, 1), or their number.
        seed: Seed of the split, in ``0 .. 2**32 - 1``.

    Raises:
        UserError: If ``validation`` is out of range, or a class is missing on either side.

    Example:
        >>> from luce import data
        >>> parts = split(data.load("sklearn:iris"), validation=12, seed=0)
        >>> [len(part) for part in parts]
        [100, 12, 38]
    """
    if isinstance(validation, float) and not 0 < validation < 1:
        raise UserError(
            f"expected `validation` to be a share in (0, 1) or a number of rows, got {validation}"
        )
    source, test = as_source(data.train), as_source(data.test)
    kept, held_out = stratified(source.targets, validation, checked_seed(seed))
    return (
        Examples(source, kept),
        Examples(source, held_out).plain,
        Examples(test, torch.arange(len(test))),
    )


def hold_out(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Hold out a stratified share of the labelled rows; return the other rows and the held-out ones.

    The held-out rows have no random transforms.

    Args:
        examples: Training rows.
        share: Share of the labelled rows, in (0, 1).
        seed: Seed of the split, in ``0 .. 2**32 - 1``.

    Raises:
        UserError: If a class is missing on either side.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> pairs = TensorDataset(torch.rand(10, 2), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, -1, -1]))
        >>> kept, held = hold_out(Examples(pairs, range(10)), 0.25, seed=0)
        >>> sorted(kept.targets.tolist()), sorted(held.targets.tolist())
        ([-1, -1, 0, 0, 0, 1, 1, 1], [0, 1])
    """
    if not (isinstance(share, Real) and 0 < share < 1):
        raise UserError(f"expected a share in (0, 1) of the labelled rows to hold out, got {share!r}")
    kept, held = stratified(examples.targets, float(share), checked_seed(seed))
    return examples._at(kept), examples._at(held).plain


def keep_labels(examples: Examples, per_class: int, seed: int) -> Examples:
    """Keep ``per_class`` labels of each class, and set all others to :data:`UNLABELLED`; -100 stays.

    Raises:
        UserError: If a class has fewer labels than that.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> pairs = TensorDataset(torch.rand(10, 2), torch.arange(10) % 2)
        >>> few = keep_labels(Examples(pairs, range(10)), per_class=2, seed=0)
        >>> len(few), few.labelled.targets.bincount().tolist()
        (10, [2, 2])
    """
    if per_class < 1:
        raise UserError(f"expected `per_class` to be at least 1, got {per_class}")
    random = np.random.default_rng(checked_seed(seed))
    targets = examples.targets.masked_fill(examples.targets != IGNORED, UNLABELLED)
    for label in torch.unique(examples.labelled.targets).tolist():
        rows = (examples.targets == label).nonzero().squeeze(1)
        if len(rows) < per_class:
            raise UserError(
                f"expected at least {per_class} labels of each class, class {label} has {len(rows)}"
            )
        targets[rows[torch.from_numpy(random.permutation(len(rows))[:per_class])]] = label
    return Examples(examples.source, examples.indices, targets)


def _row_numbers(indices: Tensor | Sequence[int]) -> Tensor:
    numbers = torch.as_tensor(indices)
    if numbers.dtype == torch.bool or (numbers.is_floating_point() and len(numbers)):
        raise UserError(
            f"expected the numbers of rows as `indices`, got {numbers.dtype}; for a mask they are "
            "`mask.nonzero().squeeze(1)`"
        )
    return numbers.long()


def checked_seed(seed: int) -> int:
    """Return ``seed``, or raise UserError if NumPy and scikit-learn would not accept it."""
    if not 0 <= seed < 2**32:
        raise UserError(f"expected `seed` to be an integer in 0 .. 2**32 - 1, got {seed}")
    return seed
