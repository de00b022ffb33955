"""Options of the commands that start from a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config import merge, parse
from ..documents import Document, read_yaml
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
    document = read_yaml(path)
    content = merge(document, overrides)
    if cls is Recipe and "methods" in content:
        raise UserError(
            f"expected the recipe of one run, got `methods` in {path}; to compare them: luce compare"
        )
    if cls is ComparisonRecipe and "loss" in content:
        raise UserError(f"expected `methods`, got `loss` in {path}; for one run: luce distill or luce train")
    try:
        return parse(cls, content)
    except UserError as error:
        raise UserError(f"{_place(str(error), path, document, overrides)}{error}") from error


def _place(message: str, path: Path, document: Document, overrides: Mapping[str, Any]) -> str:
    """File and line of the field that an error names; empty for a field that the command line sets."""
    for name in re.findall(r"`([^`]+)`", message):
        inner: Any = overrides
        for key in name.split("."):
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if name in document.lines and inner is None:
            return f"{path}, line {document.lines[name]}: "
    return ""
