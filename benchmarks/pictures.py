"""Pictures of results as PNG files with a palette."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luce.reports.canvas import as_png

from .results import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_picture(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as a palette PNG."""
    write_atomically(path, as_png(figure, dpi))
