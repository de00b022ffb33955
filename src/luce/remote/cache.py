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

from .. import log
from ..config import as_path
from ..errors import UserError

APPLICATION_ID = 0x4C554345
"""Distinguishes caches of answers from other SQLite files."""
VERSION = 2
SMALLEST = 512
"""Bytes of the smallest SQLite file."""
KEYS_PER_QUERY = 500
"""Keys in one SQL query; older versions of SQLite allow a thousand."""

TABLES = (
    "CREATE TABLE name (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE, crc INTEGER)",
    "CREATE TABLE answer (teacher INTEGER NOT NULL, row BLOB NOT NULL, content BLOB NOT NULL, "
    "PRIMARY KEY (teacher, row)) WITHOUT ROWID",
    "CREATE TABLE spent (teacher INTEGER NOT NULL, account INTEGER NOT NULL, rows INTEGER NOT NULL, "
    "crc INTEGER, PRIMARY KEY (teacher, account)) WITHOUT ROWID",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
)
FROM_VERSION_1 = (
    "ALTER TABLE name ADD COLUMN crc INTEGER",
    "ALTER TABLE spent ADD COLUMN crc INTEGER",
    "UPDATE name SET crc = crc(id, text)",
    "UPDATE spent SET crc = crc(teacher, account, rows)",
    f"PRAGMA user_version = {VERSION}",
)


SEAL = 4
"""Bytes of an answer's checksum."""


def crc(*values: int | str) -> int:
    """Return a checksum of a row, as a function of SQL."""
    return zlib.crc32(repr(values).encode())


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
        self.path, self._lock = None if path is None else as_path(path), threading.Lock()
        with self._guarded():
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._create(self.path)
            self._base = sqlite3.connect(
                ":memory:" if self.path is None else self.path,
                timeout=60,
                check_same_thread=False,
                isolation_level=None,
            )
            self._base.create_function("crc", -1, crc, deterministic=True)
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
                "INSERT INTO spent VALUES (?1, ?2, ?3, crc(?1, ?2, ?3)) ON CONFLICT (teacher, account) "
                "DO UPDATE SET rows = rows + ?3, crc = crc(?1, ?2, rows + ?3)",
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

    def _create(self, path: Path) -> None:
        """Create the file with the permissions of the user's umask; SQLite has its own."""
        try:
            with path.open("xb"):
                return
        except FileExistsError:
            size = path.stat().st_size
        if 0 < size < SMALLEST:  # SQLite would write over it
            raise self.damaged(f"{size} bytes")
        if not size:
            log.warning(
                f"the cache of answers {path} is an empty file; answers that it held are paid for again"
            )

    def _open(self) -> None:
        application, version = (
            self._base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        empty = self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if (application, version) not in ((APPLICATION_ID, VERSION), (APPLICATION_ID, 1)) and not empty:
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
        with self._transaction():
            if self._base.execute("PRAGMA user_version").fetchone()[0] == 1:
                self._upgrade()
        for table, values in (("name", "id, text"), ("spent", "teacher, account, rows")):
            if self._base.execute(f"SELECT 1 FROM {table} WHERE crc IS NOT crc({values})").fetchone():
                raise self.damaged(f"the checksum of an entry of `{table}`")

    def _upgrade(self) -> None:
        columns = {row[1] for row in self._base.execute("PRAGMA table_info(answer)")}
        if "told" in columns:  # the first name of `content`
            self._base.execute("ALTER TABLE answer RENAME COLUMN told TO content")
        for statement in FROM_VERSION_1:
            self._base.execute(statement)

    def _name(self, text: str) -> int:
        with self._guarded(), self._transaction():
            # Without the index, which has no checksum: a name that it misses would be new, with nothing paid.
            known = self._base.execute("SELECT id FROM name NOT INDEXED WHERE text = ?", (text,)).fetchone()
            if known is not None:
                return int(known[0])
            number = self._base.execute("INSERT INTO name (text) VALUES (?)", (text,)).lastrowid
            self._base.execute("UPDATE name SET crc = crc(id, text) WHERE id = ?", (number,))
            return int(number or 0)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._base.in_transaction:  # a full disk has ended it
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
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                raise self.damaged(str(error)) from error
