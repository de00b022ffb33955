"""What a teacher said about a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class DenseSignal:
    """What a network said, without gradient.

    Attributes:
        logits: Of every class, ``(N, C)``, about the batch's ``input``.
        features: By path, of the modules that are watched; see `luce.signals.Teacher.watched`.
        strong: What the teacher said about the batch's ``strong`` view; None if there is none.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    strong: DenseSignal | None = None


Signal: TypeAlias = DenseSignal
"""Any answer a method may get; truncated and label-only answers will join it as a union."""
