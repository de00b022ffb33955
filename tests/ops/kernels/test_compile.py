"""Every kernel compiled ahead of time, which needs Triton but no GPU.

The interpreter shows what a kernel computes. This shows that there is machine code for it, and that what it
works on stays in registers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from luce.ops import engines
from luce.ops.kd.reference import KINDS
from luce.ops.rkkd import FORMS

_TRITON = importlib.util.find_spec("triton")
TOOLS = Path(_TRITON.origin).parent / "backends/nvidia/bin" if _TRITON and _TRITON.origin else Path()
pytestmark = [
    pytest.mark.skipif(engines.INTERPRETED, reason="the interpreter does not compile"),
    pytest.mark.skipif(
        not (TOOLS / "ptxas").exists() or not (TOOLS / "cuobjdump").exists(),
        reason="needs Triton and the tools that come with it for NVIDIA's devices (pip install triton)",
    ),
]

SHARED = 99 * 1024
"""Bytes of shared memory that a program can have on every device from compute capability 8.0 on."""
REGISTERS = 65536
"""Registers for all threads of a program, likewise."""
KERNEL_FORMS = FORMS[:4]
STACK = 32
"""Bytes of stack a thread, which is where registers go that do not fit: a handful, outside of the loops."""


# One call of each operator: on a batch (student, teacher, target, weight), with the options of a case.


def divergence(batch, gradient, kind):
    from luce.ops.kd import triton

    triton.divergence(batch.student, batch.teacher, batch.weight, KINDS.index(kind), 4.0, 0.5, gradient)


def cross_entropy(batch, gradient, smoothing=0.0):
    from luce.ops.cross_entropy import triton

    triton.cross_entropy(batch.student, batch.target, batch.weight, smoothing, gradient)


def dkd(batch, gradient):
    from luce.ops.dkd import triton

    triton.dkd(batch.student, batch.teacher, batch.target, batch.weight, 4.0, 1.0, 8.0, gradient)


def pld(batch, gradient, label=True, ordered=False, top_k=2**31):
    from luce.ops.pld import triton

    target = batch.target if label else None
    order = torch.zeros(batch.student.shape, dtype=torch.int64) if ordered else None
    triton.pld(
        *(batch.student, batch.teacher, target, batch.weight, order),
        *(1.0, top_k, 0.0, 0.0, False, gradient),
    )


def rkkd(batch, gradient, form):
    from luce.ops.rkkd import triton

    triton.rkkd(batch.student, batch.teacher, batch.weight, FORMS.index(form), 1.5, gradient)


def suffix_logsumexp(batch, gradient):
    from luce.ops.suffix_logsumexp import triton

    triton.suffix_logsumexp(batch.student)
    triton.suffix_logsumexp_backward(batch.teacher, batch.student)


def multiply_rows(batch, gradient):
    from luce.ops.triton.multiply import multiply_rows

    multiply_rows(batch.student, batch.factor)


f32, f64, f16, bf16 = torch.float32, torch.float64, torch.float16, torch.bfloat16

# Operator, shape, dtype of the student, and what is not as usual: the dtype of the teacher, the weight
# (True), the gradient (False), bytes of stack that are allowed, options of the operator.
CASES = [
    *((divergence, (64, 1000), f32, {"kind": kind}) for kind in KINDS),
    *((divergence, (64, 128256), bf16, {"kind": kind}) for kind in KINDS),
    *((divergence, (64, 100), f32, {"kind": kind, "gradient": False}) for kind in KINDS),
    *((divergence, (2, 19, 50), f16, {"kind": kind, "weight": True}) for kind in KINDS),
    (divergence, (1, 1), f32, {"kind": "jsd"}),
    (divergence, (64, 100), f64, {"kind": "jsd", "weight": True}),
    (divergence, (64, 100), f16, {"kind": "forward_kl", "teacher": f64}),
    (cross_entropy, (64, 1000), f32, {}),
    (cross_entropy, (64, 128256), bf16, {"smoothing": 0.1}),
    (cross_entropy, (2, 19, 50), f16, {"smoothing": 0.1, "weight": True}),
    (cross_entropy, (64, 100), f32, {"gradient": False}),
    (cross_entropy, (64, 1000), f64, {"smoothing": 0.1}),
    (dkd, (64, 1000), f32, {}),
    (dkd, (64, 128256), bf16, {"weight": True}),
    (dkd, (2, 19, 50), f16, {}),
    (dkd, (64, 100), f64, {}),
    (dkd, (64, 100), f32, {"gradient": False}),
    (pld, (64, 1024), f32, {}),
    (pld, (2, 19, 50), f16, {"weight": True}),
    (pld, (64, 128256), bf16, {}),
    (pld, (64, 100), f32, {"ordered": True, "label": False, "gradient": False}),
    (pld, (64, 300), f64, {}),
    (pld, (64, 128256), bf16, {"top_k": 128}),
    (pld, (64, 50257), f16, {"top_k": 100, "teacher": f32, "label": False, "weight": True}),
    *((rkkd, (64, 1000), f32, {"form": form}) for form in KERNEL_FORMS),
    (rkkd, (64, 128256), bf16, {"form": "tanh"}),
    (rkkd, (2, 19, 50), f16, {"form": "tanh", "weight": True}),
    (rkkd, (64, 100), f64, {"form": "tanh", "gradient": False}),
    (suffix_logsumexp, (64, 1000), f32, {}),
    (suffix_logsumexp, (64, 128256), bf16, {}),
    (suffix_logsumexp, (64, 100), f64, {"teacher": f32}),
    (multiply_rows, (64, 128256), bf16, {}),
    (multiply_rows, (2, 19, 50), f16, {}),
    (multiply_rows, (64, 1000), f64, {}),
]
ELSEWHERE = [
    (divergence, (64, 1000), f32, {"kind": "jsd"}),
    (divergence, (64, 128256), bf16, {"kind": "forward_kl"}),
    (cross_entropy, (2, 19, 50), f16, {"smoothing": 0.1}),
    (dkd, (64, 1000), bf16, {}),
    (pld, (64, 100), bf16, {}),
    (pld, (64, 30), bf16, {"ordered": True}),
    (pld, (64, 128256), bf16, {"top_k": 128}),
    (rkkd, (64, 100), bf16, {"form": "tanh"}),
    (suffix_logsumexp, (64, 5000), bf16, {}),
    (multiply_rows, (64, 1000), f32, {}),
]
"""The cases for devices other than Hopper's."""

