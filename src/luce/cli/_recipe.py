"""Options of the commands that start from a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config import merge, parse, read_yaml
from ..errors import UserError
from ..recipes import ComparisonRecipe, Recipe

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """A recipe, changes to it, and the folder of its results.

    Attributes:
        recipe: A YAML file, such as recipes/demo.yaml.
        overrides: Fields of the recipe that the command line sets. A whole mapping replaces the recipe's.
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
    """Read a recipe and override fields of it.

    Raises:
        UserError: If the file cannot be read or is for another command, or on an unknown or wrong field.
    """
    content = merge(read_yaml(path), overrides)
    if cls is Recipe and "methods" in content:
        raise UserError(
            f"expected the recipe of one run, got `methods` in {path}; to compare them: luce compare"
        )
    if cls is ComparisonRecipe and "loss" in content:
        raise UserError(f"expected `methods`, got `loss` in {path}; for one run: luce distill or luce train")
    return parse(cls, content)
