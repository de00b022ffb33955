"""Several methods, several seeds, several settings: one comparison folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.progress import Progress

from ..config import parse, read_yaml
from ..errors import UserError
from ..recipes.build import RunInputs, prepare_data
from ..recipes.methods import method_of
from ..recipes.schema import ComparisonRecipe
from ..recipes.teacher import load_teacher
from ..training.progress import Bar
from .dry_run import dry_run
from .folder import claim_folder, folder_matches
from .run import run


def extends(folder: Path, recipe: ComparisonRecipe) -> bool:
    """Whether the folder holds a comparison to which this one only adds methods, settings or seeds."""
    path = folder / "comparison.yaml"
    if not path.exists():
        return False
    try:
        old = parse(ComparisonRecipe, {k: v for k, v in read_yaml(path).items() if k != "command"})
    except UserError:  # of another version, or no comparison at all
        return False
    mine, theirs = asdict(recipe), asdict(old)
    if mine == theirs or not set(old.seeds) <= set(recipe.seeds):
        return False
    for part in ("methods", "settings"):
        if any(mine[part].get(name) != content for name, content in theirs[part].items()):
            return False
    may_differ = ("title", "question", "baseline", "seeds", "methods", "settings")
    return all(mine[key] == theirs[key] for key in mine if key not in may_differ)


def compare(
    recipe: ComparisonRecipe, folder: Path, command: str = "", progress: Progress | None = None
) -> tuple[int, int]:
    """Train whatever of a comparison is not there yet, in ``folder/SETTING/METHOD/seed-N``.

    Args:
        recipe: What to compare.
        folder: Holds nothing, this very comparison, or one that it adds methods, settings or seeds to.
        command: How to run it again, for the report.
        progress: Bars to show it on.
    Returns:
        How many runs there are, and how many of them were there before.
    Raises:
        UserError: As `luce.runs.run` does; all recipes are checked before the first run.
    """
    grid = {
        folder / setting / method / f"seed-{seed}": (setting, recipe.recipe(setting, method, seed))
        for setting in recipe.settings
        for seed in recipe.seeds
        for method in recipe.methods
    }
    for _, one in grid.values():
        if one.training.seed == recipe.seeds[0]:
            with about(one.method):
                method_of(one)
    grows = extends(folder, recipe)
    if not grows:
        folder_matches(folder, "comparison.yaml", asdict(recipe), command=command)
    done = sum((place / "result.json").exists() for place in grid)
    if done == len(grid) and not grows:
        return len(grid), done
    parts = {setting: prepare_data(one) for setting, one in dict(grid.values()).items()}
    for setting, one in grid.values():
        if one.training.seed == recipe.seeds[0]:
            with about(one.method):
                dry_run(one, parts[setting])
    if recipe.teacher_training is not None:
        prepare_data(recipe.teacher_recipe())
    claim_folder(folder, "comparison.yaml", asdict(recipe), replace=grows, command=command)
    with Bar(progress, "runs", len(grid), done) as bar:
        if recipe.teacher_training is not None:
            bar.note("teacher")
            run(recipe.teacher_recipe(), folder / "teacher", progress=progress)
        known: dict[str, RunInputs] = {}
        for place, (setting, one) in grid.items():
            if (place / "result.json").exists():
                continue
            bar.note(f"{setting}, {one.method}, seed {one.training.seed}")
            if one.teacher is not None and recipe.teacher_training is not None:
                one.teacher.checkpoint = str(folder / "teacher")
            if setting not in known:  # data and teacher do not depend on method or seed
                known = {setting: load_teacher(parts[setting], one)}
            run(one, place, known[setting], progress)
            bar.advance()
    return len(grid), done


@contextmanager
def about(method: str) -> Iterator[None]:
    """Say of which method an error is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"method `{method}`: {error}") from error
