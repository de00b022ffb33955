"""Labels that are no class index, shared by losses, data and methods."""

from __future__ import annotations

from torch import Tensor

UNLABELLED = -1
"""The label of a row without one, in place of a class index."""
IGNORED = -100
"""The label of a row that losses skip, as in PyTorch."""


def has_label(target: Tensor) -> Tensor:
    """Return where a target is a class index, and not `UNLABELLED` or `IGNORED`."""
    return target >= 0
