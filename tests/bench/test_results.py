"""What a case records, and the file that keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luce.bench import results
from luce.bench.cases import Case, Goal
from luce.bench.measure import Timing
from luce.errors import UserError


def test_a_ratio_is_the_median_of_ratios_within_rounds() -> None:
    case = Case("toy/a/1x1/float32", (1, 1), "ours", ("theirs",), goals=(Goal(2, 4, "theirs"),))
    # The machine slows down by 10 in two of five rounds; each round alone says 3, 3, 3, 3 and 5.
    seconds = {"ours": [1.0, 1.0, 1.0, 10.0, 10.0], "theirs": [3.0, 3.0, 5.0, 30.0, 30.0]}
    found = results.record(case, Timing(1, seconds, {}), {})
    # 80% of the way through the five sorted ratios lies 0.2 behind the fourth: 3 + 0.2 * (5 - 3).
    assert found["ratios"]["theirs"] == pytest.approx({"median": 3, "p20": 3, "p80": 3.4, "of_medians": 5})
    assert found["seconds"]["ours"]["median"] == 1
    assert found["goals"][0]["value"] == 3
    assert found["goals"][0]["verdict"] == "met"
    assert found["rounds"] == 5


def test_goals_find_their_figures(figures) -> None:
    speed, memory, overhead = figures(times=4.0)["goals"]
    assert (speed["value"], speed["verdict"]) == (pytest.approx(4), "aim reached")
    assert (memory["value"], memory["verdict"]) == (1.25, "met")
    assert (overhead["value"], overhead["verdict"]) == (pytest.approx(10), "met")


def test_overhead_over_a_baseline_is_the_difference() -> None:
    goals = (Goal(20, 8, "bare", "microseconds"), Goal(20, 8, "absent", "microseconds"))
    case = Case("toy/a/1x8/float32", (1, 8), "op", ("bare", "absent"), goals=goals)
    timing = Timing(1, {"op": [14e-6] * 5, "bare": [3e-6] * 5}, {"absent": "not built"})
    found = results.record(case, timing, {})
    assert [goal["value"] for goal in found["goals"]] == [pytest.approx(11), None]
    assert [goal["verdict"] for goal in found["goals"]] == ["met", "not measured"]


def test_a_failed_candidate_has_no_ratios() -> None:
    case = Case("toy/a/1x8/float32", (1, 8), "op", ("bare",), goals=(Goal(2, 4, "bare"),))
    found = results.record(case, Timing(failed={"op": "not in this Luce"}), {})
    assert (found["ratios"], found["seconds"], found["rounds"]) == ({}, {}, 0)
    assert found["goals"][0]["verdict"] == "not measured"


def test_lines_are_added_and_the_latest_run_is_read(figures, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    added = [figures(run="one"), figures(run="two"), figures(run="two", threads=2)]
    for found in added:
        results.append(path, found)
    assert len(path.read_text().splitlines()) == 3
    assert results.read_latest(path) == json.loads(json.dumps(added[1:]))
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize("text", ["", "{", "{}\n", "[]\n"])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"expected lines of `luce bench` in .*r\.jsonl"):
        results.read_latest(path)
