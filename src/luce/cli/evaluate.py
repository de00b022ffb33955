"""``luce evaluate``: test metrics of a finished run's student."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..recipes import Recipe, read_stored
from ..runs import evaluate
from ._parser import recipe_fields


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print, as JSON, the test metrics of the exported student of a run.

    The fields of the run's recipe are options too: other data, or a teacher to compare the student with.

      luce evaluate runs/digits --data.name sklearn:digits --teacher.checkpoint runs/digits-teacher

    Attributes:
        folder: A finished run.
        match_classes: How the student's classes are matched with the data's: by name, or by position whatever
            their names are.
        trusted: Let the folder name code and servers of others, such as python: networks.
    """

    folder: Path
    match_classes: Literal["name", "position"] = "name"
    trusted: bool = False
    overrides: dict[str, Any] = field(default_factory=dict, metadata=recipe_fields(Recipe))


def main(options: Options, _: str) -> None:
    """Evaluate, and print the metrics."""
    if not (options.folder / "recipe.yaml").exists():
        raise UserError(
            f"expected the folder of a finished run, got {options.folder}; "
            "luce train and luce distill write one"
        )
    recipe = read_stored(options.folder / "recipe.yaml", options.overrides, trusted=options.trusted)
    figures = evaluate(options.folder, recipe, match_classes=options.match_classes, trusted=options.trusted)
    print(json.dumps(figures, indent=2))
