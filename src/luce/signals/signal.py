"""A teacher's answer to a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

Kind: TypeAlias = Literal["logits", "probs", "topk", "label"]
"""Form of a teacher's answer: logits, all probabilities, those of the best classes, or the best class."""


@dataclass(frozen=True)
class DenseSignal:
    """Logits of every class, and features where they are recorded; none of them carries a gradient.

    Attributes:
        logits: For the batch's ``input``, ``(N, C)``.
        features: Recorded features by module path; see `luce.signals.Teacher.record_features`.
        strong: Answer to the batch's ``strong`` view; None without one.
        kind: Form of the answer before it was converted to logits; see `luce.signals.BlackBox`.
        learning: Whether the network that answered is being trained itself and may know nothing yet.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    strong: DenseSignal | None = None
    kind: Kind = "logits"
    learning: bool = False


Signal: TypeAlias = DenseSignal
"""Any answer that a method may receive."""
