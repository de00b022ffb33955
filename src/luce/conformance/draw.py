"""Examples for the laws, drawn by hypothesis so that a counter-example shrinks to a small one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import import_optional

T = TypeVar("T")

# Logits are drawn as multiples of 1/8, so that adding a constant is exact and no two nearly tie.
UNIT = 8
HIGHEST = 24


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
        return Batch(self.student[chosen], self.teacher[chosen], self.target[chosen])

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(self.student.to(dtype), self.teacher.to(dtype), self.target)


class Draw:
    """What a law asks for, and a record of what it got.

    Args:
        data: Hypothesis' ``st.data()``.
        dtype: Of the logits.
    """

    def __init__(self, data: Any, dtype: torch.dtype) -> None:
        self._data = data
        self._dtype = dtype
        self._strategies: Any = import_optional("hypothesis.strategies", "check")
        self.record: dict[str, Any] = {}

    def note(self, **values: Any) -> None:
        """Part of the counter-example, if this becomes one."""
        self.record |= {k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()}

    def _draw(self, strategy: Any) -> Any:
        return self._data.draw(strategy)

    def integer(self, low: int, high: int) -> int:
        drawn: int = self._draw(self._strategies.integers(low, high))
        return drawn

    def choice(self, options: Sequence[T]) -> T:
        drawn: T = self._draw(self._strategies.sampled_from(options))
        return drawn

    def permutation(self, count: int) -> Tensor:
        return torch.tensor(self._draw(self._strategies.permutations(range(count))))

    def _logits(self, rows: int, classes: int) -> Tensor:
        logit, count = self._strategies.integers(-HIGHEST, HIGHEST), rows * classes
        drawn = self._draw(self._strategies.lists(logit, min_size=count, max_size=count, unique=True))
        return torch.tensor(drawn, dtype=self._dtype).reshape(rows, classes) / UNIT

    def batch(self, rows: tuple[int, int] = (1, 3), classes: tuple[int, int] = (2, 5)) -> Batch:
        """Small logits, those of a network all different: what happens at ties is up to the loss."""
        count, width = self.integer(*rows), self.integer(*classes)
        student, teacher = self._logits(count, width), self._logits(count, width)
        target = [self.integer(0, width - 1) for _ in range(count)]
        batch = Batch(student, teacher, torch.tensor(target))
        self.note(student_logits=batch.student, teacher_logits=batch.teacher, target=batch.target)
        return batch

    def many(self, rows: int, classes: int) -> Batch:
        """A larger batch of normally distributed logits; only its seed is drawn and noted."""
        seed = self.integer(0, 999)
        self.note(seed=seed, rows=rows, classes=classes)
        random = torch.Generator().manual_seed(seed)
        student, teacher = torch.randn(2, rows, classes, generator=random, dtype=torch.float64)
        return Batch(student, teacher, torch.randint(classes, (rows,), generator=random))
