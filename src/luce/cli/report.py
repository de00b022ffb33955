"""``luce report``: tables and the page, from what is in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str]) -> None:
    from ._arguments import single_folder

    folder = single_folder(
        "report", words, "Print the table of a run or comparison folder and write its report.html."
    )
    if folder is not None:
        show(folder)


def show(folder: Path) -> None:
    """Print the table, where the report is, and for a comparison what it found."""
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
