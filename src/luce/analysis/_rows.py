"""What every analysis asks of the tensors it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks


def check_matrix(name: str, logits: Tensor) -> None:
    """A floating ``(N, C)`` tensor of at least one row and two classes.

    Raises:
        TypeError: If it is no tensor, or of another dtype.
        ValueError: If it has another shape.
    """
    checks.check_logits(name, logits)
    if logits.ndim != 2 or not len(logits) or logits.shape[1] < 2:
        raise ValueError(
            f"expected `{name}` of shape (N, C) with rows and at least 2 classes, got {tuple(logits.shape)}"
        )


def finite_logits(name: str, logits: Tensor) -> None:
    """As `check_matrix`, and every logit a finite number."""
    check_matrix(name, logits)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"expected finite `{name}`, got NaN or an infinity")


def check_twin(name: str, logits: Tensor, like_name: str, like: Tensor) -> None:
    """Of the same shape as its like."""
    if logits.shape != like.shape:
        raise ValueError(
            f"expected `{name}` of shape {tuple(like.shape)} like `{like_name}`, got {tuple(logits.shape)}"
        )


def check_temperature(temperature: float) -> None:
    checks.check_positive(temperature=temperature)
