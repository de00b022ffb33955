"""The operator in plain PyTorch: the reference, for any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference


def suffix_rows(x: Tensor) -> Tensor:
    """As the native engine: sixteen-bit numbers are data, the sums need at least float32."""
    return reference.suffix_logsumexp(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
