"""What Luce says while it works: one line each, through the logger ``luce``.

The command line prints both kinds on the error stream, each text once. In Python, `warning` appears there
unless the program configures `logging`, and `info` only if it does.
"""

from __future__ import annotations

import logging

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
