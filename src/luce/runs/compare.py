"""Several methods, several seeds, several settings: one comparison folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.progress import Progress

from .. import files
from ..config import parse, read_yaml
from ..errors import UserError
from ..models.loaders import fresh_weights_expected
from ..recipes.build import RunInputs, build_student, prepare_data
from ..recipes.methods import build_method
from ..recipes.schema import ComparisonRecipe, Recipe
from ..recipes.teacher import load_teacher
from ..training.progress import Bar
from ..training.setup import new_accelerator
from .dry_run import dry_run
from .folder import claim_folder, folder_matches
from .run import run


def compare(
    recipe: ComparisonRecipe, folder: Path, command: str = "", progress: Progress | None = None
) -> tuple[int, int]:
    """Run all recipes of a comparison that are not finished, in ``folder/SETTING/METHOD/seed-N``.

    Args:
        recipe: To run.
        folder: Empty, or that of this comparison or of one to which it adds methods, settings or seeds.
        command: That runs it again, for the report.
        progress: Display that the comparison adds its bars to.
    Returns:
        Number of runs, and how many of them were finished before.
    Raises:
        UserError: As `luce.runs.run`; all recipes are checked before the first run starts. If another process
            works in the folder.
    """
    grid = {
        folder / setting / method / f"seed-{seed}": (setting, recipe.recipe(setting, method, seed))
        for setting in recipe.settings
        for seed in recipe.seeds
        for method in recipe.methods
    }
    # Recipes of other seeds differ in nothing that can fail.
    to_check = [(setting, one) for setting, one in grid.values() if one.training.seed == recipe.seeds[0]]
    for _, one in to_check:
        with name_method(one.method):
            build_method(one)
    if not extends(folder, recipe):
        folder_matches(folder, "comparison.yaml", asdict(recipe), command=command)
        if all((place / "result.json").exists() for place in grid):
            return len(grid), len(grid)
    with files.locked(folder):
        return len(grid), _run_missing(recipe, folder, command, progress, grid, to_check)


def _run_missing(
    recipe: ComparisonRecipe,
    folder: Path,
    command: str,
    progress: Progress | None,
    grid: dict[Path, tuple[str, Recipe]],
    to_check: list[tuple[str, Recipe]],
) -> int:
    """Run the recipes of the grid that are not finished, and return how many were."""
    grows = extends(folder, recipe)
    finished = sum((place / "result.json").exists() for place in grid)
    inputs = {setting: prepare_data(one) for setting, one in dict(to_check).items()}
    _dry_runs(to_check, inputs)
    if recipe.teacher_training is not None:
        teacher = recipe.teacher_recipe()
        build_student(teacher, prepare_data(teacher).data)
    claim_folder(folder, "comparison.yaml", asdict(recipe), replace=grows, command=command)
    with Bar(progress, "runs", len(grid), finished) as bar:
        if recipe.teacher_training is not None:
            bar.note("teacher")
            with fresh_weights_expected():  # the check above has warned of them
                run(recipe.teacher_recipe(), folder / "teacher", progress=progress)
        shared: dict[str, RunInputs] = {}
        for place, (setting, one) in grid.items():
            if (place / "result.json").exists():
                continue
            bar.note(f"{setting}, {one.method}, seed {one.training.seed}")
            if one.teacher is not None and recipe.teacher_training is not None:
                one.teacher.checkpoint = str(folder / "teacher")
            accelerator = new_accelerator(one.training, place)
            if setting not in shared:  # data and teacher depend on neither method nor seed
                shared = {setting: load_teacher(inputs[setting], one, accelerator.device)}
            with fresh_weights_expected():
                run(one, place, shared[setting], accelerator=accelerator, progress=progress)
            bar.advance()
    return finished


def _dry_runs(recipes: list[tuple[str, Recipe]], inputs: dict[str, RunInputs]) -> None:
    """Try every method in every setting, on one student per setting."""
    students = {}
    for setting, recipe in recipes:
        if setting not in students:
            students = {setting: build_student(recipe, inputs[setting].data)[0]}
        with name_method(recipe.method):
            dry_run(recipe, inputs[setting], students[setting])


def extends(folder: Path, recipe: ComparisonRecipe) -> bool:
    """Return whether a folder holds a comparison to which this one only adds methods, settings or seeds."""
    path = folder / "comparison.yaml"
    if not path.exists():
        return False
    try:
        old = parse(ComparisonRecipe, {k: v for k, v in read_yaml(path).items() if k != "command"})
    except UserError:  # a recipe of another version, or no comparison
        return False
    new_fields, old_fields = asdict(recipe), asdict(old)
    if new_fields == old_fields or not set(old.seeds) <= set(recipe.seeds):
        return False
    for part in ("methods", "settings"):
        if any(new_fields[part].get(name) != content for name, content in old_fields[part].items()):
            return False
    may_differ = ("title", "question", "baseline", "seeds", "methods", "settings")
    return all(new_fields[key] == old_fields[key] for key in new_fields if key not in may_differ)


@contextmanager
def name_method(method: str) -> Iterator[None]:
    """Prefix errors with the name of the method."""
    try:
        yield
    except UserError as error:
        raise UserError(f"method `{method}`: {error}") from error
