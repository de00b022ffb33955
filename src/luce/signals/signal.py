"""What a teacher said about a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class DenseSignal:
    """The logit of every class, ``(N, C)``, without gradient."""

    logits: Tensor


Signal: TypeAlias = DenseSignal
"""Any answer a method may get; truncated and label-only answers will join it as a union."""
