"""The only code that knows how features are laid out: ranks, sizes, dtypes, and what a norm of 0 means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Layout = Literal["maps", "vectors"]
SHAPES = {
    "maps": {3: "(C', H, W)", 2: "(T, D)"},
    "vectors": {1: "(D,)"},
}


def as_text(shapes: Sequence[Sequence[torch.Size]]) -> str:
    student, teacher = ([tuple(shape) for shape in group] for group in shapes)
    return f"{student} of the student and {teacher} of the teacher"


def check_shape(name: str, shape: torch.Size, takes: Layout) -> None:
    """A feature without its batch dimension has a rank that the loss can read, and something in it."""
    readable = SHAPES[takes]
    if len(shape) not in readable:
        advice = "pool the map or flatten it" if takes == "vectors" else "take it before the pooling"
        raise ValueError(
            f"expected the {name} to be of shape {' or '.join(readable.values())} beside the batch, "
            f"got {tuple(shape)}; {advice}"
        )
    if 0 in shape:
        raise ValueError(f"expected the {name} not to be empty, got shape {tuple(shape)} beside the batch")
