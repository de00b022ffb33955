"""Plain PyTorch: the oracle, the baseline and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Sixteen-bit numbers are data; their exponentials and sums need at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softmax_rows(x: Tensor) -> Tensor:
    r""":math:`e^{x_i} / \sum_j e^{x_j}` over dimension 1, each row's largest exponential being 1."""
    e = (wide(x) - wide(x).amax(1, keepdim=True)).exp()
    return (e / e.sum(1, keepdim=True)).to(x.dtype)


def log_softmax_rows(x: Tensor) -> Tensor:
    r""":math:`x_i - \log \sum_j e^{x_j}` over dimension 1."""
    d = wide(x) - wide(x).amax(1, keepdim=True)
    return (d - d.exp().sum(1, keepdim=True).log()).to(x.dtype)
