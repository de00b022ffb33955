"""The list of mutants fits the source, and a mutant in a toy checkout is noticed or not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.mutants.__main__ import MUTANTS, main
from benchmarks.mutants.mutant import Mutant, MutantError, apply, locate_tests, mutant, read_sources

ROOT = Path(__file__).parents[2]
SOURCES = read_sources(ROOT)


@pytest.mark.parametrize("listed", MUTANTS, ids=lambda listed: listed.name)
def test_every_mutant_fits_one_place_and_has_tests(listed: Mutant) -> None:
    path, text = apply(listed, SOURCES)
    assert text != SOURCES[path]
    assert locate_tests(ROOT, listed.tests)


def test_rooms_and_number() -> None:
    names = [listed.name for listed in MUTANTS]
    assert len(set(names)) == len(names) >= 66
    assert sum(listed.native for listed in MUTANTS) >= 8


def test_a_snippet_must_stand_at_one_place() -> None:
    sources = {Path("a.py"): "x = 1\nx = 1\n", Path("b.py"): "y = 2\n"}
    assert apply(mutant("m", "t", "z", "", "y = 2", "y = 3"), sources) == (Path("b.py"), "y = 3\n")
    for snippets in (("x = 1", "x = 2"), ("z", ""), ("y = 2", "y = 3", "x = 1\ny", "")):
        if snippets[0] != "y = 2":
            with pytest.raises(MutantError, match="expected one snippet at one place"):
                apply(mutant("m", "t", *snippets), sources)
    with pytest.raises(MutantError, match="expected one snippet at one place"):
        apply(mutant("m", "t", "y = 2", "y = 3", "y", "z"), sources)


SOURCE = """def double(x):
    return 2 * x


def untested(x):
    return x + 1


def stuck():
    return False
"""
TEST = """import time
import luce


def test_double():
    while luce.stuck():
        time.sleep(1)
    assert luce.double(2) == 4
"""


@pytest.mark.slow
def test_mutants_of_a_toy_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "tree"
    (tree / "src/luce").mkdir(parents=True)
    (tree / "tests/moved").mkdir(parents=True)
    (tree / "src/luce/__init__.py").write_text(SOURCE)
    (tree / "tests/moved/test_it.py").write_text(TEST)
    toys = (
        mutant("toy/killed", "tests/test_it.py", "2 * x", "3 * x"),
        mutant("toy/survives", "tests/test_it.py", "x + 1", "x + 2"),
        mutant("toy/endless", "tests/test_it.py", "return False", "return True"),
        mutant("toy/broken", "tests/test_it.py", "def double(x)", "def double(x"),
    )
    monkeypatch.setattr("benchmarks.mutants.__main__.MUTANTS", toys)
    out = tmp_path / "out.json"
    options = ["--tree", str(tree), "--python", sys.executable, "--limit", "20", "--out", str(out)]
    assert main(options) == 0
    outcomes = {outcome["name"]: outcome for outcome in json.loads(out.read_text())}
    assert {name: outcome["verdict"] for name, outcome in outcomes.items()} == {
        "toy/killed": "killed",
        "toy/survives": "survived",
        "toy/endless": "timeout",
        "toy/broken": "error",
    }
    assert outcomes["toy/killed"]["by"] == "tests/moved/test_it.py::test_double"
    assert (tree / "src/luce/__init__.py").read_text() == SOURCE
    assert "4 mutants: 1 killed, 1 survived, 1 timeout, 1 error" in capsys.readouterr().out
    (tree / "tests/moved/test_it.py").write_text(TEST.replace("== 4", "== 5"))
    assert main(options) == 2
    assert "the tests must pass before anything is mutated" in capsys.readouterr().err
