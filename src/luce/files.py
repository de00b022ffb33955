"""Atomic writes: a file is complete or absent, never half written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError

FAILURES = (OSError, RuntimeError, SafetensorError)
"""Errors of a full disk: Python raises the first, torch.save the second, safetensors the third."""


def reason(error: Exception) -> str:
    """Return a short cause of `error`: the system's message or the first line of its text."""
    return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a temporary file in the folder of `path`, then rename it to `path`.

    In a distributed run only the main process writes.

    Raises:
        UserError: If writing or renaming fails; an existing file keeps its content.
    """
    if not is_main_process():
        return
    # In the same folder, so on the same file system, where a rename is atomic.
    temporary = path.with_name(f".{path.name}.part")
    try:
        fill(temporary)
        os.replace(temporary, path)
    except FAILURES as error:
        raise UserError(
            f"cannot write {path} ({reason(error)}); free some space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"expected a folder that can be written to, got {folder} ({error.strerror}); "
            "choose another with --out"
        ) from error
    return folder


@contextmanager
def folder_for_work(folder: Path) -> Iterator[None]:
    """Create `folder` for the block; if the block raises, remove the folders created here that are empty."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # rmdir refuses a folder with content, which must stay
            for path in created:
                path.rmdir()
        raise
