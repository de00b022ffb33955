"""A network together with the normalisation of its own inputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from ..errors import UserError
from .network import logits_of
from .text import attends_to_padding

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes that layers compute in; 8-bit floats only store weights."""


class Classifier(nn.Module):
    """Raw inputs to logits: normalise, run the network, take its logits.

    Data is not normalised when loaded, so teacher and student can each use the normalisation that they were
    trained with. The network is unchanged under ``body``; its state dict has no keys of this wrapper. Inputs
    of a floating dtype are converted to that of the network's first weight; integers, such as token ids, are
    not.

    Args:
        body: From normalised inputs to logits, or to an object with ``.logits``.
        mean: Mean per channel (dimension 1 of a batch), or a single value.
        std: Positive standard deviation, likewise.

    Attributes:
        order: The class of the body behind each logit, ``(C,)``; None for the body's own order. Weights,
            feature paths and exported files keep that of the body.

    Example:
        >>> Classifier(nn.Flatten(), mean=[0.5], std=[0.5])(torch.tensor([[[0.0, 1.0]]]))
        tensor([[-1.,  1.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, body: nn.Module, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
    ) -> None:
        super().__init__()
        finite = all(map(math.isfinite, (*mean, *std)))
        if len(mean) != len(std) or not finite or not all(value > 0 for value in std):
            raise UserError(
                f"expected a finite `mean` and a positive `std` of equal length, "
                f"got {list(mean)} and {list(std)}"
            )
        if attends_to_padding(body):
            warnings.warn(
                f"{type(body).__name__} gets no attention mask and reads padding as text; pass it through "
                "`luce.models.mask_padding` first",
                stacklevel=2,
            )
        self.body = body
        # Not persistent: checkpoints of the body must load with or without this wrapper.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)
        self.normalises = any(mean) or any(value != 1 for value in std)
        # No buffer: an average of the weights would average these numbers too.
        self.order: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        logits = logits_of(self.body(self.normalised(inputs)))
        return logits if self.order is None else logits.index_select(1, self.order.to(logits.device))

    def normalised(self, inputs: Tensor) -> Tensor:
        """Return the inputs as the network receives them."""
        if self.normalises:
            along_channels = (-1, *[1] * (inputs.ndim - 2))
            inputs = (inputs - self.mean.view(along_channels)) / self.std.view(along_channels)
        dtype = next((p.dtype for p in self.body.parameters() if p.dtype in FLOATING), inputs.dtype)
        return inputs.to(dtype) if inputs.is_floating_point() else inputs

    @property
    def plain(self) -> nn.Module:
        """The network without ``torch.compile`` and ``DataParallel``, which rename its weights."""
        network: Any = self.body
        while isinstance(network, DataParallel) or hasattr(network, "_orig_mod"):
            network = network.module if isinstance(network, DataParallel) else network._orig_mod
        return cast(nn.Module, network)
