"""Errors that a user can mend, and the one door to optional packages."""

from __future__ import annotations

import difflib
import importlib
import textwrap
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """Something the user can mend: the message says what was expected, what came and what to do.

    The command line prints it as one sentence and exits with status 2.
    """


class MissingExtra(UserError, ImportError):
    """An optional package is needed and not installed."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a list: the nearest ones first, else all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    listed = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    hint = f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else f"known: {listed}"
    return UserError(f"unknown {kind} `{name}`; {hint}")


def said(error: Exception) -> str:
    """What another library says went wrong, in one line, as ours do."""
    return textwrap.shorten(str(error), 400, placeholder=" ...") or type(error).__name__


def import_optional(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say in one sentence which extra brings it."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision beside another torch raises RuntimeError
        package = module.partition(".")[0]
        raise MissingExtra(
            f"`{package}` could not be imported ({error}); install it with: pip install 'luce[{extra}]'"
        ) from error
