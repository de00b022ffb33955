"""The style of every plot, and Matplotlib figures as SVG for a page or as PNG files."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .runs import Comparison, Run
from .statistics import FOCUS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which common colour blindnesses can tell apart, without its yellow, which is too
# pale on white. PLD is always blue, the baseline always grey.
BLUE, GREY = "#0072B2", "#767676"
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#3b3f46"
DASHED = (0, (4, 3))

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, and in the page's own font
    "text.parse_math": False,  # a "$" in a name is a dollar
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b9bdc5",
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Plot:
    """A panel: its title, its SVG for use inside HTML, and a description for screen readers."""

    title: str
    svg: str
    alt: str


def colours(source: Run | Comparison) -> dict[str, str]:
    """Return the colour of each method, the same in every plot and table of a report."""
    if isinstance(source, Run):
        return {source.method: BLUE}
    fixed = {FOCUS: BLUE, source.baseline: GREY}
    others = [method for method in source.methods if method not in fixed]
    return fixed | {method: OTHERS[index % len(OTHERS)] for index, method in enumerate(others)}


@contextmanager
def _styled_figure(size: tuple[float, float], **changes: Any) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = STYLE | changes
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The browser of the reader has glyphs that the font used for measuring lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield Figure(figsize=size, layout="constrained")


def draw(name: str, title: str, alt: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> Plot:
    """Let ``paint`` fill a figure of ``size`` inches, and return it as an SVG that scales with its container.

    Args:
        name: Unique on the page; every id in the SVG begins with it.
        title: The panel's title, which the page shows above the SVG.
        alt: A description of what the plot shows.
        size: Width and height; text is 8.5 points at this size.
        paint: Draws on the figure.
    """
    buffer = io.StringIO()
    # Without a fixed salt, Matplotlib draws random ids and the same report differs from run to run.
    with _styled_figure(size, **{"svg.hashsalt": name}) as figure:
        paint(figure)
        figure.savefig(buffer, format="svg", transparent=True)
    drawn = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
    opening, body = re.split(r"(?<=>)", drawn[drawn.index("<svg") :], maxsplit=1)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    return Plot(title, f'<svg {box[0]} role="img" aria-label="{html.escape(alt)}">{body.strip()}', alt)


def draw_png(size: tuple[float, float], paint: Callable[[Figure], None]) -> bytes:
    """Let ``paint`` fill a figure of ``size`` inches, and return it as a PNG; see `as_png`."""
    with _styled_figure(size) as figure:
        paint(figure)
        return as_png(figure)


def as_png(figure: Figure, dpi: int = 130) -> bytes:
    """Return a figure as a PNG with a palette of 256 colours, about a third of the size of full colour."""
    from PIL import Image

    full, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=dpi)
    # Maximum coverage keeps the colour of a small mark, which a median cut would merge with its surroundings.
    # Dithering would speckle flat areas, and speckles compress badly.
    image = Image.open(full).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(packed, format="png", optimize=True)
    return packed.getvalue()


def over_epochs(axes: Axes, unit: str) -> None:
    """Set up axes over epochs: integer ticks, horizontal grid lines only."""
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.01)


def name_rows(axes: Axes, names: Iterable[str]) -> None:
    """Label horizontal rows, the first name on top."""
    labels = [short(name) for name in names]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def name_lines(axes: Axes, lines: Sequence[tuple[str, float, str]]) -> None:
    """Write each ``(name, last value, colour)`` at the right end of its line, without overlaps."""
    low, high = axes.get_ylim()
    lines = sorted(lines, key=lambda line: line[1])
    heights = [(value - low) / (high - low) for _, value, _ in lines]
    gap = 0.075
    # Neighbours move apart by equal amounts, so that a cluster of names stays centred on its lines.
    for _ in range(100):
        for i in range(1, len(heights)):
            push = max(0.0, gap - (heights[i] - heights[i - 1])) / 2
            heights[i - 1] -= push
            heights[i] += push
    heights[-1] = min(heights[-1], 1.0)
    for i in reversed(range(len(heights) - 1)):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    for height, (name, _, colour) in zip(heights, lines, strict=True):
        weight = "bold" if name == FOCUS else "normal"
        axes.text(
            1.015, height, short(name), color=colour, weight=weight, va="center", transform=axes.transAxes
        )


def short(name: str, width: int = 22) -> str:
    """Shorten a name to ``width`` characters.

    Example:
        >>> short("cross-entropy", width=6)
        'cross…'
    """
    return name if len(name) <= width else f"{name[: width - 1]}…"