QUICK = [
    (90, cross_entropy, (64, 100), f32, {"gradient": False}),
    (90, multiply_rows, (2, 19, 50), f16, {}),
]
"""The cases that are not marked slow; each of the others takes a second or more."""
ALL = [(90, *case) for case in CASES] + [
    (capability, *case) for capability in (80, 100) for case in ELSEWHERE
]
MARKED = [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in ALL]


def named(case):
    capability, op, shape, dtype, options = case
    words = [f"{name}={value}" for name, value in options.items()]
    return "-".join(
        [f"sm_{capability}", op.__name__, "x".join(map(str, shape)), str(dtype)[6:], *words]
    ).replace("torch.", "")


class Device:
    """The driver as Triton queries it when it compiles. Its number differs from any real device's."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 1000 + self.capability

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """``compiled(capability, call)`` compiles the kernels that a call launches, and returns them."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from luce.ops.triton import launch

    kernels = []
    run = JITFunction.run

    def only_compile(self, *args, warmup, **options):
        kernels.append(run(self, *args, warmup=True, **options))

    def compile_for(capability, call):
        driver.set_active(Device(capability))
        call()
        return kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", only_compile)
    monkeypatch.setattr(launch, "on_device", lambda tensor: contextlib.nullcontext())
    before = dict(vars(driver))
    yield compile_for
    vars(driver).update(before)


def used(kernel, folder):
    """Registers a thread, bytes of stack and so on, by name."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    told = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    (line,) = re.findall(r"REG:.*", told)
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", line)}


@pytest.mark.parametrize("case", MARKED, ids=named)
def test_it_compiles_and_stays_in_registers(case, compiled, tmp_path):
    capability, op, shape, dtype, options = case
    options = dict(options)
    rows = shape[:1] + shape[2:]
    student, teacher = (
        torch.zeros(shape, dtype=dtype),
        torch.zeros(shape, dtype=options.pop("teacher", dtype)),
    )
    wide = torch.promote_types(torch.promote_types(dtype, teacher.dtype), f32)
    batch = SimpleNamespace(
        student=student,
        teacher=teacher,
        target=torch.zeros(rows, dtype=torch.int64),
        factor=torch.ones(rows, dtype=wide),
        weight=torch.ones(rows, dtype=wide) if options.pop("weight", False) else None,
    )
    stack, gradient = options.pop("stack", STACK), options.pop("gradient", True)
    kernels = compiled(capability, lambda: op(batch, gradient, **options))
    assert kernels
    for kernel in kernels:
        uses = used(kernel, tmp_path)
        assert uses["STACK"] <= stack
        assert uses["REG"] * 32 * kernel.metadata.num_warps <= REGISTERS
        assert kernel.metadata.shared <= SHARED
