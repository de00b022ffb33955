"""Which engine runs, and the reason given where it is not the native one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from luce.ops import engines
from luce.ops.engines import choose, describe

HERE = torch.zeros(1)
ELSEWHERE = torch.zeros(1, device="meta")
native = pytest.mark.skipif(engines.WHY_NOT is not None, reason=f"no native library: {engines.WHY_NOT}")


def test_backends_have_names():
    with pytest.raises(ValueError, match="'auto', 'cpu', 'gpu', 'reference', got 'tpu'"):
        choose("tpu", HERE)


def test_the_reference_runs_everywhere():
    assert choose("reference", HERE) == choose("reference", ELSEWHERE) == "reference"
    assert choose("auto", ELSEWHERE) == "reference"


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(engines, "NO_TRITON", None)
    assert choose("auto", ELSEWHERE, no_kernel=None) == "reference"
    with pytest.raises(
        RuntimeError, match="backend='gpu' cannot run here: expected tensors on a CUDA device"
    ):
        choose("gpu", HERE, no_kernel=None)
    with pytest.raises(RuntimeError, match="backend='gpu' has no gradient for the teacher"):
        choose("gpu", HERE, torch.zeros(1, requires_grad=True), no_kernel=None)
    monkeypatch.setattr(engines, "NO_TRITON", "Triton is not installed (pip install triton)")
    with pytest.raises(RuntimeError, match=r"Triton is not installed \(pip install triton\)"):
        choose("gpu", HERE, no_kernel=None)


def test_what_triton_there_is(monkeypatch):
    versions = {"triton": "3.10.1"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError
        return versions[name]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: versions)
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert engines._triton_problem() is None
    versions["triton"] = "3.5.1"
    assert "Triton 3.5.1 is older than 3.6" in engines._triton_problem()
    versions = {"pytorch-triton": "3.5.0+git1234"}
    assert "is older than 3.6" in engines._triton_problem()
    versions = {}  # built from source: the version is unknown
    assert engines._triton_problem() is None
    versions = None
    assert "not installed" in engines._triton_problem()


class _Cuda:
    """Looks like a tensor on a CUDA device."""

    device = torch.device("cuda", 0)
    requires_grad = False


@pytest.mark.parametrize(
    ("capability", "no_triton", "no_kernel", "engine"),
    [
        ((9, 0), None, None, "gpu"),
        ((8, 0), None, None, "gpu"),
        ((7, 5), None, None, "reference"),
        ((9, 0), "no such Triton", None, "reference"),
        ((9, 0), None, "no such kernel", "reference"),
    ],
)
def test_triton_is_chosen_where_it_can_run(capability, no_triton, no_kernel, engine, monkeypatch):
    monkeypatch.setattr(engines, "NO_TRITON", no_triton)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert choose("auto", _Cuda, no_kernel=no_kernel) == engine
    if engine == "gpu":
        assert choose("gpu", _Cuda, no_kernel=no_kernel) == "gpu"
    else:
        why = no_kernel or no_triton or "older than compute capability 8.0"
        with pytest.raises(RuntimeError, match=why):
            choose("gpu", _Cuda, no_kernel=no_kernel)


@native
def test_the_native_library_is_chosen_where_it_can_run():
    assert choose("auto", HERE) == choose("cpu", HERE) == "cpu"
    with pytest.raises(RuntimeError, match="on the CPU for backend='cpu', got meta"):
        choose("cpu", ELSEWHERE)
    assert describe()["backend"] == "cpu"
    assert describe()["instruction_set"].startswith(("x86-64-v", "arm64", "generic"))


def test_without_the_native_library_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(engines, "WHY_NOT", "no compiler was found")
    assert choose("auto", HERE) == "reference"
    with pytest.raises(RuntimeError, match="not in use: no compiler was found"):
        choose("cpu", HERE)
    assert describe() == {"backend": "reference", "instruction_set": "none: no compiler was found"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "Luce was installed without it"),
        ({"why_not.txt": "CMake was not found\n"}, "CMake was not found"),
        ({"luce_native.so": "this is no library"}, "luce_native.so cannot be loaded beside PyTorch"),
    ],
    ids=["nothing", "not built", "broken"],
)
def test_why_not(files, reason, tmp_path, monkeypatch):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(engines, "_FOLDER", tmp_path)
    monkeypatch.delenv("LUCE_NATIVE_LIBRARY", raising=False)
    assert engines._load().startswith(reason)


def run_without(tmp_path, program):
    broken = tmp_path / "broken.so"
    broken.write_text("this is no library")
    environment = {**os.environ, "LUCE_NATIVE_LIBRARY": str(broken)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_luce_works_without_its_native_library(tmp_path):
    """Nor is Triton imported before it is used."""
    done = run_without(
        tmp_path,
        "import sys, luce, torch\n"
        "from luce.ops import describe\n"
        "assert describe()['backend'] == 'reference', describe()\n"
        "student = torch.tensor([[0.5, -1.0, 2.0, 0.3]], requires_grad=True)\n"
        "loss = luce.pld_loss(student, torch.tensor([[2.0, 1.0, 0.1, -1.0]]), torch.tensor([2]))\n"
        "loss.backward()\n"
        "luce.ops.describe_gpu()\n"
        "print(round(loss.item(), 6), round(student.grad[0, 3].item(), 6), 'triton' in sys.modules)\n",
    )
    assert done.stdout.split() == ["0.853042", "0.452285", "False"], done.stderr


@native
@pytest.mark.slow
def test_a_lower_instruction_set_on_request():
    for wish in ("x86-64-v2", "x86-64-v9", "", "nonsense"):
        environment = {**os.environ, "LUCE_INSTRUCTION_SET": wish}
        done = subprocess.run(
            [sys.executable, "-c", "from luce.ops import describe; print(describe()['instruction_set'])"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        used = describe()["instruction_set"].split()[0]
        assert done.stdout.split()[0] == (wish if wish == "x86-64-v2" and used >= wish else used), done.stderr
