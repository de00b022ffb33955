"""Several methods, several seeds, several settings: one comparison folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias

from accelerate.utils import set_seed
from rich.progress import Progress

from .. import files
from ..errors import UserError
from ..models.loaders import fresh_weights_expected
from ..recipes.build import RunInputs, build_student, prepare_data
from ..recipes.methods import build_method
from ..recipes.schema import ComparisonRecipe, Recipe
from ..recipes.teacher import OpenTeacher, load_teacher, open_teacher
from ..training import checkpoint
from ..training.progress import Bar
from ..training.setup import new_accelerator
from .dry_run import dry_run
from .folder import claim_folder, folder_matches, identity_matches, normal, other, stored
from .identity import Identity, differences, of_inputs, of_peers, of_student
from .run import run

Grid: TypeAlias = dict[Path, tuple[str, Recipe]]
"""Setting and recipe of each run, by its folder."""
COMPARISON = "comparison.yaml"
NOTES = ("command",)
"""What the file holds beside the recipe."""


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
    inputs = {setting: prepare_data(one) for setting, one in dict(to_check).items()}
    left = [place for place in grid if not _is_finished(place)]
    for place in grid.keys() - set(left):
        checkpoint.clear(place)  # a run may have been killed just before
    if left or not _is_stored(folder, recipe):  # wrong values are told before another recipe
        _dry_runs(to_check, inputs)
        if recipe.teacher_training is not None:
            teacher = recipe.teacher_recipe()
            build_student(teacher, prepare_data(teacher).data)
    if not extends(folder, recipe):
        folder_matches(folder, COMPARISON, recipe, command=command)
        if not left:
            if recipe.teacher_training is not None and _is_finished(folder / "teacher"):
                run(recipe.teacher_recipe(), folder / "teacher")
            _open_teachers(recipe, folder, grid, inputs)
            return len(grid), len(grid)
    with files.locked(folder):
        return len(grid), _run_missing(recipe, folder, command, progress, grid, inputs)


def _run_missing(
    recipe: ComparisonRecipe,
    folder: Path,
    command: str,
    progress: Progress | None,
    grid: Grid,
    inputs: dict[str, RunInputs],
) -> int:
    """Run the recipes of the grid that are not finished, and return how many were."""
    grows = extends(folder, recipe)
    claim_folder(folder, COMPARISON, recipe, replace=grows, command=command)
    finished = sum(map(_is_finished, grid))
    with Bar(progress, "runs", len(grid), finished) as bar:
        if recipe.teacher_training is not None:
            bar.note("teacher")
            with fresh_weights_expected():  # the check above has warned of them
                run(recipe.teacher_recipe(), folder / "teacher", progress=progress)
        teachers = _open_teachers(recipe, folder, grid, inputs)
        shared: dict[str, RunInputs] = {}
        for place, (setting, one) in grid.items():
            if _is_finished(place):
                continue
            bar.note(f"{setting}, {one.method}, seed {one.training.seed}")
            accelerator = new_accelerator(one.training, place)
            opened, known = teachers[setting]
            if setting not in shared:  # data and teacher depend on neither method nor seed
                shared = {setting: load_teacher(inputs[setting], one, accelerator.device, opened)}
            with fresh_weights_expected():
                run(one, place, shared[setting], accelerator=accelerator, known=known, progress=progress)
            bar.advance()
    return finished


def _open_teachers(
    recipe: ComparisonRecipe, folder: Path, grid: Grid, inputs: dict[str, RunInputs]
) -> dict[str, tuple[OpenTeacher | None, Identity]]:
    """Open the teacher of each setting, and compare finished runs with what they would be made of now.

    A server is asked nothing, and a lost teacher is not missed, where no run is left.

    Returns:
        By setting, the teacher, and the identity of data and teacher.
    Raises:
        UserError: If a finished run was made of something else.
    """
    teachers: dict[str, tuple[OpenTeacher | None, Identity]] = {}
    students: dict[tuple[str, int], Identity] = {}
    left = {setting for place, (setting, _) in grid.items() if not _is_finished(place)}
    for place, (setting, one) in grid.items():
        if one.teacher is not None and recipe.teacher_training is not None:
            one.teacher.checkpoint = str(folder / "teacher")
        if setting not in teachers:
            available = one.teacher is None or (
                one.teacher.url is None
                and (recipe.teacher_training is None or _is_finished(folder / "teacher"))
            )
            asks = available or setting in left
            set_seed(recipe.seeds[0])  # for a network of the user that draws its weights
            opened = open_teacher(inputs[setting], one) if asks else None
            teachers[setting] = opened, of_inputs(inputs[setting], opened, teacher=asks)
        if _is_finished(place):
            data, seed = inputs[setting].data, one.training.seed
            with fresh_weights_expected():
                if (setting, seed) not in students:
                    students[setting, seed] = of_student(build_student(one, data)[0])
                peers = of_peers(build_method(one, data))
            identity_matches(place, {**teachers[setting][1], "student": students[setting, seed], **peers})
    return teachers


def _is_finished(folder: Path) -> bool:
    return (folder / "result.json").exists()


def _dry_runs(recipes: list[tuple[str, Recipe]], inputs: dict[str, RunInputs]) -> None:
    """Try every method in every setting, on one student per setting."""
    students = {}
    for setting, recipe in recipes:
        if setting not in students:
            students = {setting: build_student(recipe, inputs[setting].data)[0]}
        with name_method(recipe.method):
            dry_run(recipe, inputs[setting], students[setting])


def extends(folder: Path, recipe: ComparisonRecipe) -> bool:
    """Return whether a folder holds a comparison to which this one adds methods, settings or seeds.

    Raises:
        UserError: If it holds a comparison that differs otherwise.
    """
    if not (folder / COMPARISON).exists():
        return False
    there, here = stored(folder / COMPARISON, ComparisonRecipe, NOTES), normal(asdict(recipe))
    kept = {**here, **{name: there.get(name) for name in ("title", "question", "baseline")}}
    for name in ("methods", "settings"):
        old = there.get(name) or {}
        kept[name] = {key: value for key, value in here[name].items() if key in old}
    if set(there.get("seeds") or ()) <= set(here["seeds"]):
        kept["seeds"] = there.get("seeds")
    if found := list(differences(there, kept)):
        raise other(folder, f"another recipe, {COMPARISON}", found)
    return there != here


def _is_stored(folder: Path, recipe: ComparisonRecipe) -> bool:
    path = folder / COMPARISON
    return path.exists() and stored(path, ComparisonRecipe, NOTES) == normal(asdict(recipe))


@contextmanager
def name_method(method: str) -> Iterator[None]:
    """Prefix errors with the name of the method."""
    try:
        yield
    except UserError as error:
        raise UserError(f"method `{method}`: {error}") from error
