"""Softmax in plain PyTorch: the oracle, the baseline and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Convert 16-bit numbers to float32, which their exponentials and sums need at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softmax_rows(x: Tensor) -> Tensor:
    r"""Return :math:`e^{x_i} / \sum_j e^{x_j}` over dimension 1."""
    # Relative to the maximum, exponentials are at most 1 and cannot overflow.
    e = (wide(x) - wide(x).amax(1, keepdim=True)).exp()
    return (e / e.sum(1, keepdim=True)).to(x.dtype)


def log_softmax_rows(x: Tensor) -> Tensor:
    r"""Return :math:`x_i - \log \sum_j e^{x_j}` over dimension 1."""
    d = wide(x) - wide(x).amax(1, keepdim=True)
    return (d - d.exp().sum(1, keepdim=True).log()).to(x.dtype)
