"""Suffix log-sum-exp in plain PyTorch: the oracle, the baseline and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor


def suffix_logsumexp(x: Tensor) -> Tensor:
    r"""Return the log-sum-exp of every suffix: :math:`\phi_k = \log \sum_{l \ge k} e^{x_l}`.

    Accurate for any spread of finite values: each sum carries its own scale, where one maximum for the whole
    row would let every suffix far below it underflow to :math:`\log 0`. A suffix with all entries at ``-inf``
    is ``-inf`` and has a zero gradient.

    Args:
        x: Shape ``(..., L)``, float32, float64 or bfloat16: float16 has too small a range.
    Returns:
        Shape ``(..., L)``.
    Example:
        >>> suffix_logsumexp(torch.tensor([120.0, 0.0, 0.0]))
        tensor([120.0000,   0.6931,   0.0000])
    """
    lowest = torch.finfo(x.dtype).min / 4  # finite: the gradient of logcumsumexp is NaN for -inf
    phi = x.clamp(min=lowest).flip(-1).logcumsumexp(-1)
    if phi.requires_grad and not torch.compiler.is_compiling():
        phi.register_hook(_constant_zeros)
    phi = phi.flip(-1)
    return phi.masked_fill(phi <= lowest / 2, -torch.inf)


def _constant_zeros(slope: Tensor) -> Tensor | None:
    """Cut zero slopes off the graph: the gradient of logcumsumexp takes the logarithm of a slope."""
    return slope.masked_fill(slope == 0, 0) if torch.is_grad_enabled() else None


def suffix_rows(x: Tensor) -> Tensor:
    """`suffix_logsumexp` of any floating dtype: 16-bit numbers are converted to float32 and rounded once."""
    return suffix_logsumexp(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
