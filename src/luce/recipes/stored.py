"""The recipe that a run folder holds, which may come from anybody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import models
from ..config import merge, parse
from ..documents import read_yaml
from ..trust import refuse_code, texts, trusts, untrusted
from .schema import Recipe


def read_stored(path: Path, overrides: Mapping[str, Any], *, trusted: bool = False) -> Recipe:
    """Read the ``recipe.yaml`` of a run folder to evaluate the run; the recipe of a training is the user's.

    Args:
        path: Of the file.
        overrides: Fields that the user sets; the file may name what they name.
        trusted: Whether the file may name any code and any server.
    Raises:
        UserError: If it cannot be read or holds no recipe, or names code, options that may read other files,
            or a server that would receive rows.
    """
    recipe = parse(Recipe, merge(read_yaml(path), overrides))
    own = True if trusted else texts(overrides)
    refuse_code(recipe.data.name, path, own)
    for network in (recipe.student, recipe.teacher):
        if network is not None:
            models.check_description(network.name, network.options, path, own)
    teacher = recipe.teacher
    if teacher is not None and teacher.url is not None and teacher.test and not trusts(own, teacher.url):
        raise untrusted(path, f"the server {teacher.url}, which would receive the test rows")
    return recipe
