"""Reports of run folders: statistics over seeds, a table, plots and one self-contained HTML page."""

from __future__ import annotations

from .html import write_html
from .runs import read_comparison, read_run
from .statistics import summarise, verdict
from .table import markdown_table, terminal_table

__all__ = [
    "markdown_table",
    "read_comparison",
    "read_run",
    "summarise",
    "terminal_table",
    "verdict",
    "write_html",
]
