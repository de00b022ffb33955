"""Errors with a message for the user, and the import of optional packages."""

from __future__ import annotations

import difflib
import importlib
import textwrap
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """An error that the user can correct: the message states what was expected, what was given, what to do.

    The command line prints the message and exits with status 2.
    """


class MissingExtra(UserError, ImportError):
    """An optional package is required and cannot be imported."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Return the error for a name that is not in `known`; it lists the closest matches, else all names."""
    known = sorted(known)
    plain = _plain(str(name))  # `pld_loss` is too unlike `PLDLoss` for difflib
    near = [n for n in known if _plain(n) == plain] or difflib.get_close_matches(
        str(name), known, n=3, cutoff=0.5
    )
    listed = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    hint = f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else f"known: {listed}"
    return UserError(f"unknown {kind} `{name}`; {hint}")


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first names, and the number of the others.

    >>> listed("abcde")
    'a, b, c and 2 more'
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(error: Exception) -> str:
    """Return the message of `error` on one line of at most 400 characters; its type if it has none."""
    return textwrap.shorten(str(error), 400, placeholder=" ...") or type(error).__name__


def import_optional(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        MissingExtra: If it cannot be imported; names the extra of Luce that installs it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError next to a wrong torch
        package = module.partition(".")[0]
        raise MissingExtra(
            f"`{package}` could not be imported ({error}); install it with: pip install 'luce[{extra}]'"
        ) from error
