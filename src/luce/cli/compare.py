"""``luce compare``: several methods, seeds and settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..recipes import ComparisonRecipe
from ..runs import compare
from ..training.processes import processes
from ..training.progress import progress_bars
from ._parser import recipe_fields
from ._recipe import RecipeOptions, load_recipe
from .report import show


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """Train with several methods and seeds, and report the differences.

    The fields of the recipe are options too and override the file. The same command skips finished runs and
    resumes from the last checkpoint.

      luce compare recipes/demo.yaml --seeds 0,1
    """

    overrides: dict[str, Any] = field(default_factory=dict, metadata=recipe_fields(ComparisonRecipe))


def main(options: Options, command_line: str) -> None:
    """Train, and print the report."""
    recipe = load_recipe(ComparisonRecipe, options.recipe, options.overrides)
    with progress_bars() as progress:
        runs, finished = compare(recipe, options.folder, command_line, progress)
    if finished and processes().is_main_process:
        print(f"skipped {finished} of {runs} runs, already finished; delete {options.folder} to repeat them")
    show(options.folder)
