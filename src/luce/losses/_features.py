"""The only code that knows how features are laid out: ranks, sizes and dtypes, and what a norm of 0 means.

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
    """Both features as maps in their common wide dtype, the teacher's detached.

    Args:
        pooled: Bring both to one height and width, the smaller of each, by adaptive average pooling.
        like_channels: Refuse channels that differ.
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
    """Both features as ``(N, D)``, each with its own D, in a common wide dtype, the teacher's detached."""
    checks.check_features(student, teacher, "vectors")
    return _wide(student, teacher)


def rows(student: Tensor, teacher: Tensor) -> Two:
    """As `vectors`, of features of any rank, flattened."""
    checks.check_features(student, teacher, None)
    s, t = _wide(student, teacher)
    return s.flatten(1), t.flatten(1)


def _wide(student: Tensor, teacher: Tensor) -> Two:
    dtype = wide_dtype(student, teacher)
    return student.to(dtype), teacher.detach().to(dtype)


def as_map(feature: Tensor) -> Tensor:
    return feature if feature.ndim == 4 else feature.mT.unsqueeze(-1)


def map_shape(shape: torch.Size) -> torch.Size:
    """``(C', H, W)`` of a feature's shape beside the batch, as `as_map` lays it out."""
    return shape if len(shape) == 3 else torch.Size((shape[1], shape[0], 1))


def same_size(a: Tensor, b: Tensor) -> Two:
    """Both maps at the smaller height and the smaller width of the two."""
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    one, other = (x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))
    return one, other


def full_precision(x: Tensor) -> torch.autocast:
    """Autocast would do the products of float32 matrices in 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def scaled(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """`x` divided by its largest magnitude over `dim`, a constant to autograd; zeros stay 0.

    For functions that a positive factor on `x` does not change: without it, products of two entries overflow
    float32 from 2e19 on and vanish below 1e-23.
    """
    largest = x.detach().abs().amax(dim, keepdim=True)
    return x / torch.where(largest == 0, 1, largest)


def unit(x: Tensor, dim: int) -> Tensor:
    """`x` divided by its L2 norm along `dim`; a zero vector stays 0 and passes no gradient."""
    x = scaled(x, dim)
    square = x.square().sum(dim, keepdim=True)
    return x * torch.where(square == 0, 0, torch.where(square == 0, 1, square).rsqrt())
