"""Baselines compute what their candidates do; a step that cannot run gives its reason."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

import luce
from benchmarks import baselines
from benchmarks.cases import Case
from benchmarks.inputs import Inputs, make


@pytest.fixture
def inputs() -> Inputs:
    case = Case("toy", (7, 33), "PLD", inputs=("student", "teacher", "target", "upstream"))
    return make(case, case.shape, torch.Generator().manual_seed(0))


def gradient(name: str, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    student = inputs.student.detach().clone().requires_grad_()
    value = baselines.find(name)(replace(inputs, student=student))
    value.backward(None if value.ndim == 0 else inputs.upstream)
    return value.detach(), student.grad


@pytest.mark.parametrize(
    ("candidate", "baseline"),
    [
        ("KD", "eager kl_div"),
        ("KD + CE", "eager KD"),
        ("RKKD", "eager RKKD"),
        ("RKKD", "reference RKKD"),
        ("CE", "eager CE"),
        ("suffix_logsumexp", "flipped logcumsumexp"),
    ],
)
def test_a_baseline_computes_what_the_candidate_does(candidate: str, baseline: str, inputs: Inputs) -> None:
    torch.testing.assert_close(gradient(candidate, inputs), gradient(baseline, inputs), rtol=2e-5, atol=2e-6)


def test_the_lean_baseline_is_pld(inputs: Inputs) -> None:
    student = inputs.student.detach().double().requires_grad_()
    value = luce.pld_loss(student, inputs.teacher.double(), inputs.target)
    value.backward()
    result = gradient("lean float32 PLD", inputs)
    torch.testing.assert_close(result, (value.detach().float(), student.grad.float()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["scipy", "numpy", "ONNX Runtime"])
def test_other_softmaxes_are_softmaxes(name: str, inputs: Inputs) -> None:
    if name == "ONNX Runtime":
        pytest.importorskip("onnxruntime", reason="in the extra `bench`")
    with torch.no_grad():
        detached = replace(inputs, student=inputs.student.detach())
        result = torch.from_numpy(baselines.find(name)(detached))
    torch.testing.assert_close(result, inputs.student.detach().softmax(-1))


def test_a_missing_package_is_not_installed(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    baselines._onnx_softmax.cache_clear()
    with pytest.raises(ImportError) as caught, torch.no_grad():
        baselines.find("ONNX Runtime")(replace(inputs, student=inputs.student.detach()))
    sentence = baselines.reason(caught.value)
    assert sentence.startswith("not installed: `onnxruntime`")
    assert "luce[bench]" in sentence


def test_what_this_luce_lacks_is_said() -> None:
    with pytest.raises(ImportError) as missing:
        baselines._op("entmax", "entmax")
    assert baselines.reason(missing.value) == "not in this Luce: `luce.ops.entmax`"
    with pytest.raises(TypeError) as unknown:
        luce.kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), colour="blue")  # type: ignore[call-arg]
    assert baselines.reason(unknown.value).startswith("not in this Luce: kd_loss() got an unexpected")
    assert baselines.reason(ZeroDivisionError()) == "ZeroDivisionError"
    assert baselines.reason(RuntimeError("no compiler\nand more")) == "RuntimeError: no compiler"


def test_algorithms_are_those_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def op(module: str, name: str):
        return {
            "ALGORITHMS": ("two_pass", "online"),
            "softmax": lambda x, algorithm: used.append(algorithm),
        }[name]

    monkeypatch.setattr(baselines, "_op", op)
    case = Case("toy", (2, 3), "softmax two_pass", ("numpy", "softmax *", "numpy"))
    result = baselines.names(case)
    assert result == ["softmax two_pass", "numpy", "softmax online"]
    baselines.find("softmax online")(Inputs(torch.zeros(1)))
    assert used == ["online"]


def test_without_the_op_its_algorithms_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def op(module: str, name: str):
        raise ModuleNotFoundError("no", name="luce.ops.softmax")

    monkeypatch.setattr(baselines, "_op", op)
    assert baselines.names(Case("toy", (2, 3), "numpy", ("softmax *",))) == ["numpy", "softmax *"]
