"""Options of the commands that start from a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config import merge, parse, read_yaml

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """A recipe, changes to it, and the folder of its results.

    Attributes:
        recipe: A YAML file, such as recipes/demo.yaml.
        overrides: Fields of the recipe that the command line sets.
        out: Folder of the results; runs/RECIPE if not given.
    """

    recipe: Path
    overrides: dict[str, Any]
    out: Path | None = None

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return self.out or Path("runs") / self.recipe.stem


def load_recipe(cls: type[T], path: Path, overrides: dict[str, Any]) -> T:
    """Read a recipe and lay fields from the command line over it.

    Raises:
        UserError: If the file cannot be read, or on an unknown field or a wrong value.
    """
    return parse(cls, merge(read_yaml(path), overrides))
