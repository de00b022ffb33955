"""``luce bench`` from the words to the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from luce import cli, ops
from luce.bench import contestants, measure, memory, runner
from luce.bench.cases import CASES

BRIEF = ("--skip-tests", "--threads", "1", "--seconds", "0.01")


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "load", lambda: 0.0)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda threads: 20.0)


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refuses(*words: str) -> str:
        assert cli.main(["bench", *words]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    return refuses


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_run_leaves_lines_and_pages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "quick", *BRIEF]) == 0
    answer = capsys.readouterr()
    assert answer.err == ""
    assert "results: benchmarks/results/cpu/results.jsonl" in answer.out
    found = lines("benchmarks/results/cpu/results.jsonl")
    assert [line["case"] for line in found] == [name for name in CASES if name.startswith("quick/")]
    for number, line in enumerate(found):
        assert line["id"] == f"{line['run']['id']}-{number:03d}"
        assert set(line["seconds"]) == {line["candidate"], *line["ratios"]}
        assert len(line["ratios"]) == 1
        assert line["rounds"] >= measure.FEWEST_ROUNDS
        assert line["run"]["tests"] == "skipped"
        assert line["run"]["environment"]["torch"] == torch.__version__
        assert "commit" in line["run"]["environment"]
    assert "quick/kl" in Path("benchmarks/results/cpu/README.md").read_text()


def test_every_number_of_threads_is_measured() -> None:
    assert cli.main(["bench", "quick/kl", *BRIEF, "--threads", "2,1", "--out", "r.jsonl"]) == 0
    assert [line["threads"] for line in lines("r.jsonl")] == [1, 2]
    assert torch.get_num_threads() == 1


def test_a_noisy_machine_is_said_and_recorded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "load", lambda: 1.5)
    assert cli.main(["bench", "quick/kl", *BRIEF, "--out", "r.jsonl"]) == 0
    assert "the machine is not quiet (load 1.50)" in capsys.readouterr().err
    assert [(line["run"]["load"], line["run"]["quiet"]) for line in lines("r.jsonl")] == [(1.5, False)]


def test_the_list_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "pld/exact/128x100", "--list"]) == 0
    wanted = "pld/exact/128x100/float32: PLD exact; eager PLD ≥ 9, aim 15; eager KD ≥ 1, aim 1.5\n"
    assert capsys.readouterr().out == wanted
    assert list(Path().iterdir()) == []


def test_compiled_baselines_are_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = dict.fromkeys(contestants.CONTESTANTS, lambda inputs: inputs.student.sum())
    monkeypatch.setattr(contestants, "CONTESTANTS", sums)
    resets: list[None] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    case = CASES["kd/kl+ce/128x100/float32"]
    found = runner.measure_case(case, 1, seconds=0.001, compile=False)
    assert found["failed"] == {"compiled eager KD": "only with --compile"}
    found = runner.measure_case(case, 1, seconds=0.001, compile=True)
    assert set(found["ratios"]) == {"eager KD", "compiled eager KD"}
    assert len(resets) == 1  # after eight shapes a compiled function would silently run as it is


def test_a_failure_to_measure_memory_costs_only_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(memory, "of", fail)
    found = runner.measure_case(CASES["quick/kl/8x16/float32"], 1, seconds=0.001, compile=False)
    assert (found["failed"], found["memory"]) == ({"memory": "killed"}, {})
    assert "eager kl_div" in found["ratios"]


def test_a_candidate_that_fails_is_an_error_and_a_row(refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    def old(inputs) -> None:
        raise TypeError("kd_loss() got an unexpected keyword argument 'new'")

    monkeypatch.setitem(contestants.CONTESTANTS, "KD", old)
    error = refuses("quick", *BRIEF, "--out", "r.jsonl")
    assert "1 of 2 measurements failed; quick/kl/8x16/float32: not in this Luce: kd_loss() got" in error
    assert [bool(line["ratios"]) for line in lines("r.jsonl")] == [False, True]
    assert "- KD: not in this Luce" in Path("README.md").read_text()


def test_a_stopped_run_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(inputs) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(contestants.CONTESTANTS, "PLD", stop)
    assert cli.main(["bench", "quick", *BRIEF, "--out", "r.jsonl"]) == 130
    assert [line["case"] for line in lines("r.jsonl")] == ["quick/kl/8x16/float32"]
    assert Path("README.md").exists()


@pytest.mark.parametrize(
    ("body", "green"), [("pass", True), ("assert 1 == 2", False), ("import nothing_x", False)]
)
def test_red_tests_mean_no_figures(body: str, green: bool, refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = Path("checkout/tests/ops")
    tests.mkdir(parents=True)
    (tests / "test_op.py").write_text(f"def test_op():\n    {body}\n")
    monkeypatch.setattr(runner, "CHECKOUT", Path("checkout").absolute())
    words = ("quick/kl", *BRIEF[1:], "--out", "r.jsonl")
    if green:
        assert cli.main(["bench", *words]) == 0
        assert lines("r.jsonl")[0]["run"]["tests"] == "passed"
    else:
        error = refuses(*words)
        assert "expected the ops' tests to pass before anything is measured, pytest said: " in error
        assert "1 failed" in error
        assert not Path("r.jsonl").exists()


def test_without_a_checkout_there_are_no_tests_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "CHECKOUT", tmp_path)
    assert runner.check_ops() == "not in this installation"


def test_the_backend_describes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ops, "describe", lambda: {"backend": "cpu", "instruction_set": "x86-64-v4"}, raising=False
    )
    found = runner.describe("passed", 0.1)["environment"]
    assert (found["backend"], found["instruction_set"]) == ("cpu", "x86-64-v4")
    monkeypatch.delattr(ops, "describe")
    assert "torch" in runner.describe("passed", 0.1)["environment"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["pdl"], "unknown case `pdl`; did you mean `pld`"),
        (["--second", "3"], "unrecognized arguments: --second; luce bench --help tells more"),
        (["--seconds", "no"], "--seconds: expected seconds above 0, got 'no'"),
        (["--seconds", "nan"], "--seconds: expected seconds above 0, got 'nan'"),
        (["--seconds", "inf"], "--seconds: expected seconds above 0, got 'inf'"),
        (["--threads", "0,1"], "--threads: expected numbers of threads such as 1,2, got '0,1'"),
        (["--threads", "two"], "--threads: expected numbers of threads such as 1,2, got 'two'"),
        (["quick", "--out", "."], "expected a file after `--out`, got the folder ."),
    ],
)
def test_wrong_words(words: list[str], reason: str, refuses) -> None:
    assert reason in refuses(*words)
    assert list(Path().iterdir()) == []
