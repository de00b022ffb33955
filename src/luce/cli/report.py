"""``luce report``: tables and the page of a finished run or comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print the table of a run or a comparison, and write its report.html again.

      luce report runs/demo

    Attributes:
        folder: A finished run or comparison.
    """

    folder: Path


def main(options: Options, _: str) -> None:
    """Print the table and write the page."""
    show(options.folder)


def show(folder: Path) -> None:
    """Print the table and the place of the page; for a comparison, the conclusions too."""
    from rich.console import Console

    from .. import reports
    from ..training.processes import processes

    processes().wait_for_everyone()
    if not processes().is_main_process:
        return
    if not (folder / "comparison.yaml").exists():
        Console().print(reports.terminal_table(reports.read_run(folder)))
        print(f"\nreport: {reports.write_html(folder)}")
        return
    comparison = reports.read_comparison(folder)
    Console().print(reports.terminal_table(comparison))
    print(f"\nreport: {reports.write_html(folder)}")
    for sentence in reports.verdict(reports.summarise(comparison)).values():
        print(sentence)
