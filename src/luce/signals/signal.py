"""What a teacher said about a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

Kind: TypeAlias = Literal["logits", "probs", "topk", "label"]
"""What a teacher tells: logits, every class's probability, those of its best classes, or its best class."""


@dataclass(frozen=True)
class DenseSignal:
    """What a network said, without gradient.

    Attributes:
        logits: Of every class, ``(N, C)``, about the batch's ``input``.
        features: By path, of the modules that are watched; see `luce.signals.Teacher.record_features`.
        strong: What the teacher said about the batch's ``strong`` view; None if there is none.
        kind: What the teacher really told; unless ``"logits"``, the logits stand for that; see
            `luce.signals.BlackBox`.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    strong: DenseSignal | None = None
    kind: Kind = "logits"


Signal: TypeAlias = DenseSignal
"""Any answer a method may get; what was told of it is in its ``kind``."""
