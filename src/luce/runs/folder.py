"""Folders that belong to one recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .. import files
from ..config import read_yaml
from ..errors import UserError
from ..training.processes import processes


def folder_matches(folder: Path, name: str, recipe: dict[str, Any], **notes: str) -> bool:
    """Whether a folder holds this recipe; False for one that is free, as after a run that trained nothing.

    Raises:
        UserError: If it holds another recipe, or anything else.
    """
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if name in there and {**read_yaml(folder / name), **notes} == yaml.safe_load(
        _as_yaml({**recipe, **notes})
    ):
        return True
    if there and there != {name, "environment.json"}:
        what = f"another recipe, {name}" if name in there else "other files"
        raise UserError(f"{folder} already holds {what}; choose another folder (--out), or delete it")
    return False


def claim_folder(
    folder: Path, name: str, recipe: dict[str, Any], *, replace: bool = False, **notes: str
) -> None:
    """Make the folder and put the recipe into it, unless it is there already.

    Args:
        folder: To be used for this recipe alone.
        name: Of the file.
        recipe: Plain values.
        replace: Put it in the place of the recipe that is there.
        notes: Kept beside the recipe; they do not tell recipes apart.
    Raises:
        UserError: If the folder cannot be written or belongs to another recipe.
    """
    processes().wait_for_everyone()  # until all have seen the folder as it was
    with processes().main_process_first():
        if replace or not folder_matches(folder, name, recipe, **notes):
            files.make_folder(folder)
            files.write_text(folder / name, _as_yaml({**recipe, **notes}))


def _as_yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
