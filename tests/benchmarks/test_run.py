"""``python -m benchmarks`` from its options to the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import baselines, machine, measure, memory
from benchmarks.cases import CASES
from benchmarks.results import read_lines
from luce import ops

BRIEF = ("--skip-tests", "--threads", "1", "--seconds", "0.01")


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "read_load", lambda: 0.0)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device, threads: 20.0)


def run(*options: str) -> int:
    return command.main(["run", *options])


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refuses(*options: str) -> str:
        try:
            status = run(*options)
        except SystemExit as stopped:  # of argparse
            status = stopped.code
        assert status == 2
        return capsys.readouterr().err

    return refuses


def lines(path: str) -> list[dict]:
    return read_lines(Path(path))


def test_a_run_leaves_lines_and_pages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quick", *BRIEF) == 0
    answer = capsys.readouterr()
    assert answer.err.splitlines()[0] == "1/2 quick/kl/8x16/float32, threads 1"
    assert "results: benchmarks/results/cpu/results.jsonl.gz" in answer.out
    records = lines("benchmarks/results/cpu/results.jsonl.gz")
    assert [record["case"] for record in records] == [name for name in CASES if name.startswith("quick/")]
    for number, record in enumerate(records):
        assert record["id"] == f"{record['run']['id']}-{number:03d}"
        assert set(record["seconds"]) == {record["candidate"], *record["ratios"]}
        assert len(record["ratios"]) == 1
        assert record["rounds"] >= measure.FEWEST_ROUNDS
        assert record["run"]["tests"] == "not run: --skip-tests"
        assert record["run"]["environment"]["torch"] == torch.__version__
        assert "commit" in record["run"]["environment"]
    assert "quick/kl" in Path("benchmarks/results/cpu/README.md").read_text()


def test_every_number_of_threads_is_measured() -> None:
    assert run("quick/kl", *BRIEF, "--threads", "2,1", "--out", "r.jsonl.gz") == 0
    assert [record["threads"] for record in lines("r.jsonl.gz")] == [1, 2]
    assert torch.get_num_threads() == 1


def test_a_noisy_machine_is_reported_and_recorded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "read_load", lambda: 1.5)
    assert run("quick/kl", *BRIEF, "--out", "r.jsonl.gz") == 0
    assert "the machine is not quiet (load 1.50)" in capsys.readouterr().err
    records = lines("r.jsonl.gz")
    assert [(record["run"]["load"], record["run"]["quiet"]) for record in records] == [(1.5, False)]


def test_the_list_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list", "pld/exact/128x100"]) == 0
    wanted = "pld/exact/128x100/float32: PLD exact; eager PLD ≥ 9, aim 15; eager KD ≥ 1, aim 1.5\n"
    assert capsys.readouterr().out == wanted
    assert list(Path().iterdir()) == []


def test_compiled_baselines_are_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = dict.fromkeys(baselines.BASELINES, lambda inputs: inputs.student.sum())
    monkeypatch.setattr(baselines, "BASELINES", sums)
    resets: list[None] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    case = CASES["kd/kl+ce/128x100/float32"]
    figures = measure.measure_case(case, 1, seconds=0.001, compile=False)
    assert figures["failed"] == {"compiled eager KD": "only with --compile"}
    figures = measure.measure_case(case, 1, seconds=0.001, compile=True)
    assert set(figures["ratios"]) == {"eager KD", "compiled eager KD"}
    assert len(resets) == 1  # after eight shapes a compiled function would silently run as it is


def test_a_failure_to_measure_memory_costs_only_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(memory, "of", fail)
    figures = measure.measure_case(CASES["quick/kl/8x16/float32"], 1, seconds=0.001, compile=False)
    assert (figures["failed"], figures["memory"]) == ({"memory": "RuntimeError: killed"}, {})
    assert "eager kl_div" in figures["ratios"]


def test_a_candidate_that_fails_is_an_error_and_a_row(refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    def old(inputs) -> None:
        raise TypeError("kd_loss() got an unexpected keyword argument 'new'")

    monkeypatch.setitem(baselines.CANDIDATES, "KD", old)
    error = refuses("quick", *BRIEF, "--out", "r.jsonl.gz")
    assert "1 of 2 measurements failed; quick/kl/8x16/float32: not in this Luce: kd_loss() got" in error
    assert [bool(record["ratios"]) for record in lines("r.jsonl.gz")] == [False, True]
    assert "- KD: not in this Luce" in Path("README.md").read_text()


def test_a_stopped_run_keeps_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(inputs) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(baselines.CANDIDATES, "PLD", stop)
    with pytest.raises(KeyboardInterrupt):
        run("quick", *BRIEF, "--out", "r.jsonl.gz")
    assert [record["case"] for record in lines("r.jsonl.gz")] == ["quick/kl/8x16/float32"]
    assert Path("README.md").exists()


@pytest.mark.parametrize("body", [pytest.param("pass", marks=pytest.mark.slow), "assert 1 == 2"])
def test_failed_tests_mean_no_figures(body: str, refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = Path("checkout/tests/ops")
    tests.mkdir(parents=True)
    (tests / "test_op.py").write_text(f"def test_op():\n    {body}\n")
    monkeypatch.setattr(machine, "CHECKOUT", Path("checkout").absolute())
    options = ("quick/kl", *BRIEF[1:], "--out", "r.jsonl.gz")
    if body == "pass":
        assert run(*options) == 0
        assert lines("r.jsonl.gz")[0]["run"]["tests"] == "passed"
    else:
        error = refuses(*options)
        assert "expected the operators' tests to pass before anything is measured, got: failed: " in error
        assert "1 failed" in error
        assert not Path("r.jsonl.gz").exists()


def test_without_a_checkout_there_are_no_tests_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    assert machine.run_tests("cpu") == machine.run_tests("gpu") == "not run: this is no checkout"


def test_the_backend_describes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    described = {"backend": "cpu", "instruction_set": "x86-64-v4"}
    monkeypatch.setattr(ops, "describe", lambda: described, raising=False)
    environment = machine.describe_run("cpu", "passed", 0.1)["environment"]
    assert described.items() <= environment.items()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["pdl"], "unknown case `pdl`; did you mean `pld`"),
        (["--second", "3"], "unrecognized arguments: --second"),
        (["--seconds", "no"], "--seconds: expected seconds above 0, got 'no'"),
        (["--seconds", "nan"], "--seconds: expected seconds above 0, got 'nan'"),
        (["--seconds", "inf"], "--seconds: expected seconds above 0, got 'inf'"),
        (["--threads", "0,1"], "--threads: expected numbers of threads such as 1,2, got '0,1'"),
        (["--threads", "two"], "--threads: expected numbers of threads such as 1,2, got 'two'"),
        (["quick", "--out", "."], "expected a file after `--out`, got the folder ."),
    ],
)
def test_wrong_options(options: list[str], reason: str, refuses) -> None:
    assert reason in refuses(*options)
    assert list(Path().iterdir()) == []
