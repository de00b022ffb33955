"""Files that are whole or absent: written aside, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import UserError
from .processes import processes

FAILURES = (OSError, RuntimeError, SafetensorError)
"""What a full disk raises, by way of Python, of torch.save and of safetensors."""


def reason(error: Exception) -> str:
    """What went wrong, in a few words."""
    return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a file under a temporary name beside `path`, then give it its name.

    Of several processes that train together only the main one writes.
    """
    if not processes().is_main_process:
        return
    aside = path.with_name(f".{path.name}.part")
    try:
        fill(aside)
        os.replace(aside, path)
    except FAILURES as error:
        raise UserError(
            f"cannot write {path} ({reason(error)}); free some space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def make_folder(folder: Path) -> Path:
    """The folder, made if need be, and proved to be writable before any work goes into it."""
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
    """`make_folder` first; if the work within fails, the folders that were made are taken away again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # what holds something stays, and so does what is around it
            for path in made:
                path.rmdir()
        raise
