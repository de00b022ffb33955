"""A mutant: one snippet of source replaced by another, and the tests that should notice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCES = ("src/luce/**/*.py", "csrc/**/*.h", "csrc/**/*.cpp")


class MutantError(Exception):
    """A snippet or a test path that does not fit the tree."""


@dataclass(frozen=True)
class Mutant:
    """A deliberate fault.

    Attributes:
        name: ``room/what is wrong``.
        tests: Paths in the checkout. One that has moved is found by its file name.
        changes: Alternative pairs (old, new) for different states of the tree: exactly one of them must fit.
            A snippet is found wherever it stands, and must stand at one place only.
    """

    name: str
    tests: tuple[str, ...]
    changes: tuple[tuple[str, str], ...]

    @property
    def native(self) -> bool:
        """Whether the library must be built again."""
        return self.name.startswith("csrc/")


def mutant(name: str, tests: str, *snippets: str) -> Mutant:
    """A mutant from test paths separated by spaces and from alternating old and new snippets."""
    return Mutant(name, tuple(tests.split()), tuple(zip(snippets[::2], snippets[1::2], strict=True)))


def read_sources(tree: Path) -> dict[Path, str]:
    paths = sorted(path for pattern in SOURCES for path in tree.glob(pattern))
    return {path.relative_to(tree): path.read_text(encoding="utf-8") for path in paths}


def apply(mutant: Mutant, sources: Mapping[Path, str]) -> tuple[Path, str]:
    """The file that changes, and its mutated text.

    Raises:
        MutantError: If none or several of the alternatives fit, or one stands at several places.
    """
    fitting = [(places, old, new) for old, new in mutant.changes if (places := list(_places(old, sources)))]
    if len(fitting) != 1 or len(fitting[0][0]) != 1:
        found = ", ".join(f"{old!r} in {', '.join(map(str, places))}" for places, old, _ in fitting)
        raise MutantError(
            f"{mutant.name}: expected one snippet at one place, got {found or 'none'}; correct the list"
        )
    (path,), old, new = fitting[0]
    return path, sources[path].replace(old, new)


def _places(snippet: str, sources: Mapping[Path, str]) -> Iterator[Path]:
    """The file of each occurrence."""
    for path, text in sources.items():
        yield from (path for _ in range(text.count(snippet)))


def locate_tests(tree: Path, paths: tuple[str, ...]) -> list[str]:
    """The paths that exist in the tree, looked up by file name where one has moved.

    Raises:
        MutantError: If none of them exists.
    """
    located = []
    for path in paths:
        if (tree / path).exists():
            located.append(path)
        elif len(moved := sorted((tree / "tests").rglob(Path(path).name))) == 1:
            located.append(str(moved[0].relative_to(tree)))
    if not located:
        raise MutantError(f"no tests at {', '.join(paths)} in {tree}")
    return located
