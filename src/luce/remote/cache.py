"""A cache of paid answers, written to disk as they arrive."""

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

APPLICATION_ID = 0x4C554345
"""Distinguishes caches of answers from other SQLite files."""
VERSION = 1
KEYS_PER_QUERY = 500
"""Keys in one SQL query; older versions of SQLite allow a thousand."""

TABLES = (
    "CREATE TABLE name (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)",
    "CREATE TABLE answer (teacher INTEGER NOT NULL, row BLOB NOT NULL, content BLOB NOT NULL, "
    "PRIMARY KEY (teacher, row)) WITHOUT ROWID",
    "CREATE TABLE spent (teacher INTEGER NOT NULL, account INTEGER NOT NULL, rows INTEGER NOT NULL, "
    "PRIMARY KEY (teacher, account)) WITHOUT ROWID",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
)


SEAL = 4
"""Bytes of an answer's checksum."""


def sealed(key: bytes, answer: bytes) -> bytes:
    """Append a checksum to an answer: SQLite verifies its own structures only."""
    return answer + zlib.crc32(answer, zlib.crc32(key)).to_bytes(SEAL, "little")


def key_of(row: np.ndarray) -> bytes:
    """Return the key of a row: a hash of its dtype, shape and bytes."""
    form = f"{row.dtype.str}{row.shape}".encode()
    return hashlib.blake2b(row.tobytes(), digest_size=16, key=form[:64]).digest()


class AnswerCache:
    """Answers of one teacher by row key, in a SQLite file that may also hold those of other teachers.

    An answer is on disk when `save` returns, so it survives the process, however that ends. Threads and
    processes may share a file; two that query one row at the same moment may both pay for it.

    Args:
        path: Of the file, created if missing; None keeps the answers in memory.
        teacher: Identity of the teacher: everything that can change its answer to a row.
        account: Name of the account that new answers are charged to.
    Raises:
        UserError: If the file is damaged, of another kind, or cannot be written. It is left as it is.
    Example:
        >>> cache = AnswerCache(None, "cnn at http://127.0.0.1:8000", account="me")
        >>> cache.save({b"row": b"cat"})
        >>> cache.find([b"row", b"other"]), cache.paid
        ({b'row': b'cat'}, 1)
    """

    def __init__(self, path: Path | str | None, teacher: str, account: str = "") -> None:
        self.path, self._lock = path, threading.Lock()
        with self._guarded():
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

    def account(self, name: str) -> AnswerCache:
        """Return the same cache with new answers charged to another account."""
        other = copy.copy(self)
        other._account = self._name(name)
        return other

    @property
    def paid(self) -> int:
        """Number of answers charged to this account by all processes; one that arrived twice counts twice."""
        with self._guarded():
            row = self._base.execute(
                "SELECT rows FROM spent WHERE teacher = ? AND account = ?", (self.teacher, self._account)
            ).fetchone()
        return 0 if row is None else int(row[0])

    def find(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return the cached answers to these keys."""
        found: dict[bytes, bytes] = {}
        rest = iter(keys)
        while chunk := list(islice(rest, KEYS_PER_QUERY)):
            marks = ",".join("?" * len(chunk))
            with self._guarded():
                found.update(
                    self._base.execute(
                        f"SELECT row, content FROM answer WHERE teacher = ? AND row IN ({marks})",
                        (self.teacher, *chunk),
                    )
                )
        return {key: self._unsealed(key, content) for key, content in found.items()}

    def save(self, answers: Mapping[bytes, bytes]) -> None:
        """Write answers to disk; those that are cached already stay unchanged."""
        rows = [(self.teacher, key, sealed(key, answer)) for key, answer in answers.items()]
        with self._guarded(), self._transaction():
            self._base.executemany("INSERT OR IGNORE INTO answer VALUES (?, ?, ?)", rows)
            self._base.execute(
                "INSERT INTO spent VALUES (?, ?, ?) "
                "ON CONFLICT (teacher, account) DO UPDATE SET rows = rows + excluded.rows",
                (self.teacher, self._account, len(rows)),
            )

    def close(self) -> None:
        self._base.close()

    def damaged(self, reason: str) -> UserError:
        return UserError(
            f"the answers in {self.path} are damaged ({reason}); the file is left unchanged: restore a copy, "
            "or move it away to pay for its answers again"
        )

    def _unsealed(self, key: bytes, content: bytes) -> bytes:
        answer = content[:-SEAL]
        if content != sealed(key, answer):
            raise self.damaged("the checksum of an answer")
        return answer

    def _open(self) -> None:
        application, version = (
            self._base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        empty = self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if (application, version) != (APPLICATION_ID, VERSION) and not empty:
            content = "another version" if application == APPLICATION_ID else "other data"
            raise UserError(f"expected a cache of answers, got {self.path} with {content}")
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute("PRAGMA synchronous = FULL")  # an answer is on the disk before it is used
        if empty:
            with self._transaction():  # another process may have been first
                if self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                    for statement in TABLES:
                        self._base.execute(statement)
        if (problem := self._base.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise self.damaged(problem)

    def _name(self, text: str) -> int:
        with self._guarded(), self._transaction():
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
    def _guarded(self) -> Iterator[None]:
        """Admit one thread at a time, and turn errors of SQLite into messages."""
        with self._lock:
            try:
                yield
            except (sqlite3.OperationalError, OSError) as error:
                raise UserError(
                    f"cannot use the cache of answers {self.path} ({error}); free some space, or name "
                    "another as `teacher.cache`"
                ) from error
            except sqlite3.DatabaseError as error:
                raise self.damaged(str(error)) from error
