"""``luce distill``: a run with a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipes import Recipe
from ..runs import run
from ..training.processes import processes
from ..training.progress import progress_bars
from ._parser import recipe_fields
from ._recipe import RecipeOptions, load_recipe
from .report import show


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """Train a student from a teacher.

    The fields of the recipe are options too and override the file. The same command resumes from the last
    checkpoint.

      luce distill recipes/digits.yaml --training.epochs 10 --out runs/short
    """

    overrides: dict[str, Any] = field(default_factory=dict, metadata=recipe_fields(Recipe))


def main(options: Options, _: str) -> None:
    """Train, and print the report."""
    recipe = load_recipe(Recipe, options.recipe, options.overrides)
    if recipe.teacher is None:
        raise UserError("expected a `teacher` in the recipe; to train without one: luce train RECIPE")
    train(recipe, options.folder)


def train(recipe: Recipe, folder: Path) -> None:
    """Train what the recipe describes, and print the report."""
    with progress_bars() as progress:
        run(recipe, folder, progress=progress)
    show(folder)
    if processes().is_main_process:
        print(f"student: {folder / 'student.safetensors'}")
