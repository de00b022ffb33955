"""Progress bars of long work."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bars() -> Progress:
    """Bars on the error stream, so that results can be piped; they vanish when their work is done.

    Where that stream is no terminal there are none, so that a log holds messages only.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class Bar:
    """One bar for the length of a ``with`` block; nothing at all without a progress display."""

    def __init__(self, progress: Progress | None, name: str, total: int, completed: int = 0) -> None:
        self.progress = progress
        if progress is not None:
            self.task = progress.add_task(name, total=total, completed=completed, note="")

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.remove_task(self.task)

    def advance(self) -> None:
        if self.progress is not None:
            self.progress.advance(self.task)

    def note(self, text: str) -> None:
        """Show a few words behind the bar."""
        if self.progress is not None:
            self.progress.update(self.task, note=text)
