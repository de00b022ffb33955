"""``luce distill`` and ``luce train``: one run."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError


def main(words: Sequence[str], command: str = "distill") -> None:
    from ..recipes.schema import Recipe
    from ..runs.run import run
    from ..training.processes import processes
    from ..training.progress import progress_bars
    from ._arguments import read_request
    from .report import show

    request = read_request(command, words, Recipe)
    if request is None:
        return
    if command == "distill" and request.recipe.teacher is None:
        raise UserError("expected `teacher` in the recipe; a training without one is: luce train RECIPE")
    if command == "train" and request.recipe.teacher is not None:
        raise UserError("the recipe has a `teacher`; use: luce distill RECIPE")
    with progress_bars() as progress:
        run(request.recipe, request.folder, progress=progress)
    show(request.folder)
    if processes().is_main_process:
        print(f"student: {request.folder / 'student.safetensors'}")
