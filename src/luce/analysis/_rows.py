"""Checks of the tensors that the analyses take."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks


def check_matrix(name: str, logits: Tensor) -> None:
    """Check that ``logits`` is a floating ``(N, C)`` tensor with at least one row and two classes.

    Raises:
        TypeError: If it is not a tensor or not floating.
        ValueError: If its shape is wrong.
    """
    checks.check_logits(name, logits)
    if logits.ndim != 2 or not len(logits) or logits.shape[1] < 2:
        raise ValueError(
            f"expected `{name}` of shape (N, C) with at least 1 row and 2 classes, got {tuple(logits.shape)}"
        )


def check_finite(name: str, logits: Tensor) -> None:
    """Check as `check_matrix` does, and that every logit is finite."""
    check_matrix(name, logits)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"expected finite `{name}`, got NaN or an infinity")


def check_same_shape(name: str, logits: Tensor, like_name: str, like: Tensor) -> None:
    """Check that ``logits`` has the shape of ``like``."""
    if logits.shape != like.shape:
        raise ValueError(
            f"expected `{name}` of shape {tuple(like.shape)} like `{like_name}`, got {tuple(logits.shape)}"
        )


def check_temperature(temperature: float) -> None:
    checks.check_positive(temperature=temperature)
