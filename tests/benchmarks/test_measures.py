"""The measures of a checkout, on a package small enough to count by hand."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import measures

MODULE = '''"""Two lines
of docstring."""

# one comment
import os


def documented(a, /, b, *rest, c=1, **more):
    """One line."""
    assert a
    raise ValueError  # another comment


class Public:
    def method(self, x):
        return x

    def _private(self):
        pass


class _Hidden:
    def method(self):
        pass
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "src/luce/__init__.py": "__all__ = ['tvd_loss']\n",
        "src/luce/losses/reweighted.py": "def tvd_loss(epsilon: float | None = None):\n    pass\n",
        "src/luce/losses/other.py": MODULE,
        "csrc/kernel.h": "int x;\n",
        "tests/losses/test_other.py": "\ndef test_it():\n    pass\n",
        "README.md": "TVDLoss, not TVDLosses\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for command in (["init", "-q"], ["add", "README.md"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def test_a_file_counted_by_hand(tree: Path) -> None:
    source = measures.Source.of(tree / "src/luce/losses/other.py")
    assert (source.lines, source.docstring_lines, source.comment_lines) == (24, 3, 2)
    # Lengths are without the docstring, parameters without self.
    assert source.functions == ((3, 5), (2, 1), (2, 0), (2, 0))
    assert source.public == (True, False)
    assert (source.asserts, source.raises) == (1, 1)


def test_the_tables_of_a_tree(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measures, "_imported", lambda tree: "unknown")  # it imports torch
    assert measures.main([str(tree)]) == 0
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()
    ]
    values = {row[0]: row[1:] for row in rows}
    assert values["luce/losses"][:2] == ["2", "26"]
    assert values["luce/losses"][-1] == "3 (0.12)"
    assert values["places of PLD's options"] == ["1 in 1 files"]
    assert values["files that name tvd_loss or TVDLoss"] == ["3: README.md, __init__.py, reweighted.py"]
    assert values["names in luce.__all__"] == ["1"]
    assert values["test functions"] == ["1"]
    assert values["README, bytes"] == ["23"]
