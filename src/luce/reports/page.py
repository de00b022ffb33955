"""One self-contained HTML page: no network, no scripts, no fonts to fetch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as resources
from pathlib import Path

from .. import files
from .canvas import Plot
from .table import Table


@dataclass(frozen=True)
class Gallery:
    """Plots of one kind: ``small`` panels stand four in a row where there is room, ``wide`` ones alone."""

    heading: str
    caption: str
    plots: Sequence[Plot]
    small: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Page:
    """The content of a report, in the order of the page.

    Attributes:
        title: The heading.
        kind: The kind of report, in small letters above the title.
        answers: Sentences that state the result.
        table: The figures.
        galleries: The plots; a gallery without plots is left out.
        facts: Names and values at the end: hardware, versions, sizes.
        question: Under the title.
        warnings: Pairs of heading and text.
        colours: By method; each row of the table that is named after a method gets its colour.
        command: Reproduces the report.
        recipe: YAML, folded until the reader opens it.
        footer: The last line.
    """

    title: str
    kind: str
    answers: Sequence[str]
    table: Table
    galleries: Sequence[Gallery]
    facts: Sequence[tuple[str, str]]
    question: str = ""
    warnings: Sequence[tuple[str, str]] = ()
    colours: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    recipe: str = ""
    footer: str = "Written by Luce. This page loads nothing from the network."


def write_page(page: Page, out: Path) -> Path:
    """Render a page to ``out``, whose folder is created if need be; an existing file is replaced atomically.

    Returns:
        The path of the page.

    Raises:
        UserError: If it cannot be written.
    """
    text = _render(page)
    files.make_folder(out.parent)
    files.write_text(out, text)
    return out


def _render(page: Page) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources("luce.reports").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(vars(page))
