"""What a case records, and the file that keeps it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.cases import Case, Goal
from benchmarks.measure import Timing
from luce.errors import UserError


def test_a_ratio_is_the_median_of_ratios_within_rounds() -> None:
    case = Case("toy/a/1x1/float32", (1, 1), "candidate", ("baseline",), goals=(Goal(2, 4, "baseline"),))
    # The machine slows down by 10 in two of five rounds; each round alone says 3, 3, 3, 3 and 5.
    seconds = {"candidate": [1.0, 1.0, 1.0, 10.0, 10.0], "baseline": [3.0, 3.0, 5.0, 30.0, 30.0]}
    recorded = results.record(case, Timing(1, seconds, {}), {})
    # 80% of the way through the five sorted ratios lies 0.2 behind the fourth: 3 + 0.2 * (5 - 3).
    assert recorded["ratios"]["baseline"] == pytest.approx(
        {"median": 3, "p20": 3, "p80": 3.4, "of_medians": 5}
    )
    assert recorded["seconds"]["candidate"]["median"] == 1
    assert recorded["goals"][0]["value"] == 3
    assert recorded["goals"][0]["verdict"] == "met"
    assert recorded["rounds"] == 5


def test_goals_find_their_figures(figures) -> None:
    speed, memory, overhead = figures(times=4.0)["goals"]
    assert (speed["value"], speed["verdict"]) == (pytest.approx(4), "aim reached")
    assert (memory["value"], memory["verdict"]) == (1.25, "met")
    assert (overhead["value"], overhead["verdict"]) == (pytest.approx(10), "met")


def test_memory_over_a_baseline_is_a_share() -> None:
    goals = (Goal(1 / 8, 1 / 8, "held", "memory"), Goal(1 / 8, 1 / 8, "absent", "memory"))
    case = Case("toy/a/1x8/float32", (1, 8), "op", ("held", "absent"), goals=goals)
    figures = results.record(case, Timing(1, {}, {"absent": "not built"}), {"op": 2.0, "held": 10.0})
    assert [goal["value"] for goal in figures["goals"]] == [pytest.approx(0.2), None]
    assert [goal["verdict"] for goal in figures["goals"]] == ["missed", "not measured"]


def test_a_failed_candidate_has_no_ratios() -> None:
    case = Case("toy/a/1x8/float32", (1, 8), "op", ("bare",), goals=(Goal(2, 4, "bare"),))
    recorded = results.record(case, Timing(failed={"op": "not in this Luce"}), {})
    assert (recorded["ratios"], recorded["seconds"], recorded["rounds"]) == ({}, {}, 0)
    assert recorded["goals"][0]["verdict"] == "not measured"


def test_lines_are_added_and_the_latest_run_is_read(figures, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl.gz"
    added = [figures(run="one"), figures(run="two"), figures(run="two", threads=2)]
    for recorded in added:
        results.append(path, recorded)
    assert len(results.read_lines(path)) == 3
    assert results.read_latest(path) == json.loads(json.dumps(added[1:]))
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl.gz"]


def test_the_same_records_are_the_same_bytes(figures, tmp_path: Path) -> None:
    for name in "ab":
        results.write_lines(tmp_path / name, [figures()] * 50)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert 10 * (tmp_path / "a").stat().st_size < len(json.dumps(figures())) * 50


@pytest.mark.parametrize("text", ["", "{", "{}\n", "[]\n", b"{}\n", gzip.compress(b"{}\n", mtime=0)[:-4]])
def test_another_file_is_refused(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl.gz"
    path.write_bytes(text if isinstance(text, bytes) else gzip.compress(text.encode()))
    with pytest.raises(UserError, match=r"expected gzipped lines of .* in .*r\.jsonl\.gz"):
        results.read_latest(path)
