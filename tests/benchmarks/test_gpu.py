"""``make gpu-check`` without a GPU: its cases in small on the CPU, and a device that is made up."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import baselines, inputs, machine, measure, memory
from benchmarks.cases import CASES, HELD, PRODUCTS, Case, Goal, select
from benchmarks.results import read_lines

GPU_CASES = select(["all"], "gpu")


def small(case: Case) -> Case:
    return replace(case, shape=(4, 200 if "top_k" in case.candidate else 7), width=case.width and 3)


class Millisecond:
    """A timer for which every step takes a millisecond."""

    shortest = 0.0

    def prepare(self, batch) -> None:
        pass

    def __call__(self, work) -> float:
        work()
        return 1e-3


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if the CPU were a GPU that copies a gigabyte a second."""
    monkeypatch.chdir(tmp_path)
    for module in (inputs, measure, memory):
        monkeypatch.setattr(module, "device_of", lambda case: torch.device("cpu"))
    monkeypatch.setattr(measure, "GpuTimer", Millisecond)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device, threads: 1.0)
    monkeypatch.setattr(memory, "_peak_on_gpu", lambda name, case: case.array_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a made-up GPU")
    monkeypatch.setattr(command, "_check_gpu", lambda: None)
    monkeypatch.setattr(baselines, "_compiled", lambda function: function)
    cases = [small(case) for case in GPU_CASES if case.group in ("gpu/kd", "gpu/ce")][:4]
    monkeypatch.setattr(command, "select", lambda patterns, device: cases)


def run(*options: str) -> int:
    return command.main(["run", "--device", "gpu", "--seconds", "0.001", "--out", "r.jsonl.gz", *options])


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_every_candidate_and_own_baseline_runs(case: Case) -> None:
    """Except compiled ones and those of packages that are not installed here."""
    drawn = inputs.make(
        replace(small(case), device="cpu"), small(case).shape, torch.Generator().manual_seed(0)
    )
    for name in baselines.names(case):
        if not name.startswith(("compiled", "Liger", "TRL")):
            baselines.run(baselines.find(name), drawn, backward=case.backward)
    assert not any(tensor.grad is not None for tensor in drawn.tensors())


def test_goals_of_the_gpu_cases() -> None:
    groups = {case.group for case in GPU_CASES}
    assert {"gpu/kd", "gpu/pld", "gpu/pld_top_k", "gpu/ce", "gpu/linear_kd", "gpu/linear_pld"} <= groups
    for case in GPU_CASES:
        measures = {goal.measure for goal in case.goals}
        assert {"value error", "gradient error"} <= measures or (case.width and "memory" in measures)
    rounded = CASES["gpu/kd/8192x1000/bfloat16"].goals
    assert Goal(1e-5 + 2.0**-7, 1e-5 + 2.0**-7, measure="gradient error") in rounded
    assert Goal(0.6, 0.6, measure="copy") in rounded


@pytest.mark.parametrize(
    "group", ["gpu/kd", "gpu/pld", "gpu/ce", "gpu/jsd", "gpu/dkd", "gpu/rkkd", "gpu/suffix"]
)
def test_errors_are_those_of_the_dtype(group: str) -> None:
    case = next(case for case in GPU_CASES if case.group == group and case.dtype == "float32")
    errors = measure.errors_of(replace(case, shape=(8, 100), device="cpu"))
    bounds = {goal.measure: goal.least for goal in case.goals}
    for name, error in errors.items():
        assert error <= bounds[name]
    assert max(errors.values()) > 0


def test_a_wrong_kernel_has_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    right = baselines.CANDIDATES["KD"]
    wrong = lambda i, **more: right(i, **more) * (1 if more else 1.01)  # noqa: E731
    monkeypatch.setitem(baselines.CANDIDATES, "KD", wrong)
    case = replace(CASES["gpu/kd/8192x1000/float32"], shape=(8, 100), device="cpu")
    assert measure.errors_of(case) == pytest.approx({"value error": 0.01, "gradient error": 0.01}, rel=1e-2)


def test_a_run_is_recorded_and_judged(device, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--skip-tests") == 0
    records = read_lines(Path("r.jsonl.gz"))
    first, ce = records[0], records[-1]
    assert (first["case"], first["device"]) == ("gpu/ce/8192x1000/float32", "gpu")
    assert first["run"]["environment"]["device"] == "a made-up GPU"
    kd = next(record for record in records if record["group"] == "gpu/kd")
    # Both networks' logits and the gradient: three arrays of 4 x 7 numbers in a millisecond.
    assert kd["copy_share"] == pytest.approx(3 * 28 * (2 if kd["dtype"] == "bfloat16" else 4) / 1e6)
    assert ce["memory"]["CE" if "CE" in ce["memory"] else "KD"] == 1.0
    assert "Liger CE" in first["failed"]
    text = capsys.readouterr().out
    assert "of copy" in text
    assert "missed" in text
    assert Path("README.md").read_text().startswith("# GPU benchmarks")


def test_heads_are_compared_with_their_products(device) -> None:
    figures = measure.measure_case(
        small(CASES["gpu/linear_kd/8192x128256/bfloat16"]), 1, seconds=0, compile=True
    )
    assert {PRODUCTS, HELD, f"{HELD} in float32"} <= figures["ratios"].keys()
    speed, of_held = figures["goals"]
    assert (speed["value"], speed["verdict"]) == (pytest.approx(1.0), "aim reached")
    assert (of_held["value"], of_held["verdict"]) == (1.0, "missed")
    assert list(figures["failed"]) == ["Liger linear KD"]


def test_a_lost_device_keeps_earlier_figures(device, monkeypatch: pytest.MonkeyPatch) -> None:
    make = inputs.make

    def lost(case, *arguments):
        if case.candidate == "KD":
            raise torch.AcceleratorError("an illegal memory access was encountered")
        return make(case, *arguments)

    monkeypatch.setattr(inputs, "make", lost)
    assert run("--skip-tests") == 2
    records = read_lines(Path("r.jsonl.gz"))
    assert [bool(record["seconds"]) for record in records] == [r["candidate"] != "KD" for r in records]
    assert "illegal memory access" in Path("README.md").read_text()


@pytest.mark.parametrize(
    ("tests", "status"),
    [("passed", 0), ("not run: this is no checkout", 0), ("failed: 1", 1), ("not finished in 9 seconds", 1)],
)
def test_failed_tests_are_an_error_after_the_figures(
    tests: str, status: int, device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "run_tests", lambda device, seconds: tests)
    assert run() == status
    assert {record["run"]["tests"] for record in read_lines(Path("r.jsonl.gz"))} == {tests}


def test_cases_that_no_longer_fit_are_left_out(device, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--skip-tests", "--limit", "1e-9") == 0
    assert "no time left for the last 4 measurements" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_measuring(device, capsys) -> None:
    Path("file").write_text("")
    assert run("--skip-tests", "--out", "file/r.jsonl.gz") == 2
    assert "cannot write to file" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "--device", "gpu"]) == 2
    assert capsys.readouterr().err == "benchmarks: nothing was measured, there is no CUDA device\n"


def test_torch_and_numpy_are_enough() -> None:
    heavy = ["accelerate", "matplotlib", "rich", "safetensors", "scipy", "sklearn", "yaml"]
    script = f"import benchmarks.__main__, sys; print(*[name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout.strip()) == (0, "")
