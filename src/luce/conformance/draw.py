"""Examples for the laws, drawn by hypothesis, which shrinks a counter-example to a small one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import import_optional

T = TypeVar("T")

UNIT = 8
"""Logits are multiples of 1/8: adding a constant is then exact, and no two logits nearly tie."""
HIGHEST = 24
"""The largest logit, in units: exp(3) keeps every probability far from rounding to 0 or 1."""


@dataclass(frozen=True)
class Batch:
    """Logits ``(N, C)`` of student and teacher, and labels ``(N,)``."""

    student: Tensor
    teacher: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    @property
    def classes(self) -> int:
        return self.student.shape[1]

    def rows(self, chosen: Any) -> Batch:
        """The rows that an index, a slice or a mask selects."""
        return Batch(self.student[chosen], self.teacher[chosen], self.target[chosen])

    def to(self, dtype: torch.dtype) -> Batch:
        """The same batch with logits of another dtype."""
        return Batch(self.student.to(dtype), self.teacher.to(dtype), self.target)


class Draw:
    """Draws the inputs of a law and records them.

    Args:
        data: Hypothesis' ``st.data()``.
        dtype: Dtype of the logits.

    Attributes:
        record: The drawn values by name: the counter-example, if the law is broken.
    """

    def __init__(self, data: Any, dtype: torch.dtype) -> None:
        self._data = data
        self._dtype = dtype
        self._strategies: Any = import_optional("hypothesis.strategies", "check")
        self.record: dict[str, Any] = {}

    def note(self, **values: Any) -> None:
        """Add values to the record."""
        self.record |= {k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()}

    def _draw(self, strategy: Any) -> Any:
        return self._data.draw(strategy)

    def integer(self, low: int, high: int) -> int:
        """An integer in ``[low, high]``."""
        drawn: int = self._draw(self._strategies.integers(low, high))
        return drawn

    def choice(self, options: Sequence[T]) -> T:
        """One of the options; hypothesis shrinks towards the first."""
        drawn: T = self._draw(self._strategies.sampled_from(options))
        return drawn

    def permutation(self, count: int) -> Tensor:
        """A permutation of ``0 .. count - 1``."""
        return torch.tensor(self._draw(self._strategies.permutations(range(count))))

    def _logits(self, rows: int, classes: int) -> Tensor:
        logit, count = self._strategies.integers(-HIGHEST, HIGHEST), rows * classes
        drawn = self._draw(self._strategies.lists(logit, min_size=count, max_size=count, unique=True))
        return torch.tensor(drawn, dtype=self._dtype).reshape(rows, classes) / UNIT

    def batch(self, rows: tuple[int, int] = (1, 3), classes: tuple[int, int] = (2, 5)) -> Batch:
        """A batch of small logits; no two of one network tie, as losses may treat ties differently."""
        count, width = self.integer(*rows), self.integer(*classes)
        student, teacher = self._logits(count, width), self._logits(count, width)
        target = [self.integer(0, width - 1) for _ in range(count)]
        batch = Batch(student, teacher, torch.tensor(target))
        self.note(student_logits=batch.student, teacher_logits=batch.teacher, target=batch.target)
        return batch

    def normal_batch(self, rows: int, classes: int) -> Batch:
        """A larger batch of normally distributed logits; only its seed is drawn and recorded."""
        seed = self.integer(0, 999)
        self.note(seed=seed, rows=rows, classes=classes)
        random = torch.Generator().manual_seed(seed)
        student, teacher = torch.randn(2, rows, classes, generator=random, dtype=torch.float64)
        return Batch(student, teacher, torch.randint(classes, (rows,), generator=random))
