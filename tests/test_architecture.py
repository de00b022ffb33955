"""Rooms of the package import in one direction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import luce

ROOT = Path(luce.__file__).parent
FLOORS = ["ops", "losses", "methods", "training", "recipes", "runs", "cli"]
"""From the lowest to the highest: a room imports from lower ones only."""
LEAVES = ["data", "models", "signals", "remote"]
"""Rooms that know nothing of how a student is trained; `signals` reads features through `models`."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    names = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``, which never run."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            yield from nodes(node)


def imports(name: str) -> Iterator[str]:
    """Modules of the package that a module imports, within functions too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            source = node.module if node.level == 0 else f"{base}.{node.module}" if node.module else base
            for alias in node.names:
                if (target := f"{source}.{alias.name}") in MODULES:
                    yield target
                elif source in MODULES:
                    yield source


def room(name: str) -> str:
    """The first part of a name below the package; empty for the package itself."""
    return name.partition(".")[2].partition(".")[0]


ARROWS = {(room(name), room(target)) for name in MODULES for target in imports(name)}


def test_the_arrows_are_those_of_the_tree() -> None:
    """Guards the parser: it sees relative and late imports."""
    assert {("runs", "recipes"), ("recipes", "training"), ("cli", "runs"), ("methods", "losses")} <= ARROWS


@pytest.mark.parametrize(("floor", "name"), list(enumerate(FLOORS)))
def test_no_room_imports_from_a_higher_one(floor: int, name: str) -> None:
    higher = set(FLOORS[floor + 1 :])
    assert {target for source, target in ARROWS if source == name} & higher == set()


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_know_nothing_of_training(name: str) -> None:
    assert {target for source, target in ARROWS if source == name} & {*FLOORS[2:], "reports"} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports within functions count: they hide a circle and do not undo it."""
    graph = {
        name: {target for target in imports(name) if target != name and not name.startswith(f"{target}.")}
        for name in MODULES
        if name != "luce"  # which imports its parts when they are asked for
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules in a circle: {' -> '.join(error.args[1])}")
