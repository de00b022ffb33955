"""The comparison of two checkouts, with made-up processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import compare_trees


def test_every_loss_and_shape_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_trees, "SHAPES", ((4, 10), (2, 1001)))
    figures = compare_trees.measure(0.0, [1])
    names = {
        f"{loss} {shape}, threads 1" for loss in ("pld", "kd", "softmax") for shape in ("4x10", "2x1001")
    }
    assert figures.keys() == names
    assert min(figures.values()) > 0


def test_ratios_are_taken_within_a_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    order: list[str] = []

    def run_worker(tree: Path, python: Path, seconds: float, threads: list[int]) -> dict[str, float]:
        order.append(tree.name)
        drift = 1 + (len(order) - 1) // 2  # the machine slows down from round to round
        return {"kd 1x1, threads 1": drift * (3.0 if tree == old else 2.0)}

    monkeypatch.setattr(compare_trees, "run_worker", run_worker)
    assert compare_trees.main(["--before", str(old), "--after", str(new), "--rounds", "3"]) == 0
    assert order == ["old", "new", "new", "old", "old", "new"]
    row = capsys.readouterr().out.splitlines()[-1]
    assert row == "| kd 1x1, threads 1 | 6.000 | 4.000 | 1.500 | 1.500 | 1.500 |"


def test_a_tree_that_cannot_be_measured_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare_trees.sys, "executable", "false")
    with pytest.raises(RuntimeError, match=f"measuring {tmp_path} failed"):
        compare_trees.run_worker(tmp_path, Path("false"), 0.1, [1])
