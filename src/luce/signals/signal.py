"""What a teacher said about a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class DenseSignal:
    """The logit of every class, ``(N, C)``, without gradient.

    Attributes:
        logits: About the batch's ``input``.
        strong: What the teacher said about its ``strong`` view; None if there is none.
    """

    logits: Tensor
    strong: DenseSignal | None = None


Signal: TypeAlias = DenseSignal
"""Any answer a method may get; truncated and label-only answers will join it as a union."""
