"""``luce evaluate``: figures of a finished run's student."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..errors import UserError

USAGE = """usage: luce evaluate FOLDER [--data.name NAME ...] [--teacher.checkpoint FOLDER ...]

Print, as JSON, the test figures of the exported student in a run folder: on the data of its recipe, or on
that of the options. With a teacher, in the recipe or in the options, also how far the student follows it."""


def main(words: Sequence[str]) -> None:
    from pathlib import Path

    from ..config import merge, overrides, parse, read_yaml
    from ..recipes.schema import Recipe
    from ..runs.evaluate import evaluate

    if words and words[0] in ("-h", "--help"):
        print(USAGE)
        return
    if not words or words[0].startswith("-"):
        raise UserError("expected a run folder, such as: luce evaluate runs/digits")
    folder = Path(words[0])
    recipe = parse(Recipe, merge(read_yaml(folder / "recipe.yaml"), overrides(words[1:])))
    print(json.dumps(evaluate(folder, recipe), indent=2))
