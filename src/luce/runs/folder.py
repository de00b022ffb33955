"""Folders that belong to one training or comparison."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import files
from ..config import parse
from ..documents import dump_yaml, load_yaml, read_json, read_yaml
from ..errors import UserError
from ..training.processes import processes
from .identity import Identity, differences, named

IDENTITY = "identity.json"
REMEDY = "choose another folder (--out, in Python `folder`), or delete it"
BEFORE_TRAINING = {"environment.json", IDENTITY}
"""What a run writes, with its recipe, before it trains."""
SERVICE = ("cache", "budget", "concurrency", "timeout", "retries", "token_env", "token_file")
NOT_COMPARED = {"data": ("root",), "student": ("checkpoint",), "teacher": ("checkpoint", *SERVICE)}
"""Fields of a recipe that change no number of a training.

Of paths an identity holds the content, so that a folder may be moved; the others are how a server is reached.
"""


def folder_matches(
    folder: Path, name: str, recipe: Any, identity: Identity | None = None, *, within: str = "", **notes: str
) -> bool:
    """Return whether a folder belongs to this recipe and this identity; False for a free one.

    A folder is free that is empty, or that holds only what a run writes before it trains. Temporary files of
    Luce do not count.

    Args:
        folder: To be used for this recipe.
        name: Of the file that holds the recipe, such as ``recipe.yaml``.
        recipe: A dataclass.
        identity: Of its training; parts that are missing here are not compared. None for a comparison.
        within: Prefix of the recipe's fields in messages.
        notes: Stored with the recipe; they do not distinguish recipes.
    Raises:
        UserError: If it holds another recipe, which names the differing fields, another training, or other
            files.
    """
    present = files.content(folder)
    if "metrics.jsonl" in present and not (folder / "metrics.jsonl").stat().st_size:  # no epoch has ended
        present.remove("metrics.jsonl")
    free = present <= {name, *BEFORE_TRAINING} and present != {name}
    if name not in present:
        if not free:
            raise UserError(f"{folder} already holds other files; {REMEDY}")
        return False
    there, here = stored(folder / name, type(recipe), notes), normal(asdict(recipe))
    if identity is not None:
        there, here = _compared(there), _compared(here)
    found = list(differences(there, here, within))
    if found and not free:
        raise other(folder, f"another recipe, {name}", found)
    if found or identity is None:
        return not found
    return identity_matches(folder, identity, free=present <= {name, *BEFORE_TRAINING})


def _compared(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        part: {key: value for key, value in fields.items() if key not in NOT_COMPARED[part]}
        if part in NOT_COMPARED and isinstance(fields, Mapping)
        else fields
        for part, fields in recipe.items()
    }


def identity_matches(folder: Path, identity: Identity, *, free: bool = False) -> bool:
    """Return whether the training in a folder has this identity; False for another one in a free folder.

    Raises:
        UserError: If the folder is not free, and holds another training or one without an identity.
    """
    path = folder / IDENTITY
    if not path.exists():
        if free:
            return False
        raise UserError(
            f"{folder} holds a training of an earlier version of Luce, without {IDENTITY}, so that its data, "
            f"networks and loss cannot be compared; {REMEDY}"
        )
    there = read_identity(folder)
    found = list(differences({key: there.get(key) for key in identity}, identity))
    if found and not free:
        raise other(folder, "another training", found)
    return not found


def read_identity(folder: Path) -> dict[str, Any]:
    """Return the identity that a folder holds; empty without a readable one.

    Raises:
        UserError: If the file is damaged.
    """
    return read_json(folder / IDENTITY) if (folder / IDENTITY).exists() else {}


def other(folder: Path, content: str, found: list[str]) -> UserError:
    """Return the error for a folder that holds something else, with the differences between both."""
    unseeded = [line.partition(":")[0] for line in found] == ["student.weights"]
    seed = "seed a new student by torch.manual_seed before you make it, " if unseeded else ""
    return UserError(f"{folder} already holds {content}; it differs in {named(found)}; {seed}{REMEDY}")


def claim_folder(
    folder: Path,
    name: str,
    recipe: Any,
    identity: Identity | None = None,
    *,
    within: str = "",
    replace: bool = False,
    **notes: str,
) -> bool:
    """Create a folder and write recipe and identity into it, unless they are there already.

    A recipe with other paths to the same content replaces the one that is there.

    Every process compares, and the main one writes.

    Args:
        folder: To be used for this recipe alone.
        name: Of the file.
        recipe: A dataclass.
        identity: Of its training; None for a comparison.
        within: Prefix of the recipe's fields in messages.
        replace: Overwrite another recipe.
        notes: Stored with the recipe; they do not distinguish recipes.
    Returns:
        Whether the folder belonged to them already.
    Raises:
        UserError: If the folder cannot be written or belongs to another recipe or training.
    """
    processes().wait_for_everyone()
    matches = not replace and folder_matches(folder, name, recipe, identity, within=within, **notes)
    processes().wait_for_everyone()  # no process may write before all have checked the folder
    if processes().is_main_process and not (matches and identity is None):
        files.make_folder(folder)
        if identity is not None and not matches:  # first: without it a recipe would be of an earlier version
            files.write_json(folder / IDENTITY, identity)
        files.write_text(folder / name, dump_yaml({**asdict(recipe), **notes}))
    processes().wait_for_everyone()
    return matches


def stored(path: Path, cls: type[Any], notes: Collection[str] = ()) -> dict[str, Any]:
    """Read a recipe; fields that an earlier version did not have get their defaults."""
    content = {key: value for key, value in read_yaml(path).items() if key not in notes}
    try:
        return normal(asdict(parse(cls, content)))
    except UserError:
        return content


def normal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as they would be read from YAML, where a tuple is a list."""
    normal: dict[str, Any] = load_yaml(dump_yaml(content))
    return normal
