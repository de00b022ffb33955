"""``make gpu-check``, as far as it goes without a GPU: tiny cases on the CPU, and a clock that is made up."""

from __future__ import annotations

import json
import math

import pytest
import torch

from luce.bench import gpu
from luce.bench.gpu import BASELINES, CASES, COMPILED, ERRORS, HELD, OURS, Case, check, verdicts
from luce.bench.gpu_report import page
from luce.cli.bench import main as command
from luce.errors import UserError

TINY = (
    Case("KD", (4, 7), "float32", ("eager KD",), copy_share=0.6, at_least={"eager KD": 2}),
    Case("KD", (4, 7), "bfloat16", ("a loss that nobody has",)),
    Case("PLD", (4, 7), "float32", ("eager PLD",), at_least={"eager PLD": 1.5}),
    Case("CE", (4, 7), "float32", ("eager CE",)),
)


def timed(run):
    """Runs it; a millisecond each time."""
    run()
    return 1.0


@pytest.fixture
def found(monkeypatch):
    def missing(s, t, y):
        raise ModuleNotFoundError("No module named 'nobody'")

    monkeypatch.setitem(BASELINES, "a loss that nobody has", missing)
    return check(
        torch.device("cpu"), timed, TINY, "reference", tests="passed", head=(3, 4, 5), elements=64, side=8
    )


def test_everything_is_measured(found):
    json.dumps(found)
    assert [case["case"] for case in found["cases"]] == [case.name for case in TINY]
    assert found["cases"][1]["failed"] == {
        "a loss that nobody has": "ModuleNotFoundError: No module named 'nobody'"
    }
    assert found["cases"][0]["milliseconds"] == {"ours": 1.0, "eager KD": 1.0}
    # Three arrays of 4 x 7 numbers in the time that copying 64 takes.
    assert found["cases"][0]["copy_share"] == pytest.approx(3 * 28 / (2 * 64))
    assert found["cases"][3]["copy_share"] == pytest.approx(2 * 28 / (2 * 64))
    assert set(found["heads"]["milliseconds"]) == {"linear_kd", "linear_pld", HELD, f"{HELD} in float32"}
    assert list(found["heads"]["failed"]) == ["Liger linear KD"]


def test_everything_is_said(found):
    said = page(found).splitlines()
    assert said[0].startswith(f"cpu, PyTorch {torch.__version__}, Triton ")
    assert "reached  KD 4x7 float32: 0.66 of the copy limit, goal 0.6" in said
    assert "MISSED   KD 4x7 float32: 1.0 times as fast as eager KD, goal 2" in said
    assert "reached  linear_kd: 1.00 times the products, goal 1.5" in said
    assert any(line.split()[:3] == ["KD", "4x7", "bfloat16"] for line in said)
    assert any(line.split() == ["linear_kd", "1.00", "1.00", "-"] for line in said)
    assert said[-1] == "7 of 9 goals reached on cpu; tests passed"


def test_errors_are_judged():
    case = Case("KD", (4, 7), "float32")
    base = {"failed": {}, "milliseconds": {"ours": 1.0}}
    for errors, reached in (
        ((1e-6, 1e-6), True),
        ((1e-6, 1e-3), False),
        ((1e-3, 1e-6), False),
        ((math.nan, 0), False),
    ):
        found = {**base, "errors": dict(zip(("value", "gradient"), errors, strict=True))}
        assert [yes for yes, _ in verdicts(case, found)] == [reached]


def test_a_kernel_that_fails_is_a_goal_missed():
    found = {"failed": {"ours": "RuntimeError: out of resources"}, "milliseconds": {}}
    assert verdicts(CASES[0], found) == [(False, "KD 8192x1000 float32: RuntimeError: out of resources")]


def test_a_device_that_is_lost_leaves_what_was_measured(monkeypatch):
    inputs_of = gpu.inputs_of

    def lost(case, device):
        if case.loss != "KD":
            raise torch.AcceleratorError("an illegal memory access was encountered")
        return inputs_of(case, device)

    monkeypatch.setattr(gpu, "inputs_of", lost)
    monkeypatch.setattr(gpu, "measure_heads", lambda device, *a: lost(TINY[3], device))
    cases = (TINY[0], *TINY[2:])
    found = check(torch.device("cpu"), timed, cases, "reference", elements=64, side=8)
    assert [bool(case["milliseconds"]) for case in found["cases"]] == [True, False, False]
    words = page(found)
    assert "linear_kd, linear_pld: AcceleratorError: an illegal memory access was encountered" in words
    assert "MISSED   CE 4x7 float32: AcceleratorError: an illegal memory access was encountered" in words


def test_a_step_leaves_no_gradient():
    """`peak_memory` counts what a step takes on top of what was there before."""
    inputs = gpu.inputs_of(TINY[0], torch.device("cpu"))
    seen = []

    def loss(s, t, y):
        seen.append(s)
        return BASELINES["eager KD"](s, t, y)

    gpu.step(loss, inputs)()
    assert seen[0].grad is None


@pytest.mark.parametrize(
    ("tests", "status"),
    [("passed: 3", 0), ("not run: --skip-tests", 0), ("FAILED: 1", 1), ("not finished", 1)],
)
def test_red_tests_are_an_error(tests, status, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "why_no_triton", lambda device: None)
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: tests)
    monkeypatch.setattr(gpu, "check", lambda *a, **more: {})
    monkeypatch.setattr(gpu, "page", lambda found: "")
    assert gpu.main(["--out", str(tmp_path / "results.json")]) == status


def test_time_runs_out():
    found = check(torch.device("cpu"), timed, TINY, "reference", seconds=-1, elements=64, side=8)
    assert found["cases"] == []
    assert page(found).count("not measured") == len(TINY) + 1


def test_the_cases_name_what_there_is():
    for case in CASES:
        assert case.loss in OURS
        assert case.loss in ERRORS
        assert {name.removeprefix(COMPILED) for name in case.baselines} <= set(BASELINES)
        assert set(case.at_least) <= set(case.baselines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 1
    assert (
        capsys.readouterr().err == "luce bench --suite gpu: nothing was measured, there is no CUDA device\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_says_so_too(capsys):
    with pytest.raises(SystemExit) as stopped:
        command(["--suite", "gpu"])
    assert stopped.value.code == 1
    assert "there is no CUDA device" in capsys.readouterr().err
    with pytest.raises(UserError, match="all its cases in one run"):
        command(["--suite", "gpu", "pld"])


@pytest.fixture
def device(monkeypatch):
    """As if there were one."""
    pytest.importorskip("triton", reason="needs Triton (pip install triton)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "why_no_triton", lambda device: None)


def test_what_was_found_is_kept(device, found, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "check", lambda *arguments, **options: found)
    out = tmp_path / "new" / "results.json"
    assert gpu.main(["--out", str(out), "--skip-tests"]) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["results.json", "results.txt"]
    assert json.loads(out.read_text())["verdicts"] == found["verdicts"]
    assert out.with_suffix(".txt").read_text() == page(found) + "\n"
    assert page(found) in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(device, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert gpu.main(["--out", str(tmp_path / "file" / "results.json")]) == 1
    assert "cannot write to" in capsys.readouterr().err
