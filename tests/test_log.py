"""Messages reach the error stream of a command, once, and from the main process alone."""

from __future__ import annotations

import warnings

import pytest

from luce import cli, log


def test_a_command_prints_each_message_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*_: object) -> int:
        log.info("read 3 files")
        log.info("read 3 files")
        log.warning("two are empty")
        return 0

    monkeypatch.setattr(cli, "_run", command)
    assert cli.main(["train"]) == 0
    assert capsys.readouterr().err == "luce train: read 3 files\nluce train: warning: two are empty\n"
    assert not log.LOGGER.handlers


def test_a_command_prints_a_warning_of_luce_as_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []

    def command(*_: object) -> int:
        lines.extend(warnings.formatwarning("two\n  lines", UserWarning, file, 3) for file in files)
        return 0

    files = (log.__file__, pytest.__file__)
    monkeypatch.setattr(cli, "_run", command)
    before = warnings.formatwarning
    assert cli.main(["train"]) == 0
    assert warnings.formatwarning is before
    assert lines[0] == "luce train: warning: two lines\n"
    assert lines[1].startswith(f"{pytest.__file__}:3: UserWarning: two")


def test_other_processes_say_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    log.warning("seen by rank 0 alone")
    assert not caplog.records
