"""``python -m benchmarks.measures [TREE]``: size, documentation and public face of a checkout, as a table.

Counts are of syntax trees and of text; the tree's code runs only to list what ``import luce`` loads and, with
``--collect``, to count its test cases.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
LOSS = re.compile(r"\btvd_loss\b|\bTVDLoss\b")
"""A loss without a kernel: the files that name it are those that a new loss touches."""
PLD_OPTION = re.compile(r"\bepsilon: float \| None")
"""Stands in each signature or field list that repeats PLD's options, and nowhere else."""


@dataclass(frozen=True)
class Source:
    """What is counted of one file."""

    lines: int
    docstring_lines: int
    comment_lines: int
    functions: tuple[tuple[int, int], ...]
    public: tuple[bool, ...]
    asserts: int
    raises: int

    @classmethod
    def of(cls, path: Path) -> Source:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        nodes = list(ast.walk(tree))
        functions = [node for node in nodes if isinstance(node, FunctionNode)]
        comments = {
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
        }
        return cls(
            lines=len(text.splitlines()),
            docstring_lines=sum(map(_docstring_lines, nodes)),
            comment_lines=len(comments),
            functions=tuple((_length(f), _parameters(f)) for f in functions),
            public=tuple(ast.get_docstring(f) is not None for f in _public_functions(tree)),
            asserts=sum(isinstance(node, ast.Assert) for node in nodes),
            raises=sum(isinstance(node, ast.Raise) for node in nodes),
        )


def _docstring_lines(node: ast.AST) -> int:
    if not isinstance(node, ast.Module | ast.ClassDef | FunctionNode) or ast.get_docstring(node) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def _length(function: FunctionNode) -> int:
    """Lines of a function without its docstring and its decorators."""
    return (function.end_lineno or function.lineno) - function.lineno + 1 - _docstring_lines(function)


def _parameters(function: FunctionNode) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    rest = (arguments.vararg is not None) + (arguments.kwarg is not None)
    return sum(argument.arg not in ("self", "cls") for argument in named) + rest


def _public_functions(node: ast.Module | ast.ClassDef) -> Iterator[FunctionNode]:
    """Functions and methods without a leading underscore, of public classes too."""
    for child in node.body:
        if isinstance(child, FunctionNode) and not child.name.startswith("_"):
            yield child
        elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from _public_functions(child)


def _tail(values: Sequence[int]) -> str:
    """Median, 95th percentile and maximum."""
    if not values:
        return "-"
    return "/".join(f"{value:.0f}" for value in (*np.percentile(values, (50, 95)), max(values)))


def _row(name: str, sources: Sequence[Source], test_lines: int) -> list[str]:
    lines = sum(source.lines for source in sources)
    functions = [function for source in sources for function in source.functions]
    public = [documented for source in sources for documented in source.public]
    share = [
        sum(getattr(s, part) for s in sources) / max(lines, 1)
        for part in ("docstring_lines", "comment_lines")
    ]
    return [
        name,
        str(len(sources)),
        f"{lines:,}",
        _tail([source.lines for source in sources]),
        _tail([length for length, _ in functions]),
        _tail([parameters for _, parameters in functions]),
        f"{100 * share[0]:.0f}",
        f"{100 * share[1]:.1f}",
        f"{100 * sum(public) / max(len(public), 1):.0f}",
        f"{sum(s.asserts for s in sources)}/{sum(s.raises for s in sources)}",
        f"{test_lines:,} ({test_lines / max(lines, 1):.2f})",
    ]


