"""Atomic writes and locks: a file is complete or absent, and a folder has one writer."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FAILURES = (OSError, RuntimeError, SafetensorError)
"""Errors of a full disk: Python raises the first, torch.save the second, safetensors the third."""
LOCK = ".lock"
TEMPORARY = re.compile(r"\.(lock|writable|.+\.part|report\.html\.\d+)")
"""Names of what Luce writes for a while and a killed process leaves, also one of an earlier version."""
_held: dict[Path, int] = {}
"""The thread that holds each locked folder."""
_descriptors: set[int] = set()
"""Of the files that lock them."""
LOGGER = logging.getLogger("luce")  # `luce.log` needs this module


def reason(error: Exception) -> str:
    """Return a short cause of `error`: the system's message or the first line of its text."""
    return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a temporary file in the folder of `path`, then rename it to `path`.

    The file is on the disk before it has its name, so a power cut leaves the old or the new one. A link stays
    a link: the file that it names is replaced. In a distributed run only the main process writes.

    Raises:
        UserError: If writing or renaming fails, or another process writes in the folder; an existing file
            keeps its content.
    """
    if not is_main_process():
        return
    # Beside the file itself, so on its file system, where a rename is atomic.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.part")
    try:
        with _lock(target.parent):  # two writers of one temporary file would mix their content
            try:
                temporary.unlink(missing_ok=True)
                temporary.touch()
                mode = temporary.stat().st_mode
                fill(temporary)
                settle(temporary, mode)
                rename(temporary, target)
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
    except FAILURES as error:
        raise UserError(
            f"cannot write {path} ({reason(error)}); free some space or choose another folder"
        ) from error


def settle(path: Path, mode: int) -> None:
    """Give a file the permissions `mode`, since safetensors admits nobody else, and bring it to the disk."""
    path.chmod(mode)
    _flush(path, os.O_RDWR)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, target: Path) -> None:
    """Rename a file or a folder; the new name is on the disk afterwards."""
    os.replace(path, target)
    if os.name != "nt":  # which cannot open a folder
        _flush(target.parent, os.O_RDONLY)


def content(folder: Path) -> set[str]:
    """Return the names in a folder without those of Luce's temporary files; none if there is no folder."""
    names = os.listdir(folder) if folder.is_dir() else []
    return {name for name in names if not TEMPORARY.fullmatch(name)}


def is_main_process() -> bool:
    """Return whether this process is the only one, or the first of those that were launched together."""
    # From the launcher's variables: Accelerate's state, once created, would fix the device of later runs.
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    write(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def make_folder(folder: Path) -> Path:
    """Create `folder` if it does not exist, check that it is writable, and return it.

    Raises:
        UserError: If it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have tried the folder at the same moment
    except OSError as error:
        raise _not_writable(folder, error) from error
    return folder


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"expected a folder that can be written to, got {folder} ({error.strerror}); choose another folder"
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create `folder`, and be the only process that writes in it during the block.

    The lock ends with the process, however that ends. The thread that holds it may lock the folder again.
    Files that a killed process left unfinished are removed. If the block raises, the folders created here
    are removed if they are empty. Of processes that were launched together the main one locks.

    Raises:
        UserError: If another process works in the folder, or it cannot be created or written to.
    """
    if not is_main_process():
        yield
        return
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    nested = _held.get(Path(os.path.realpath(folder))) == threading.get_ident()
    make_folder(folder)
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(_lock(folder))
            except OSError as error:
                raise _not_writable(folder, error) from error
            if not nested:
                for name in set(os.listdir(folder)) - content(folder) - {LOCK}:
                    _remove(folder / name)
            yield
    except BaseException:
        with suppress(OSError):  # rmdir refuses a folder with content, which must stay
            for path in created:
                path.rmdir()
        raise


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    place = Path(os.path.realpath(folder))
    if _held.get(place) == threading.get_ident():
        yield
        return
    descriptor = _locked_file(folder / LOCK)
    _held[place] = threading.get_ident()
    try:
        yield
    finally:
        del _held[place]
        if descriptor is not None:
            with suppress(OSError):
                (place / LOCK).unlink()  # the working directory may have changed
            os.close(descriptor)
            _descriptors.discard(descriptor)


def _locked_file(path: Path) -> int | None:
    """Return the descriptor of a locked file that names this process; None where files cannot be locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError("the system has no flock")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the second on some network drives
            os.close(descriptor)
            raise UserError(
                f"another process works in {path.parent}: {_owner(path)}; wait until it ends, or choose "
                "another folder"
            ) from None
        except OSError as error:
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            LOGGER.warning(
                "%s cannot be locked (%s); start no second process in it", path.parent, reason(error)
            )
            return None
        with suppress(FileNotFoundError):
            # The holder before may have removed the name after it was opened here: others lock a new file.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on host {socket.gethostname()} since {now}\n".encode())
    _descriptors.add(descriptor)
    return descriptor


def _owner(path: Path) -> str:
    """Return who holds a lock, as the file says; it may be locked a moment before it says so."""
    for _ in range(50):
        with suppress(OSError):
            if text := path.read_text(encoding="utf-8", errors="replace").strip():
                return text
        time.sleep(0.01)
    return "which one is not known"


def _part_from_locks() -> None:
    """Close the locks that a child process inherited: they would outlive this process with it."""
    for descriptor in _descriptors:
        with suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_part_from_locks)


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
