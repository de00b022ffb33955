"""Digests of a folder's files, kept beside them: a damaged file is noticed before it is used."""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterable
from pathlib import Path

from . import digest, files, log
from .documents import read_json
from .errors import UserError

NAME = "digests.json"


def write(folder: Path, names: Iterable[str]) -> None:
    """Write the digests of these files of a folder; write it last, when they are complete.

    Raises:
        UserError: If it cannot be written.
    """
    files.write_json(folder / NAME, {name: digest.of_file(folder / name) for name in sorted(names)})


def read(folder: Path) -> dict[str, str] | None:
    """Return the digests of a folder by name of the file; None if it has none.

    Raises:
        UserError: If they cannot be read.
    """
    path = folder / NAME
    return read_json(path) if path.exists() else None


def check(folder: Path, names: Collection[str] = (), *, remedy: str = "") -> None:
    """Compare files with their digests; a folder of an older version has none, which is logged.

    Args:
        folder: Of the files.
        names: The files to compare; all that have a digest unless given.
        remedy: What to do about a damaged one, for the end of the error.
    Raises:
        UserError: If a file is damaged or missing; names it.
    """
    known = read(folder)
    if known is None:
        log.info(f"{folder} was written without {NAME}, so its files are not checked for damage")
        return
    end = remedy and f"; {remedy}"
    for name in names or known:
        path = folder / name
        try:
            # Reading a pipe or a device, which the list of a stranger may name, might not end.
            regular = stat.S_ISREG(path.stat().st_mode)
            intact = regular and digest.of_file(path) == known.get(name)
        except OSError as error:
            raise UserError(f"cannot read {path} ({files.reason(error)}){end}") from error
        if name not in known:
            raise UserError(f"{folder / NAME} has no digest of {name}{end}")
        if not intact:
            raise UserError(f"{path} is damaged: it differs from its digest in {NAME} beside it{end}")
