"""How every plot looks, and how a Matplotlib figure becomes an SVG that lives inside a page."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .runs import Comparison, Run
from .statistics import FOCUS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart under the common colour blindnesses, without the yellow that white
# swallows. PLD always has the blue and the baseline the grey.
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
    """A panel: its title, its SVG for use inside HTML, and what it shows in words for who cannot see it."""

    title: str
    svg: str
    alt: str


def colours(source: Run | Comparison) -> dict[str, str]:
    """The colour of each method, the same in every plot and table of a report."""
    if isinstance(source, Run):
        return {source.method: BLUE}
    fixed = {FOCUS: BLUE, source.baseline: GREY}
    others = [method for method in source.methods if method not in fixed]
    return fixed | {method: OTHERS[index % len(OTHERS)] for index, method in enumerate(others)}


def draw(name: str, title: str, alt: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> Plot:
    """Let ``paint`` fill a figure of ``size`` inches, and return it as an SVG that scales with its container.

    Args:
        name: Unique on the page; every id in the SVG begins with it.
        title: The panel's title, which the page sets above the SVG.
        alt: What the plot shows, in words.
        size: Width and height; the text is 8.5 points at this size.
        paint: Draws on the figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    # The salt makes the ids, and so the file, the same every time.
    style: Any = STYLE | {"svg.hashsalt": name}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The reader's browser has the letters that our measuring font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.savefig(buffer, format="svg", transparent=True)
    drawn = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
    opening, body = re.split(r"(?<=>)", drawn[drawn.index("<svg") :], maxsplit=1)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    return Plot(title, f'<svg {box[0]} role="img" aria-label="{html.escape(alt)}">{body.strip()}', alt)


def over_epochs(axes: Axes, unit: str) -> None:
    """Axes whose x are epochs: whole numbers, and no more lines than the reader needs."""
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.01)


def name_rows(axes: Axes, names: Iterable[str]) -> None:
    """Horizontal rows, the first name on top."""
    labels = [short(name) for name in names]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def name_lines(axes: Axes, lines: Sequence[tuple[str, float, str]]) -> None:
    """Write each ``(name, last value, colour)`` at the right end of its line, apart enough not to overlap."""
    low, high = axes.get_ylim()
    lines = sorted(lines, key=lambda line: line[1])
    heights = [(value - low) / (high - low) for _, value, _ in lines]
    gap = 0.075
    # Neighbours push each other apart by the same amount, so that a crowd stays centred on its lines.
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
    """A name that leaves room for the plot.

    Example:
        >>> short("cross-entropy", width=6)
        'cross…'
    """
    return name if len(name) <= width else f"{name[: width - 1]}…"
