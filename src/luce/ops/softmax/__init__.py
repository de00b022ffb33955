"""Softmax and log-softmax over any dimension, by several algorithms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..engines import choose
from . import operator
from .reference import log_softmax_rows, softmax_rows

__all__ = ["ALGORITHMS", "log_softmax", "softmax"]

ALGORITHMS = ("auto", "two_pass", "two_pass_lazy", "three_pass_recompute", "three_pass_reload", "online")
"""The values of `algorithm`; the reference has only one."""

_PLACE = {name: place for place, name in enumerate(ALGORITHMS)}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def softmax(x: Tensor, dim: int = -1, *, algorithm: str = "auto", backend: str = "auto") -> Tensor:
    r"""Softmax over one dimension, by a choice of algorithms.

    .. math:: y_i = e^{x_i} / \sum_j e^{x_j}

    Sums are kept in double precision; 16-bit rows are rounded once, at the end. A class at ``-inf`` gets
    exactly 0 and does not affect the others. A row is NaN if it contains NaN or ``+inf``, or if all its
    classes are at ``-inf``. Results below the smallest normal number (1.2e-38; 2.2e-308 in float64) may be 0.

    The algorithms differ in speed and in the last digits:

    - ``"three_pass_reload"``: maximum; exponentials, stored; scaling. The fastest inside the cache.
    - ``"three_pass_recompute"``: maximum; sum; exponentials computed again.
    - ``"online"``: maximum and sum block by block, so that memory is read twice instead of three times.
    - ``"two_pass"``: the Two-Pass Softmax. It needs no maximum: each exponential is a mantissa with its own
      exponent, accurate to 2 units in the last place (2.3 without fused multiply-add). Rows whose largest
      value is beyond ±90000 (±11000 in float64) use ``"three_pass_recompute"``.
    - ``"two_pass_lazy"``: the same, but the exponent of the sum moves only before a term would overflow. The
      fastest outside the cache.
    - ``"auto"``: chosen by length and dtype.

    The first three take exponentials of :math:`x_i - \max x`. The rounding of this difference shows in
    classes far below the largest: up to 4e-6 of their value in float32. The two-pass algorithms avoid it, but
    their largest probability can be 1.0000001.

    Args:
        x: Logits of any shape, in nats; float32, float64, bfloat16 or float16. Rows are read in place if the
            dimensions on either side of `dim` can each be viewed as one, as in contiguous and channels-last
            tensors.
        dim: The dimension of the classes.
        algorithm: One of `ALGORITHMS`; the reference ignores it.
        backend: ``"auto"``, ``"cpu"`` or ``"reference"``.
    Returns:
        Probabilities in the shape and dtype of `x`.
    Raises:
        TypeError: If `x` is not a tensor of one of these dtypes.
        ValueError: If the dimension, algorithm or backend does not exist.
        RuntimeError: If the named backend cannot run here.
    Example:
        >>> import math, torch
        >>> from luce.ops.softmax import softmax
        >>> softmax(torch.tensor([[0.0, math.log(3.0), -math.inf]]))
        tensor([[0.2500, 0.7500, 0.0000]])
        >>> softmax(torch.zeros(2, 4), dim=0, algorithm="two_pass")
        tensor([[0.5000, 0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000, 0.5000]])

    References:
        Dukhan and Ablavatski, The Two-Pass Softmax Algorithm, 2020 (arXiv 2001.04438).
        Milakov and Gimelshein, Online normalizer calculation for softmax, 2018 (arXiv 1805.02867).
    """
    return _softmax(x, dim, algorithm, backend, False)


def log_softmax(x: Tensor, dim: int = -1, *, algorithm: str = "auto", backend: str = "auto") -> Tensor:
    r"""Logarithm of `softmax` over one dimension, by a choice of algorithms.

    .. math:: y_i = x_i - \log \sum_j e^{x_j}

    NaN, infinities and the algorithms are treated as in `softmax`, with two differences: a class at ``-inf``
    stays at ``-inf``, and ``"three_pass_reload"`` stores no exponentials. In float32 the logarithm of a
    probability near 1 has an absolute error of up to 5e-7 with the two-pass algorithms; the others keep its
    relative precision.

    Args:
        x: Logits of any shape, in nats; float32, float64, bfloat16 or float16.
        dim: The dimension of the classes.
        algorithm: One of `ALGORITHMS`; the reference ignores it.
        backend: ``"auto"``, ``"cpu"`` or ``"reference"``.
    Returns:
        Log-probabilities in nats, at most 0 up to rounding, in the shape and dtype of `x`.
    Raises:
        TypeError: If `x` is not a tensor of one of these dtypes.
        ValueError: If the dimension, algorithm or backend does not exist.
        RuntimeError: If the named backend cannot run here.
    Example:
        >>> import math, torch
        >>> from luce.ops.softmax import log_softmax
        >>> log_softmax(torch.tensor([[0.0, math.log(3.0), -math.inf]])).exp()
        tensor([[0.2500, 0.7500, 0.0000]])
        >>> log_softmax(torch.tensor([120.0, 0.0]))
        tensor([   0., -120.])

    References:
        Dukhan and Ablavatski, The Two-Pass Softmax Algorithm, 2020 (arXiv 2001.04438).
    """
    return _softmax(x, dim, algorithm, backend, True)


def _softmax(x: Tensor, dim: int, algorithm: str, backend: str, logarithm: bool) -> Tensor:
    place = _PLACE.get(algorithm)
    if place is None:
        names = ", ".join(map(repr, ALGORITHMS))
        raise ValueError(f"expected `algorithm` to be one of {names}, got {algorithm!r}")
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"expected `x` as a tensor of float32, float64, bfloat16 or float16, got {got}; convert it first"
        )
    native = choose(backend, x) == "cpu"
    block = x if x.ndim == 2 and dim in (-1, 1) else _block(x, dim)
    if native:
        needs_gradient = x.requires_grad and torch.is_grad_enabled()
        y = (operator.differentiable if needs_gradient else operator.forward)(block, place, logarithm)
    elif x.numel() == 0:
        y = block.clone()
    else:
        y = log_softmax_rows(block) if logarithm else softmax_rows(block)
    return y if block is x else y.reshape(x.shape)


def _block(x: Tensor, dim: int) -> Tensor:
    """Return x as ``(N, C)`` or ``(N, C, M)`` with the classes second, a view where strides allow it."""
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"expected `dim` to be one of the {x.ndim} dimensions of `x`, got {dim}")
    dim %= x.ndim
    before, after = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    return x.reshape((before, x.shape[dim]) if dim == x.ndim - 1 else (before, x.shape[dim], after))
