"""Read what a page of the documentation tells its reader to type, and do it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from luce.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
BRIEF_TRAINING = ["--training.epochs", "2"]
# A test follows the path of a command, not the figures at its end: fewer epochs, seeds and examples.
BRIEF = {
    "train": BRIEF_TRAINING,
    "distill": BRIEF_TRAINING,
    "compare": ["--training.epochs", "1", "--teacher_training.epochs", "1", "--seeds", "[0]"],
    "check": ["--examples", "3"],
}
# The data of other recipes cannot be downloaded here: their networks and losses run on digits.
ON_DIGITS = ["--data.name", "sklearn:digits", "--settings.few-labels.data.labels_per_class", "20"]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """Return the words of each ``luce`` command in an indented block, and with arguments in a cell."""
    lines = re.findall(
        r"^(?:    luce (?P<block>.+)|\|.*\| `luce (?P<cell>\S+ [^`]+)` \|)$", text, re.MULTILINE
    )
    return [shlex.split(block or cell, comments=True) for block, cell in lines]


def blocks(text: str, language: str) -> list[tuple[str | None, str]]:
    """Return the fenced blocks of a language, each with its title."""
    fences = re.findall(rf'^```{language}(?: title="(.+?)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    return [(title or None, code) for title, code in fences]


def prepare(folder: Path) -> None:
    """Copy the recipes into an empty working directory."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")


def importable(command: Sequence[str]) -> bool:
    """Whether a command is about Luce, a file of the working directory or an installed library."""
    if command[0] != "check":
        return True
    package = command[1].split(":")[0].split(".")[0]
    return Path(f"{package}.py").exists() or importlib.util.find_spec(package) is not None


def run(command: Sequence[str]) -> None:
    """Run a command in the working directory, with less to do."""
    if command[0] == "serve":
        check_serves(command)
        return
    brief = [*BRIEF.get(command[0], []), *(ON_DIGITS if "fashion-mnist" in " ".join(command) else [])]
    status = main([*command, *brief])
    # `luce check` also shows what a loss breaks; what it must not do is fail.
    assert status in ((0, 1) if command[0] == "check" else (0,)), command


def check_serves(command: Sequence[str]) -> None:
    """Start a server, which does not return, and see it answer at the URL that it prints."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    arguments = [sys.executable, "-m", "luce", *command]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            (url,) = re.findall(r"http://\S+", "".join(server.stdout.readline() for _ in range(3)))
            with urllib.request.urlopen(f"{url}/healthz", timeout=60) as answer:
                assert answer.status == 200
        finally:
            server.kill()
