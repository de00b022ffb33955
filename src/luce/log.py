"""What Luce says while it works: one line each, through the logger ``luce``.

The command line and `luce.distill` print both kinds on the error stream, each text once. Elsewhere in Python
`warning` appears there unless the program configures `logging`, and `info` only if it does.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .files import is_main_process

LOGGER = logging.getLogger("luce")


def info(message: str) -> None:
    """State what was read, left out or assumed; in a distributed run only the main process does."""
    if is_main_process():
        LOGGER.info(message)


def warning(message: str) -> None:
    """State what is probably wrong and what to do; in a distributed run only the main process does."""
    if is_main_process():
        LOGGER.warning(message)


class _Lines(logging.Handler):
    """Prints each message once; a comparison repeats those of its runs."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix, self.printed = prefix, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning: " if record.levelno >= logging.WARNING else ""
        line = f"{self.prefix}: {kind}{record.getMessage()}"
        if line not in self.printed:
            self.printed.add(line)
            print(line, file=sys.stderr)


@contextmanager
def on_stderr(prefix: str) -> Iterator[None]:
    """Print the messages of a block on the error stream, each as ``prefix: message``."""
    level, handler = LOGGER.level, _Lines(prefix)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
