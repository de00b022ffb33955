"""Pictures of results as PNG files with a palette, which take a quarter of the bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from .results import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = 64
"""Enough for a plot's few colours and the steps of grey around its letters."""


def save_picture(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as a palette PNG."""
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    picture = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(packed, format="png", optimize=True)
    write_atomically(path, packed.getvalue())
