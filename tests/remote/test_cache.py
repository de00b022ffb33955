"""Answers on disk: what was kept is there, whatever happens."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import luce
from luce.errors import UserError
from luce.remote.cache import KEYS_PER_QUERY, AnswerCache, key_of

MARK = b"the answer to one question"
WRITER = f"""
import sys, types
for name in ("luce", "luce.signals"):  # without the time that torch takes
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{str(Path(luce.__file__).parent)!r} + "/signals" * (name != "luce")]
from luce.remote.cache import AnswerCache
answers = AnswerCache(sys.argv[1], "teacher", "me")
for number in range(10**6):
    answers.save({{b"%d-%d" % (int(sys.argv[2]), number): b"x%d" % number}})
    print(number, flush=True)
"""


def writer(path: Path, name: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(name)], stdout=subprocess.PIPE, text=True
    )


def test_an_answer_is_found_under_its_teacher_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.sqlite"
    AnswerCache(path, "one").save({b"k": b"1", b"l": b"2"})
    other = AnswerCache(path, "two")
    assert other.find([b"k"]) == {}
    other.save({b"k": b"3"})
    assert AnswerCache(path, "one").find([b"k", b"l", b"m"]) == {b"k": b"1", b"l": b"2"}
    assert AnswerCache(path, "two").find([b"k", b"l"]) == {b"k": b"3"}


def test_the_first_answer_stays_and_whoever_paid_is_known(tmp_path: Path) -> None:
    answers = AnswerCache(tmp_path / "a", "one", "first run")
    answers.save({b"k": b"1"})
    second = answers.account("second run")
    second.save({b"k": b"2", b"l": b"3"})
    assert second.find([b"k"]) == {b"k": b"1"}
    assert (answers.paid, second.paid) == (1, 2)  # they asked about one row at the same moment
    assert AnswerCache(tmp_path / "a", "one", "second run").paid == 2
    assert AnswerCache(tmp_path / "a", "two", "second run").paid == 0


def test_many_keys_are_looked_up_in_parts() -> None:
    answers = AnswerCache(None, "one")
    count = 2 * KEYS_PER_QUERY + 7
    answers.save({b"%d" % number: b"" for number in range(count)})
    assert len(answers.find(b"%d" % number for number in range(count + 5))) == count


@pytest.mark.parametrize("change", ["value", "dtype", "shape", "sign of zero"])
def test_a_key_knows_values_dtype_and_shape(change: str) -> None:
    row = np.zeros((2, 3), dtype=np.float32)
    other = {
        "value": row + 1,
        "dtype": row.view(np.int32),
        "shape": row.reshape(3, 2),
        "sign of zero": -row,
    }[change]
    assert key_of(row) != key_of(other)
    assert key_of(row) == key_of(row.copy()) == key_of(np.zeros((3, 2), dtype=np.float32).T)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_what_a_killed_process_has_kept_is_there(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    run = writer(path, 1)
    assert run.stdout is not None
    said = [int(run.stdout.readline()) for _ in range(20)]
    os.kill(run.pid, signal.SIGKILL)
    said += [int(line) for line in run.stdout if line.endswith("\n")]
    run.wait()
    answers = AnswerCache(path, "teacher", "me")
    found = answers.find(b"1-%d" % number for number in range(len(said) + 2))
    assert {b"1-%d" % number: b"x%d" % number for number in said}.items() <= found.items()
    assert len(said) <= len(found) <= len(said) + 1
    assert answers.paid == len(found)


@pytest.mark.slow
def test_threads_and_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    runs = [writer(path, name) for name in (1, 2)]
    answers = AnswerCache(path, "teacher", "me")

    def keep(name: int) -> None:
        for number in range(10):
            answers.save({b"%d-%d" % (name, number): b"x%d" % number})

    threads = [threading.Thread(target=keep, args=(name,)) for name in (3, 4)]
    for thread in threads:
        thread.start()
    for run in runs:
        assert run.stdout is not None
        assert [int(run.stdout.readline()) for _ in range(10)] == list(range(10))
        run.kill()
        run.communicate()
    for thread in threads:
        thread.join()
    keys = [b"%d-%d" % (name, number) for name in (1, 2, 3, 4) for number in range(10)]
    assert len(answers.find(keys)) == 40


@pytest.mark.parametrize("damage", ["no database", "torn", "truncated", "one bit"])
def test_a_damaged_file_is_told_and_left_alone(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    answers = AnswerCache(path, "one")
    answers.save({b"%d" % number: os.urandom(200) for number in range(500)} | {b"x": MARK})
    answers.close()
    whole = path.read_bytes()
    path.write_bytes(
        {
            "no database": b"answers" * 99,
            "torn": whole[:20000] + os.urandom(20000) + whole[40000:],
            "truncated": whole[: len(whole) // 2],
            "one bit": whole.replace(MARK, MARK.replace(b"e", b"f")),
        }[damage]
    )
    before = path.read_bytes()
    assert before != whole
    with pytest.raises(UserError, match=r"the answers in .*answers.sqlite are damaged"):
        AnswerCache(path, "one").find([b"x"])
    assert path.read_bytes() == before


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "mine.sqlite"
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE mine (x)")
    before = path.read_bytes()
    with pytest.raises(UserError, match="with other data"):
        AnswerCache(path, "one")
    assert path.read_bytes() == before
    newer = tmp_path / "newer.sqlite"
    AnswerCache(newer, "one").close()
    with sqlite3.connect(newer) as base:
        base.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="with another version"):
        AnswerCache(newer, "one")
    with pytest.raises(UserError, match="cannot use the cache of answers"):
        AnswerCache(tmp_path, "one")
