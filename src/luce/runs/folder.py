"""Folders that belong to one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import files
from ..documents import dump_yaml, load_yaml, read_yaml
from ..errors import UserError
from ..training.processes import processes


def folder_matches(folder: Path, name: str, recipe: dict[str, Any], **notes: str) -> bool:
    """Return whether a folder belongs to this recipe; False for a free one.

    A folder is free that is empty, or that holds only the recipe and the environment of a run that never
    trained. Temporary files of Luce do not count.

    Args:
        folder: To be used for this recipe.
        name: Of the file that holds the recipe, such as ``recipe.yaml``.
        recipe: Plain values.
        notes: Stored with the recipe.
    Raises:
        UserError: If it holds another recipe, or other files.
    """
    present = files.content(folder)
    if name in present and {**read_yaml(folder / name), **notes} == load_yaml(dump_yaml({**recipe, **notes})):
        return True
    if present not in (set(), {"environment.json"}, {name, "environment.json"}):
        content = f"another recipe, {name}" if name in present else "other files"
        raise UserError(f"{folder} already holds {content}; choose another folder (--out), or delete it")
    return False


def claim_folder(
    folder: Path, name: str, recipe: dict[str, Any], *, replace: bool = False, **notes: str
) -> None:
    """Create a folder and write the recipe into it, unless it is there already.

    Args:
        folder: To be used for this recipe alone.
        name: Of the file.
        recipe: Plain values.
        replace: Overwrite another recipe.
        notes: Stored with the recipe; they do not distinguish recipes.
    Raises:
        UserError: If the folder cannot be written or belongs to another recipe.
    """
    processes().wait_for_everyone()  # no process may write before all have checked the folder
    with processes().main_process_first():
        if replace or not folder_matches(folder, name, recipe, **notes):
            files.make_folder(folder)
            files.write_text(folder / name, dump_yaml({**recipe, **notes}))
