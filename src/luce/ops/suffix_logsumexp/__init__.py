"""Log-sum-exp of every suffix of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engines import choose
from . import operator  # noqa: F401 (declares torch.ops.luce.suffix_logsumexp)
from .reference import suffix_rows

__all__ = ["suffix_logsumexp"]


def suffix_logsumexp(x: Tensor, backend: str = "auto") -> Tensor:
    r"""Return the log-sum-exp of every suffix along the last dimension.

    .. math:: \phi_k = \log \sum_{l \ge k} e^{x_l}

    Values and gradient are accurate for any spread of finite values: no suffix underflows or overflows,
    however far it is from the others. A suffix with all entries at ``-inf`` is ``-inf`` and has a zero
    gradient. A suffix that contains NaN is NaN, otherwise one that contains ``+inf`` is ``+inf``.

    Args:
        x: Shape ``(..., L)`` of any strides, float16, bfloat16, float32 or float64.
        backend: ``"auto"``, ``"cpu"``, ``"gpu"`` or ``"reference"``.
    Returns:
        Shape ``(..., L)``, dtype of `x`.
    Raises:
        TypeError: If `x` is not of a floating-point dtype.
        ValueError: If the backend does not exist.
        RuntimeError: If the named backend cannot run here.
    Example:
        >>> import torch
        >>> suffix_logsumexp(torch.tensor([120.0, 0.0, 0.0]))
        tensor([120.0000,   0.6931,   0.0000])

    References:
        Dukhan and Ablavatski, The Two-Pass Softmax Algorithm, 2020 (arXiv 2001.04438): separate exponents.
    """
    if not x.is_floating_point():
        raise TypeError(f"expected `x` of a floating-point dtype, got {x.dtype}; convert it first")
    if choose(backend, x, no_kernel=None) == "reference" or x.numel() == 0:
        return suffix_rows(x)
    values: Tensor = torch.ops.luce.suffix_logsumexp(x.reshape(-1, x.shape[-1] if x.ndim else 1))
    return values.reshape(x.shape)
