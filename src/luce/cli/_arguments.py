"""What the commands share: a recipe, a folder, and options laid over the recipe."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config import merge, overrides, parse, parser_of, read_yaml
from ..errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """A recipe, where to put its results, and the command that says so again."""

    recipe: Any
    folder: Path
    command: str


def read_request(command: str, words: Sequence[str], cls: type[Any]) -> Request | None:
    """``RECIPE [--out FOLDER] [--dotted.name value ...]``; None after printing help.

    Raises:
        UserError: If there is no recipe, or it or an option cannot be read.
    """
    if not words or "--help" in words or "-h" in words:
        parser = parser_of(
            cls,
            prog=f"luce {command}",
            usage=f"luce {command} RECIPE.yaml [--out FOLDER] [--dotted.name value ...]",
            description="Options are the fields of the recipe, given there or here. Results go to --out, "
            "runs/RECIPE unless given; the same command goes on where it stopped.",
        )
        parser.print_help(sys.stdout if words else sys.stderr)
        if words:
            return None
        raise UserError("expected a recipe, such as recipes/demo.yaml")
    path, *rest = words
    if path.startswith("--"):
        raise UserError(f"expected a recipe before the options, got `{path}`")
    folders = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    folders.add_argument("--out", type=Path, default=Path("runs") / Path(path).stem)
    try:
        request, rest = folders.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise UserError("expected a folder after `--out`") from error
    recipe = parse(cls, merge(read_yaml(Path(path)), overrides(rest)))
    return Request(recipe, request.out, shlex.join(["luce", command, *words]))


def single_folder(command: str, words: Sequence[str], text: str) -> Path | None:
    """``FOLDER`` alone; None after printing help."""
    if words and words[0] in ("-h", "--help"):
        print(f"usage: luce {command} FOLDER\n\n{text}")
        return None
    if len(words) != 1 or words[0].startswith("-"):
        raise UserError(f"expected one folder, such as: luce {command} runs/demo")
    return Path(words[0])
