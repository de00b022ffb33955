"""The table of cases, and which of them a pattern selects."""

from __future__ import annotations

import pytest

from benchmarks import baselines
from benchmarks.cases import CASES, HIGHER_IS_BETTER, LONG_ROWS, PER_ALGORITHM, SIZES, Case, Goal, select
from luce.errors import UserError

KNOWN = {*baselines.CANDIDATES, *baselines.BASELINES}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_names_steps_that_exist_and_sane_goals(case: Case) -> None:
    steps = {case.candidate, *case.baselines}
    assert not {name for name in steps - KNOWN if not name.startswith("softmax ")}
    assert len(steps) == 1 + len(case.baselines)
    group, shape, dtype = case.name.rsplit("/", 2)
    assert (group, shape, dtype) == (case.group, f"{case.shape[0]}x{case.shape[1]}", case.dtype)
    for goal in case.goals:
        assert goal.against in (case.baselines if goal.measure == "speed" else ("", *case.baselines))
        assert goal.measure != "memory" or case.measures_memory
        assert goal.aim >= goal.least if goal.measure in HIGHER_IS_BETTER else goal.aim <= goal.least


def test_every_baseline_is_compared_with_something() -> None:
    used = {name for case in CASES.values() for name in (case.candidate, *case.baselines)}
    assert used >= KNOWN


@pytest.mark.parametrize("shape", SIZES)
def test_goals_of_exact_pld(shape: tuple[int, int]) -> None:
    for group in ("pld/exact", "pld/exact_normal"):
        goals = CASES[f"{group}/{shape[0]}x{shape[1]}/float32"].goals
        assert Goal(1.0, 1.5, "eager KD") in goals
        assert (Goal(9, 15, "eager PLD") if shape[1] == 100 else Goal(12, 20, "eager PLD")) in goals
        assert (Goal(1.5, 1.0, measure="memory") in goals) == (2 * 4 * shape[0] * shape[1] >= 8_000_000)


def test_pairs_of_classes_are_compared_where_they_fit() -> None:
    assert {case.shape for case in select(["rkkd"])} == {(128, 100), (1024, 100)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SIZES + LONG_ROWS)
def test_softmax_has_a_goal_at_every_size(shape: tuple[int, int], dtype: str) -> None:
    case = CASES[f"softmax/auto/{shape[0]}x{shape[1]}/{dtype}"]
    least = 1.8 if dtype == "float32" and shape[1] >= 1000 else 1.0
    assert case.goals == (Goal(least, 2.5, "torch.softmax"),)
    assert PER_ALGORITHM in case.baselines


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (Goal(9, 15, "eager PLD"), 8.99, "missed"),
        (Goal(9, 15, "eager PLD"), 9.0, "met"),
        (Goal(9, 15, "eager PLD"), 14.99, "met"),
        (Goal(9, 15, "eager PLD"), 15.0, "aim reached"),
        (Goal(9, 15, "eager PLD"), None, "not measured"),
        (Goal(1.5, 1.0, measure="memory"), 1.51, "missed"),
        (Goal(1.5, 1.0, measure="memory"), 1.5, "met"),
        (Goal(1.5, 1.0, measure="memory"), 1.0, "aim reached"),
        (Goal(20, 8, measure="microseconds"), 20.1, "missed"),
        (Goal(20, 8, measure="microseconds"), 7.9, "aim reached"),
        (Goal(0.6, 0.6, measure="copy"), 0.59, "missed"),
        (Goal(0.6, 0.6, measure="copy"), 0.6, "aim reached"),
        (Goal(1e-5, 1e-5, measure="value error"), float("nan"), "missed"),
    ],
)
def test_verdicts(goal: Goal, value: float | None, verdict: str) -> None:
    assert goal.verdict(value) == verdict


def test_patterns_select_cases_in_the_order_of_the_table() -> None:
    chosen = [case.name for case in select(["quick", "kd/kl"])]
    assert chosen == [name for name in CASES if name.startswith(("quick/", "kd/kl/"))]
    assert {case.group for case in select(["kd/kl*"])} == {"kd/kl", "kd/kl+ce"}
    assert {case.dtype for case in select(["pld/*/bfloat16"])} == {"bfloat16"}
    name = "pld/exact/1024x1000/float32"
    assert [case.name for case in select([name, name])] == [name]


def test_all_leaves_out_the_quick_cases() -> None:
    assert {case.name for case in select(["all"])} == {
        name for name, case in CASES.items() if case.device == "cpu" and not name.startswith("quick/")
    }


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("pdl", "`pld`"), ("pld/exactly", "`pld/exact`"), ("pld/exact/1024x1000/float23", "1000/float32`")],
)
def test_an_unknown_case_is_an_error_with_the_nearest(word: str, nearest: str) -> None:
    with pytest.raises(UserError, match=r"unknown case .* did you mean") as caught:
        select(["pld", word])
    assert nearest in str(caught.value)
