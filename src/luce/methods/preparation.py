"""Training that precedes the student's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def train_by_sgd(module: nn.Module, batches: Iterable[T], error: Callable[[T], Tensor], *, lr: float) -> None:
    """Minimise an error by SGD with Nesterov momentum 0.9, weight decay 5e-4 and a constant learning rate.

    Implements `luce.losses.modules.features.Train`, for feature losses that train a part before the student.

    Args:
        module: With the parameters to train.
        batches: One for each step.
        error: Of a batch, a scalar.
        lr: Learning rate.
    Example:
        >>> layer, batches = nn.Linear(1, 1, bias=False), [torch.ones(1, 1)] * 300
        >>> train_by_sgd(layer, batches, lambda x: (layer(x) - 2 * x).square().mean(), lr=0.01)
        >>> round(layer.weight.item(), 2)
        2.0
    """
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for batch in batches:
        with torch.enable_grad():
            value = error(batch)
            optimizer.zero_grad()
            value.backward()
        optimizer.step()
