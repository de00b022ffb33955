"""Ctrl-C, SIGTERM and reading processes that end: a loop over batches notes them and stops in order."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
READER_ENDED = re.compile(
    r"DataLoader worker \(pid\S* [\d, ]+\) (is killed by signal: [\w ]+|exited unexpectedly)"
)
_noted: list[int] | None = None
"""Signals that arrived during `noted`; None outside."""


class Terminated(SystemExit):
    """SIGTERM has arrived. A program that does not catch it ends with status 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def noted() -> Iterator[None]:
    """Note Ctrl-C and SIGTERM during the block instead of raising them wherever the program is.

    An exception is lost if it is raised in a destructor, such as the one that ends the processes of a data
    loader. `check` raises what was noted, and so does the end of the block, also in place of an error of
    the block, such as that of a reading process which the same signal has ended. A second signal of a kind
    raises at once. Nested blocks, threads, and programs with handlers of their own note nothing.

    Raises:
        UserError: If a reading process ends by itself, as when memory runs out.
    """
    global _noted
    handlers = {} if _noted is not None else _own_handlers()
    if handlers:
        _noted = []
    for number in handlers:
        signal.signal(number, _note)
    try:
        yield
    except Exception as error:
        ended = READER_ENDED.search(str(error))
        if ended:
            time.sleep(0.2)  # a signal to all processes may reach this one last
        check()
        if ended is None:
            raise
        raise UserError(
            f"a process that reads data {ended[1]}, perhaps as memory ran out; lower `data.workers` or "
            "`training.batch_size`, or find an error of the data with `data.workers: 0`"
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        arrived = None
        if handlers:
            arrived, _noted = _noted, None
    if arrived:
        _raise(min(arrived))


def check(*, finishing: bool = False) -> None:
    """Raise KeyboardInterrupt or Terminated if its signal was noted.

    Args:
        finishing: Leave SIGTERM for later, as there is work to be finished and saved first.
    """
    if _noted and (number := min(_noted)) and not (finishing and number == signal.SIGTERM):
        _raise(number)


def terminating() -> bool:
    """Return whether SIGTERM was noted."""
    return _noted is not None and signal.SIGTERM in _noted


@contextmanager
def raised() -> Iterator[None]:
    """Raise Terminated on SIGTERM during the block, so that files and locks are put in order.

    Not in processes that were launched together: one that waits for another, which has failed, would not end.
    """
    handlers = _own_handlers()
    if signal.SIGTERM not in handlers or "LOCAL_RANK" in os.environ:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handlers[signal.SIGTERM])


def ignore_in_worker(_: int) -> None:
    """Let a reading process ignore Ctrl-C, which a terminal sends to it too: the main process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _own_handlers() -> dict[int, Any]:
    """Return the handlers of the signals that no other software handles; none outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    known = (signal.SIG_DFL, signal.default_int_handler, _raise)
    return {number: handler for number, handler in handlers.items() if handler in known}


def _note(number: int, _: FrameType | None) -> None:
    assert _noted is not None
    if number in _noted:
        _raise(number)
    _noted.append(number)


def _raise(number: int, _: FrameType | None = None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