def _python(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def _lines(paths: Sequence[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def size_table(tree: Path) -> list[list[str]]:
    """Return a row for the package and each of its folders."""
    package, tests = tree / "src/luce", tree / "tests"
    rows = [
        ["code", "files", "lines", "file med/p95/max", "function med/p95/max", "params med/p95/max", "doc %",
         "comment %", "public functions with doc %", "assert/raise", "test lines (ratio)"],
        _row("luce", [Source.of(path) for path in _python(package)], _lines(_python(tests))),
    ]  # fmt: skip
    for folder in sorted(path for path in package.iterdir() if path.is_dir() and _python(path)):
        sources = [Source.of(path) for path in _python(folder)]
        rows.append(_row(f"luce/{folder.name}", sources, _lines(_python(tests / folder.name))))
    return rows


def face_table(tree: Path, collect: bool) -> list[list[str]]:
    """Return measures of what users, contributors and a clone meet."""
    package = tree / "src/luce"
    naming = [path for path in _text_files(tree) if LOSS.search(_read(path))]
    inits = [package / "__init__.py", *(package / "losses").rglob("__init__.py")]
    options = [path for path in _python(package) for _ in PLD_OPTION.findall(_read(path))]
    tracked = _tracked(tree)
    rows = [
        ["measure", "value"],
        [
            "files that name tvd_loss or TVDLoss",
            f"{len(naming)}: {', '.join(sorted(p.name for p in naming))}",
        ],
        ["places of PLD's options", f"{len(options)} in {len(set(options))} files"],
        ["lines of luce/__init__.py", str(_lines(inits[:1]))],
        ["lines of the __init__ files of luce and losses", str(_lines(inits))],
        ["names in luce.__all__", _run(tree, "import luce; print(len(luce.__all__))")],
        ["modules that import luce loads beyond torch and numpy", _imported(tree)],
        ["README, bytes", str((tree / "README.md").stat().st_size)],
        ["tracked files, MB", f"{sum(path.stat().st_size for path in tracked) / 1e6:.1f}"],
        [
            "of these benchmarks/results, MB",
            f"{sum(p.stat().st_size for p in tracked if 'results' in p.parts) / 1e6:.1f}",
        ],
        ["lines in the wheel's Python", f"{_lines(_python(package)):,}"],
        [
            "lines of csrc",
            f"{_lines(sorted(p for p in (tree / 'csrc').rglob('*') if p.suffix in ('.h', '.cpp'))):,}",
        ],
        ["test functions", str(sum(_read(path).count("\ndef test_") for path in _python(tree / "tests")))],
    ]
    if collect:
        rows.append(["test cases, of which not slow", _cases(tree)])
    return rows


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _text_files(tree: Path) -> list[Path]:
    """Files in which a loss may be named: not results, recipes or studies, which merely use it."""
    tests = [path for path in _python(tree / "tests") if "benchmarks" not in path.parts]
    pages = [*tree.glob("*.md"), *(tree / "docs").rglob("*.md")]
    return [*_python(tree / "src"), *tests, *pages]


def _tracked(tree: Path) -> list[Path]:
    listed = subprocess.run(["git", "-C", str(tree), "ls-files"], capture_output=True, text=True, check=True)
    return [tree / name for name in listed.stdout.splitlines() if (tree / name).is_file()]


def _run(tree: Path, script: str, *, command: Sequence[str] = ("-c",)) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    done = subprocess.run(
        [sys.executable, *command, script], cwd=tree, env=environment, capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr.strip()[-300:]


def _imported(tree: Path) -> str:
    script = (
        "import torch, numpy, sys; before = set(sys.modules); import luce; new = set(sys.modules) - before; "
        "print(len(new), 'of which luce', sum(name.split('.')[0] == 'luce' for name in new))"
    )
    return _run(tree, script)


def _cases(tree: Path) -> str:
    options = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    counts = []
    for marker in ("", "not slow"):
        last = _run(tree, "tests", command=[*options, "-m", marker]).splitlines()[-1]
        counts.append(last.split()[0].partition("/")[0])
    return ", ".join(counts)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measures", description=__doc__)
    parser.add_argument(
        "tree", nargs="?", type=Path, default=Path.cwd(), help="a checkout; this one unless given"
    )
    parser.add_argument(
        "--collect", action="store_true", help="count the test cases too, which takes a minute"
    )
    options = parser.parse_args(argv)
    print(markdown(size_table(options.tree)), markdown(face_table(options.tree, options.collect)), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
