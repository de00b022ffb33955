"""Ctrl-C and SIGTERM are acted on, wherever they arrive."""

# ruff: noqa: PT012
from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from luce import stops

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="other signals")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in stops.SIGNALS]
    yield
    assert [signal.getsignal(number) for number in stops.SIGNALS] == before


class Destroyed:
    """An object in whose destructor a signal arrives; an error there is lost."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, stops.Terminated)]
)
def test_a_signal_in_a_destructor_stops_the_loop_after_its_batch(number: int, error: Any) -> None:
    done = []
    with pytest.raises(error), stops.noted():
        for batch in range(3):
            if batch == 1:
                Destroyed(number)
            done.append(batch)
            stops.check()
    assert done == [0, 1]


def test_the_second_ctrl_c_raises_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stops.noted():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_work_to_be_saved_is_finished_before_sigterm_but_not_before_ctrl_c() -> None:
    with pytest.raises(stops.Terminated), stops.noted():
        signal.raise_signal(signal.SIGTERM)
        stops.check(finishing=True)
        assert stops.terminating()
        stops.check()
    assert not stops.terminating()
    with pytest.raises(KeyboardInterrupt), stops.noted():
        signal.raise_signal(signal.SIGINT)
        stops.check(finishing=True)


def test_a_signal_that_no_check_sees_is_raised_at_the_end() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), stops.noted():
        with stops.noted():
            signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached


def test_the_stop_and_not_the_error_that_it_caused_is_raised() -> None:
    with pytest.raises(KeyboardInterrupt), stops.noted():
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("DataLoader worker exited unexpectedly")
    with pytest.raises(RuntimeError, match="of another cause"), stops.noted():
        raise RuntimeError("of another cause")


def test_sigterm_is_raised_where_nothing_notes_it() -> None:
    with pytest.raises(SystemExit) as caught, stops.raised():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143


def test_a_launched_process_that_waits_for_another_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler would run only when the wait is over."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    before = signal.getsignal(signal.SIGTERM)
    with stops.raised():
        assert signal.getsignal(signal.SIGTERM) == before


def test_handlers_of_other_software_stay() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with stops.raised(), stops.noted():
            signal.raise_signal(signal.SIGTERM)
            stops.check()
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_notes_nothing() -> None:
    def work() -> None:
        with stops.noted(), stops.raised():
            stops.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_reading_process_survives_ctrl_c_and_ends_with_sigterm() -> None:
    with stops.noted():
        child = os.fork()
        if not child:
            stops.ignore_in_worker(0)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
