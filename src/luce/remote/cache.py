"""Answers that were paid for, kept on disk as they arrive."""

from __future__ import annotations

import copy
import hashlib
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from ..errors import UserError

OURS = 0x4C554345
"""Tells our files from other people's SQLite files."""
VERSION = 1
AT_ONCE = 500
"""Keys in one look-up; SQLite allows a thousand in its older versions."""

TABLES = (
    "CREATE TABLE name (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)",
    "CREATE TABLE answer (teacher INTEGER NOT NULL, row BLOB NOT NULL, told BLOB NOT NULL, "
    "PRIMARY KEY (teacher, row)) WITHOUT ROWID",
    "CREATE TABLE spent (teacher INTEGER NOT NULL, account INTEGER NOT NULL, rows INTEGER NOT NULL, "
    "PRIMARY KEY (teacher, account)) WITHOUT ROWID",
    f"PRAGMA application_id = {OURS}",
    f"PRAGMA user_version = {VERSION}",
)


SEAL = 4
"""Bytes of an answer's checksum."""


def sealed(key: bytes, told: bytes) -> bytes:
    """An answer with a checksum behind it: SQLite looks after its own structures alone."""
    return told + zlib.crc32(told, zlib.crc32(key)).to_bytes(SEAL, "little")


def key_of(row: np.ndarray) -> bytes:
    """What a row is found again by: a hash of its dtype, shape and bytes."""
    form = f"{row.dtype.str}{row.shape}".encode()
    return hashlib.blake2b(row.tobytes(), digest_size=16, key=form[:64]).digest()


class Answers:
    """What one teacher has told, by the row's key, in a SQLite file that may hold other teachers' too.

    An answer is on the disk when `keep` returns, so that it survives the process, however it ends. Threads
    and processes may share a file; two that ask about one row at the same moment may both pay for it.

    Args:
        path: Of the file, made if it is not there; None keeps the answers in memory.
        teacher: Whose answers: all that can change what is told about a row.
        account: On whose account new ones go.
    Raises:
        UserError: If the file is damaged, of another kind, or cannot be written. It is left as it is.
    Example:
        >>> answers = Answers(None, "cnn at http://127.0.0.1:8000", account="me")
        >>> answers.keep({b"row": b"cat"})
        >>> answers.find([b"row", b"other"]), answers.paid
        ({b'row': b'cat'}, 1)
    """

    def __init__(self, path: Path | str | None, teacher: str, account: str = "") -> None:
        self.path, self._lock = path, threading.Lock()
        with self._told():
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(
                ":memory:" if path is None else path,
                timeout=60,
                check_same_thread=False,
                isolation_level=None,
            )
            self._open()
        self.teacher, self._account = self._name(teacher), self._name(account)

    def account(self, name: str) -> Answers:
        """The same answers; new ones go on this account."""
        other = copy.copy(self)
        other._account = self._name(name)
        return other

    @property
    def paid(self) -> int:
        """How many answers this account has paid for, in all processes; twice for one that came twice."""
        with self._told():
            found = self._base.execute(
                "SELECT rows FROM spent WHERE teacher = ? AND account = ?", (self.teacher, self._account)
            ).fetchone()
        return 0 if found is None else int(found[0])

    def find(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Those of the answers that are known."""
        found: dict[bytes, bytes] = {}
        rest = iter(keys)
        while some := list(islice(rest, AT_ONCE)):
            marks = ",".join("?" * len(some))
            with self._told():
                found.update(
                    self._base.execute(
                        f"SELECT row, told FROM answer WHERE teacher = ? AND row IN ({marks})",
                        (self.teacher, *some),
                    )
                )
        return {key: self._opened(key, told) for key, told in found.items()}

    def keep(self, answers: Mapping[bytes, bytes]) -> None:
        """Keep answers for good; those that are known already stay as they were."""
        rows = [(self.teacher, key, sealed(key, told)) for key, told in answers.items()]
        with self._told(), self._transaction():
            self._base.executemany("INSERT OR IGNORE INTO answer VALUES (?, ?, ?)", rows)
            self._base.execute(
                "INSERT INTO spent VALUES (?, ?, ?) "
                "ON CONFLICT (teacher, account) DO UPDATE SET rows = rows + excluded.rows",
                (self.teacher, self._account, len(rows)),
            )

    def close(self) -> None:
        self._base.close()

    def damaged(self, what: str) -> UserError:
        return UserError(
            f"the answers in {self.path} are damaged ({what}); the file is left as it is: restore a copy, or "
            "move it away to pay for its answers again"
        )

    def _opened(self, key: bytes, told: bytes) -> bytes:
        answer = told[:-SEAL]
        if told != sealed(key, answer):
            raise self.damaged("the checksum of an answer")
        return answer

    def _open(self) -> None:
        ours, version = (
            self._base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        empty = self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if (ours, version) != (OURS, VERSION) and not empty:
            what = "another version" if ours == OURS else "something else"
            raise UserError(f"expected a file of answers, got {self.path}, which holds {what}")
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute("PRAGMA synchronous = FULL")  # an answer is on the disk before it is used
        if empty:
            with self._transaction():  # another process may have been first
                if self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                    for statement in TABLES:
                        self._base.execute(statement)
        if (found := self._base.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise self.damaged(found)

    def _name(self, text: str) -> int:
        with self._told(), self._transaction():
            self._base.execute("INSERT OR IGNORE INTO name (text) VALUES (?)", (text,))
            return int(self._base.execute("SELECT id FROM name WHERE text = ?", (text,)).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """One thread at a time, and what goes wrong in words."""
        with self._lock:
            try:
                yield
            except (sqlite3.OperationalError, OSError) as error:
                raise UserError(
                    f"cannot use the file of answers {self.path} ({error}); free some space, or name another "
                    "as `teacher.cache`"
                ) from error
            except sqlite3.DatabaseError as error:
                raise self.damaged(str(error)) from error
