"""Progress bars."""

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
    """Return a display on the error stream, which leaves the output stream to results.

    Finished bars disappear. If the error stream is not a terminal, nothing is shown and logs stay clean.
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
    """One progress bar for a ``with`` block; shows nothing without a display."""

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
        """Show a short text after the bar."""
        if self.progress is not None:
            self.progress.update(self.task, note=text)
