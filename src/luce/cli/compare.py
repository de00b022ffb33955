"""``luce compare``: several methods, seeds and settings."""

from __future__ import annotations

from collections.abc import Sequence


def main(words: Sequence[str]) -> None:
    from ..recipes.schema import ComparisonRecipe
    from ..runs.compare import compare
    from ..training.processes import processes
    from ..training.progress import progress_bars
    from ._arguments import read_request
    from .report import show

    request = read_request("compare", words, ComparisonRecipe)
    if request is None:
        return
    with progress_bars() as progress:
        runs, before = compare(request.recipe, request.folder, request.command, progress)
    if before and processes().is_main_process:
        print(f"{before} of {runs} runs were there already; delete {request.folder} to train them again")
    show(request.folder)
