"""Several methods, several seeds, several settings: one comparison folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..config import parse
from ..errors import UserError, unknown_name
from .progress import Bar
from .recipe import (
    DataOptions,
    ModelOptions,
    Recipe,
    TeacherOptions,
    TrainingOptions,
    merge,
    read_yaml,
)
from .run import RunInputs, claim, dry_run, holds, load_teacher, method_of, prepare_data, run


@dataclass
class ComparisonRecipe:
    """One comparison: every method in every setting with every seed.

    Attributes:
        title: Of the report.
        question: That the comparison answers, in a sentence.
        baseline: The method that the others are compared with.
        seeds: One run each; methods are paired by them.
        data: Which data.
        student: The network to train.
        teacher: The network to learn from.
        teacher_training: How to train the teacher first, on all labels; None if its checkpoint or its
            options bring weights already.
        training: How to train the students.
        settings: By name, what differs from the above; ``description`` is a noun phrase for the report.
        methods: By name, the terms of the loss.
    """

    title: str = "Comparison"
    question: str = "Which method trains the best student?"
    baseline: str = "cross-entropy"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    data: DataOptions = field(default_factory=DataOptions)
    student: ModelOptions = field(default_factory=ModelOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    teacher_training: TrainingOptions | None = None
    training: TrainingOptions = field(default_factory=TrainingOptions)
    settings: dict[str, dict[str, Any]] = field(default_factory=lambda: {"all": {}})
    methods: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.baseline not in self.methods:
            raise unknown_name("baseline", self.baseline, self.methods)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"expected `seeds` as a list of different integers, got {self.seeds}")
        if not self.settings:
            raise UserError("expected at least one entry in `settings`, got none")
        for name in (*self.settings, *self.methods):
            if not name or name.startswith(".") or "/" in name or "\\" in name or name == "teacher":
                raise UserError(
                    "expected names of settings and methods that can name a folder beside that of the "
                    f"teacher, got `{name}`"
                )
        if self.teacher.url is not None and self.teacher_training is not None:
            raise UserError("expected no `teacher_training` beside `teacher.url`, whose teacher is trained")
        for name, changes in self.settings.items():
            for key in ("loss", "method"):
                if key in changes:
                    raise UserError(f"expected no `{key}` in setting `{name}`: all settings share `methods`")

    def recipe(self, setting: str, method: str, seed: int) -> Recipe:
        """The recipe of one run."""
        base = {name: asdict(getattr(self, name)) for name in ("data", "student", "teacher", "training")}
        changes = {key: value for key, value in self.settings[setting].items() if key != "description"}
        content = merge(base, changes, {"training": {"seed": seed}, "method": method})
        return parse(Recipe, {**content, "loss": self.methods[method]})

    def teacher_recipe(self) -> Recipe:
        """The recipe of the teacher, which learns from all labels by cross-entropy."""
        assert self.teacher_training is not None
        return Recipe(
            method="teacher",
            data=dataclasses.replace(self.data, labels_per_class=None, strong_augment="none"),
            student=ModelOptions(
                **{f.name: getattr(self.teacher, f.name) for f in dataclasses.fields(ModelOptions)}
            ),
            teacher=None,
            loss={"task": {"loss": "CrossEntropyLoss"}},
            training=self.teacher_training,
        )


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
        UserError: As `luce.training.run` does; all recipes are checked before the first run.
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
        holds(folder, "comparison.yaml", asdict(recipe), command=command)
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
    claim(folder, "comparison.yaml", asdict(recipe), replace=grows, command=command)
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
