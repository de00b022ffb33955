"""Layout of features: ranks, sizes and dtypes, and normalisation that is defined for zero vectors.

Inside the losses a map is ``(N, C', H, W)``; tokens ``(N, T, D)`` become a map of T places in a column.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..ops._rows import wide_dtype

Two = tuple[Tensor, Tensor]


def maps(student: Tensor, teacher: Tensor, *, pooled: bool = True, like_channels: bool = False) -> Two:
    """Return both features as maps in their common wide dtype, the teacher's detached.

    Args:
        pooled: Pool both to the smaller height and width by adaptive average pooling.
        like_channels: Raise ValueError if the channels differ.
    """
    checks.check_features(student, teacher, "maps")
    checks.check_same_layout(student, teacher)
    if pooled and student.ndim == 3 and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"expected as many tokens of the student as of the teacher, got {student.shape[1]} and "
            f"{teacher.shape[1]}; this loss compares places: reshape both to maps, which can be pooled"
        )
    s, t = (as_map(x) for x in _wide(student, teacher))
    if like_channels and s.shape[1] != t.shape[1]:
        raise ValueError(
            f"expected as many channels of the student as of the teacher, got {s.shape[1]} and {t.shape[1]}; "
            f"the loss's module makes a projection when it is built"
        )
    return same_size(s, t) if pooled else (s, t)


def vectors(student: Tensor, teacher: Tensor) -> Two:
    """Return both features as ``(N, D)`` in a common wide dtype, the teacher's detached; the D may differ."""
    checks.check_features(student, teacher, "vectors")
    return _wide(student, teacher)


def rows(student: Tensor, teacher: Tensor) -> Two:
    """Return features of any rank flattened, otherwise as `vectors`."""
    checks.check_features(student, teacher, None)
    s, t = _wide(student, teacher)
    return s.flatten(1), t.flatten(1)


def _wide(student: Tensor, teacher: Tensor) -> Two:
    # Squares of float16 overflow from 256 on.
    dtype = wide_dtype(student, teacher)
    return student.to(dtype), teacher.detach().to(dtype)


def as_map(feature: Tensor) -> Tensor:
    return feature if feature.ndim == 4 else feature.mT.unsqueeze(-1)


def map_shape(shape: torch.Size) -> torch.Size:
    """Return ``(C', H, W)`` for the shape of a feature without its batch, in the layout of `as_map`."""
    return shape if len(shape) == 3 else torch.Size((shape[1], shape[0], 1))


def same_size(a: Tensor, b: Tensor) -> Two:
    """Pool both maps to the smaller height and the smaller width of the two."""
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    # A pooling to the same size changes nothing, yet costs a copy and a backward pass.
    one, other = (x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))
    return one, other


def full_precision(x: Tensor) -> torch.autocast:
    """Disable autocast, which would multiply float32 matrices in 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def scaled(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Divide `x` by its largest magnitude over `dim`, which autograd treats as constant; zeros stay 0.

    Use it in functions that a positive factor on `x` does not change. Without it, products of two entries
    overflow float32 above 1.8e19 and vanish below 1e-23.
    """
    # Detached: the factor cancels in the caller's result, and its gradient would be rounding errors.
    largest = x.detach().abs().amax(dim, keepdim=True)
    # 0 / 1 keeps zeros; 0 / 0 would be NaN.
    return x / torch.where(largest == 0, 1, largest)


def unit(x: Tensor, dim: int) -> Tensor:
    """Divide `x` by its L2 norm along `dim`; a zero vector stays 0 and passes no gradient."""
    x = scaled(x, dim)
    square = x.square().sum(dim, keepdim=True)
    # The inner `where` keeps the infinite slope of rsqrt at 0 out of the backward pass: 0 * inf is NaN.
    return x * torch.where(square == 0, 0, torch.where(square == 0, 1, square).rsqrt())
