"""The studies that read run folders refuse an unfinished one in a sentence."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.results import read_lines

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
ACCURACIES = {"all": {"cross-entropy": [0.8, 0.81], "PLD": [0.9, 0.91], "PLD 2": [0.9, 0.92]}}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Run a script and return its exit status."""

    def script(name: str, *arguments: Path) -> object:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(STUDIES / name), run_name="__main__")
        return caught.value.code

    return script


@pytest.mark.parametrize("name", ["collect.py", "temperature.py"])
def test_a_comparison_without_a_finished_run(name: str, script, write_comparison, tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "none", {"all": {}}, methods=["cross-entropy"], seeds=[0])
    assert script(name, folder, tmp_path / "out").startswith(f"expected a finished run under {folder}, ")
    assert script(name, tmp_path / "nowhere", tmp_path / "out").startswith("cannot read ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lacking", "seeds"),
    [("PLD 2/seed-1", [0, 1]), ("PLD/seed-0", [0, 1]), ("", [0, 1, 2])],
    ids=["the last run", "the first run of a method", "a seed"],
)
def test_part_of_a_temperature_study(
    lacking: str, seeds: list[int], script, write_comparison, tmp_path: Path
) -> None:
    folder = write_comparison(tmp_path / "study", ACCURACIES, seeds=seeds)
    if lacking:
        (folder / "all" / lacking / "result.json").unlink()
    assert script("temperature.py", folder, tmp_path / "out") == (
        f"expected a finished comparison, got {folder}, of which runs are missing; "
        "finish it with `luce compare recipes/digits.yaml`"
    )
    assert not (tmp_path / "out").exists()


def test_part_of_a_comparison_is_collected_as_it_is(
    monkeypatch: pytest.MonkeyPatch, write_comparison, tmp_path: Path
) -> None:
    folder, out = write_comparison(tmp_path / "study", ACCURACIES), tmp_path / "out"
    (folder / "all" / "PLD" / "seed-1" / "result.json").unlink()
    monkeypatch.setattr(sys, "argv", ["collect.py", str(folder), str(out)])
    runpy.run_path(str(STUDIES / "collect.py"), run_name="__main__")
    assert len(read_lines(out / "runs.jsonl.gz")) == 5
    assert "| PLD |" in (out / "README.md").read_text()
