"""What a file may name.

A recipe and a command line are programs of the user, and may name any code. A run folder, a checkpoint or a
packed file may come from anybody: what it names is built only if that runs no code of others and reads no
other file, or if the user trusts it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError

Trusted = bool | Collection[str]
"""Whether files may name anything, or the names that the user gave and that files may therefore repeat."""


def trusts(trusted: Trusted, name: str) -> bool:
    """Return whether the user trusts a name."""
    return trusted if isinstance(trusted, bool) else name in trusted


def untrusted(source: Path, what: str) -> UserError:
    """Return the error for something that a file names and nobody trusts."""
    return UserError(
        f"{source} names {what}; if you trust it, give the same name in your own recipe or options, or "
        "--trusted to a command that has this option (in Python trusted=True)"
    )


def refuse_code(name: str, source: Path, trusted: Trusted) -> None:
    """Refuse a name of a network or of data in a file if it would import a module.

    Args:
        name: Such as ``sklearn:digits`` or ``binary:python:package.network``.
        source: The file, for the error.
        trusted: See `Trusted`.
    Raises:
        UserError: If the name imports a module and is not trusted.
    """
    if "python" in name.split(":") and not trusts(trusted, name):
        raise untrusted(source, f"`{name}`, which runs code")


def texts(content: Any) -> set[str]:
    """Return all texts among the values of nested mappings and lists.

    >>> sorted(texts({"data": {"name": "fashion-mnist"}, "x": [1, "two"]}))
    ['fashion-mnist', 'two']
    """
    if isinstance(content, str):
        return {content}
    if isinstance(content, Mapping):
        content = content.values()
    elif not isinstance(content, list | tuple):
        return set()
    return {text for part in content for text in texts(part)}
