"""``luce train``: a run without a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..recipes import Recipe
from ._parser import recipe_fields
from ._recipe import RecipeOptions, load_recipe
from .distill import train


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """Train a teacher or a baseline from a recipe without a teacher.

    The fields of the recipe are options too and override the file. The same command resumes from the last
    checkpoint.

      luce train recipes/digits-teacher.yaml --training.epochs 10
    """

    overrides: dict[str, Any] = field(default_factory=dict, metadata=recipe_fields(Recipe))


def main(options: Options, _: str) -> None:
    """Train, and print the report."""
    recipe = load_recipe(Recipe, options.recipe, options.overrides)
    if recipe.teacher is not None:
        raise UserError("expected a recipe without a `teacher`; to train with one: luce distill RECIPE")
    train(recipe, options.folder)
