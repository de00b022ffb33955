"""A case that costs nothing, and made-up figures for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.cases import Case, Goal
from benchmarks.measure import Timing
from benchmarks.results import Record, record
from tests.reports.conftest import write_comparison

GOALS = (Goal(2, 4, "eager KD"), Goal(1.5, 1.0, measure="memory"), Goal(20, 8, measure="microseconds"))
CASE = Case("toy/pld/8x16/float32", (8, 16), "PLD", ("eager KD", "scipy"), goals=GOALS)


@pytest.fixture
def figures() -> Callable[..., Record]:
    """The record of a case whose candidate takes 10 us a round and its baseline `times` as long."""

    def figures(times: float = 3.0, threads: int = 1, run: str = "r", **changes: Any) -> Record:
        seconds = {"PLD": [10e-6] * 5, "eager KD": [times * 10e-6] * 5}
        recorded = record(
            CASE, Timing(1, seconds, {"scipy": "not installed"}), {"PLD": 1.25, "eager KD": 5.0}
        )
        shared = {"id": run, "load": 0.1, "quiet": True, "tests": "passed", "environment": {"torch": "2.13"}}
        return {
            "id": f"{run}-{threads}",
            "threads": threads,
            "copy_gbps": 20.0,
            **recorded,
            "run": shared,
            **changes,
        }

    return figures


@pytest.fixture(name="write_comparison", scope="session")
def _write_comparison() -> Callable[..., Any]:
    return write_comparison
