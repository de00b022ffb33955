"""Log-sum-exp of every suffix of a row."""

from __future__ import annotations

from torch import Tensor

from ..engines import choose
from . import cpu
from .plain import suffix_rows

__all__ = ["suffix_logsumexp"]


def suffix_logsumexp(x: Tensor, backend: str = "auto") -> Tensor:
    r"""Log-sum-exp of every suffix: :math:`\phi_k = \log \sum_{l \ge k} e^{x_l}` along the last dimension.

    Safe for any spread of finite values, values and gradient: no suffix under- or overflows however far it
    is from the others. A suffix of nothing but ``-inf`` is ``-inf`` and has a zero gradient; one that holds
    NaN or, failing that, ``+inf`` is just this.

    Args:
        x: Shape ``(..., L)`` of any strides, float16, bfloat16, float32 or float64.
        backend: ``"auto"``, ``"cpu"``, ``"gpu"`` or ``"reference"``.
    Returns:
        Shape ``(..., L)``, dtype of `x`.
    Raises:
        TypeError: If `x` holds no floating-point numbers.
        ValueError: If there is no such backend.
        RuntimeError: If the named backend cannot run here.
    Example:
        >>> import torch
        >>> suffix_logsumexp(torch.tensor([120.0, 0.0, 0.0]))
        tensor([120.0000,   0.6931,   0.0000])

    References:
        Dukhan and Ablavatski, The Two-Pass Softmax Algorithm, 2020 (arXiv 2001.04438): exponents kept apart.
    """
    if not x.is_floating_point():
        raise TypeError(f"expected `x` of a floating-point dtype, got {x.dtype}; convert it first")
    if choose(backend, x, no_kernel=None) == "reference" or x.numel() == 0:
        return suffix_rows(x)
    return cpu.suffix_logsumexp(x.reshape(-1, x.shape[-1] if x.ndim else 1)).reshape(x.shape)
