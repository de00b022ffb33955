"""Answers on disk: what was kept is there, whatever happens."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from random import Random

import numpy as np
import pytest

import luce
from luce.errors import UserError
from luce.remote.cache import KEYS_PER_QUERY, AnswerCache, key_of, sealed

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


@pytest.mark.parametrize("column", ["told", "content"])
def test_paid_answers_of_version_1_are_kept(column: str, tmp_path: Path) -> None:
    """A column had two names in that version."""
    path = tmp_path / "answers.sqlite"
    with sqlite3.connect(path) as base:
        for statement in (
            "CREATE TABLE name (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)",
            f"CREATE TABLE answer (teacher INTEGER NOT NULL, row BLOB NOT NULL, {column} BLOB NOT NULL, "
            "PRIMARY KEY (teacher, row)) WITHOUT ROWID",
            "CREATE TABLE spent (teacher INTEGER NOT NULL, account INTEGER NOT NULL, rows INTEGER NOT NULL, "
            "PRIMARY KEY (teacher, account)) WITHOUT ROWID",
            f"PRAGMA application_id = {0x4C554345}",
            "PRAGMA user_version = 1",
            "INSERT INTO name VALUES (1, 'one'), (2, 'me')",
            "INSERT INTO spent VALUES (1, 2, 5)",
        ):
            base.execute(statement)
        base.execute("INSERT INTO answer VALUES (1, ?, ?)", (b"k", sealed(b"k", b"answer")))
    base.close()
    for _ in range(2):
        answers = AnswerCache(path, "one", "me")
        assert (answers.find([b"k"]), answers.paid) == ({b"k": b"answer"}, 5)
        answers.close()


@pytest.mark.parametrize("seed", range(5))
def test_flipped_bits_are_told_or_change_nothing(seed: int, tmp_path: Path) -> None:
    """A damaged key may hide its answer, which is then paid for again; no answer and no bill is wrong."""
    path, random = tmp_path / "answers.sqlite", Random(seed)
    known = {b"%d" % number: random.randbytes(50) for number in range(100)}
    answers = AnswerCache(path, "one", "me")
    answers.save(known)
    answers.close()
    whole, told = path.read_bytes(), 0
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(random.randint(1, 6)):
            damaged[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        try:
            answers = AnswerCache(path, "one", "me")
            assert answers.find(known).items() <= known.items()
            assert answers.paid == 100
            answers.close()
        except UserError:
            told += 1
        for left in ("-wal", "-shm"):
            Path(f"{path}{left}").unlink(missing_ok=True)
    assert told > 5


@pytest.mark.parametrize("cut", [1, 50, 100, 1000, 4096, 5000])
def test_a_file_cut_anywhere_is_told(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    answers = AnswerCache(path, "one")
    answers.save({b"%d" % number: os.urandom(200) for number in range(100)})
    answers.close()
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"answers\.sqlite"):
        AnswerCache(path, "one").find([b"1"])


def test_a_full_disk_is_told_and_costs_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    answers = AnswerCache(path, "one", "me")
    answers.save({b"k": b"1"})
    pages = answers._base.execute("PRAGMA page_count").fetchone()[0]
    answers._base.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then answers as on a full disk
    with pytest.raises(UserError, match=r"cannot use the cache of answers .* is full\); free some space"):
        answers.save({b"%d" % number: os.urandom(1000) for number in range(100)})
    assert (answers.find([b"k", b"1"]), answers.paid) == ({b"k": b"1"}, 1)
    answers._base.execute("PRAGMA max_page_count = 1000000")
    answers.save({b"l": b"2"})
    answers.close()
    again = AnswerCache(path, "one", "me")
    assert (again.find([b"k", b"l"]), again.paid) == ({b"k": b"1", b"l": b"2"}, 2)


@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
def test_the_file_has_the_permissions_that_the_user_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        answers = AnswerCache(tmp_path / "a", "one")
        answers.save({b"k": b"1"})
    finally:
        os.umask(before)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a-wal", "a-shm"}
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o664
