"""Softmax and log-softmax over any dimension, by several algorithms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..engines import choose
from . import cpu
from .reference import log_softmax_rows, softmax_rows

__all__ = ["ALGORITHMS", "log_softmax", "softmax"]

ALGORITHMS = ("auto", "two_pass", "two_pass_lazy", "three_pass_recompute", "three_pass_reload", "online")
"""What `algorithm` may be; the reference knows one way only."""

_PLACE = {name: place for place, name in enumerate(ALGORITHMS)}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def softmax(x: Tensor, dim: int = -1, *, algorithm: str = "auto", backend: str = "auto") -> Tensor:
    r"""Exponentials of a row, divided by their sum: :math:`y_i = e^{x_i} / \sum_j e^{x_j}`.

    Sums are kept in double precision, sixteen-bit rows are rounded once, at the end. ``-inf`` gives exactly 0
    and leaves the other classes alone; a row with a NaN, with ``+inf`` or of nothing but ``-inf`` is NaN.
    Results that are not normal float32 numbers (below 1.2e-38; 2.2e-308 in float64) may be 0.

    The algorithms differ in speed and in their last digits:

    - ``"three_pass_reload"``: maximum, exponentials stored, scaled. Fastest in the cache.
    - ``"three_pass_recompute"``: maximum, sum, exponentials once more.
    - ``"online"``: maximum and sum block by block, so that memory is read twice instead of three times.
    - ``"two_pass"``: no maximum; each exponential is an exponent of its own and a mantissa, within 2 units in
      its last place (2.3 on processors without fused multiply-add). Rows whose largest value is beyond 90000
      (11000), up or down, take ``"three_pass_recompute"``.
    - ``"two_pass_lazy"``: the same, but the sum's exponent moves only when a term would overflow. Fastest
      beyond the cache.
    - ``"auto"``: by length and dtype.

    The first three take exponentials of :math:`x_i - \max x`, whose rounding shows in classes far below the
    largest: up to 4e-6 of their value in float32. The two-pass forms are free of that, but the largest
    probability may be 1.0000001.

    Args:
        x: Any shape, float32, float64, bfloat16 or float16. Rows are read where they are if the dimensions on
            either side of `dim` can be viewed as one each, as in contiguous or channels-last tensors.
        dim: The dimension of the classes.
        algorithm: One of `ALGORITHMS`; the reference ignores it.
        backend: ``"auto"``, ``"cpu"`` or ``"reference"``.
    Returns:
        Probabilities, shaped like `x` and of its dtype.
    Raises:
        TypeError: If `x` is not of one of these dtypes.
        ValueError: If there is no such dimension, algorithm or backend.
        RuntimeError: If the named backend cannot run here.
    Example:
        >>> softmax(torch.tensor([[0.0, math.log(3.0), -math.inf]]))
        tensor([[0.2500, 0.7500, 0.0000]])

    References:
        Dukhan and Ablavatski, The Two-Pass Softmax Algorithm, arXiv 2001.04438, 2020.
        Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867, 2018.
    """
    return _softmax(x, dim, algorithm, backend, False)


def log_softmax(x: Tensor, dim: int = -1, *, algorithm: str = "auto", backend: str = "auto") -> Tensor:
    r"""Logarithm of `softmax`: :math:`y_i = x_i - \log \sum_j e^{x_j}`, in nats.

    Everything is as in `softmax`, except that ``-inf`` stays ``-inf`` and that ``"three_pass_reload"`` stores
    no exponentials. With the two-pass algorithms the logarithm of a probability near 1 is off by up to 5e-7
    in float32, with the others it keeps its relative precision.

    Example:
        >>> log_softmax(torch.tensor([[0.0, math.log(3.0), -math.inf]])).exp()
        tensor([[0.2500, 0.7500, 0.0000]])
    """
    return _softmax(x, dim, algorithm, backend, True)


def _softmax(x: Tensor, dim: int, algorithm: str, backend: str, logarithm: bool) -> Tensor:
    place = _PLACE.get(algorithm)
    if place is None:
        names = ", ".join(map(repr, ALGORITHMS))
        raise ValueError(f"expected `algorithm` to be one of {names}, got {algorithm!r}")
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"expected `x` as float32, float64, bfloat16 or float16, got {x.dtype}; convert it first"
        )
    native = choose(backend, x) == "cpu"
    block = x if x.ndim == 2 and dim in (-1, 1) else _block(x, dim)
    if native:
        y = cpu.softmax(block, place, logarithm)
    elif x.numel() == 0:
        y = block.clone()
    else:
        y = log_softmax_rows(block) if logarithm else softmax_rows(block)
    return y if block is x else y.reshape(x.shape)


def _block(x: Tensor, dim: int) -> Tensor:
    """``(N, C)`` or ``(N, C, M)``, a view where there is one."""
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"expected `dim` to be a dimension of `x`, which has {x.ndim}, got {dim}")
    dim %= x.ndim
    before, after = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    return x.reshape((before, x.shape[dim]) if dim == x.ndim - 1 else (before, x.shape[dim], after))
