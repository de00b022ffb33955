"""Engines: load the native library once, choose an engine for a call, and explain why one cannot run.

Operators are declared in Python, whether or not the library can be loaded. The library implements them for
CPU tensors, Triton (``triton.py`` in an operation's folder) for CUDA tensors.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

Backend = Literal["auto", "cpu", "gpu", "reference"]
BACKENDS = ("auto", "cpu", "gpu", "reference")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton's kernels run in its interpreter: slowly, on the CPU, for tests."""

LIBRARY = torch.library.Library("luce", "DEF")
LIBRARY.define("instruction_set() -> str")

OLDEST = (8, 0)
"""The lowest compute capability (Ampere) on which the Triton kernels are used."""
OLDEST_TRITON = "3.6"
"""Older versions do not compile all kernels. PyTorch 2.10 brings this one."""


def _triton_problem() -> str | None:
    """Return why Triton cannot be used, or None; without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    for name in ("triton", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            if TorchVersion(version) < OLDEST_TRITON:
                return f"Triton {version} is older than {OLDEST_TRITON}: a newer PyTorch brings one"
    return None


NO_TRITON: str | None = _triton_problem()
NO_KERNEL = "there is no Triton kernel for this operation"

_FOLDER = Path(__file__).parent / "lib"


def _load() -> str | None:
    """Load the native library; return why it cannot be loaded, or None."""
    if INTERPRETED:
        return "TRITON_INTERPRET=1 runs Triton's kernels on the CPU instead"
    named = os.environ.get("LUCE_NATIVE_LIBRARY")  # another build, such as the sanitizers'
    paths = [Path(named)] if named else sorted(_FOLDER.glob("luce_native.*"))
    if not paths:
        why = _FOLDER / "why_not.txt"
        return why.read_text(encoding="utf-8").strip() if why.exists() else "Luce was installed without it"
    try:
        torch.ops.load_library(paths[0])
    except OSError as error:
        cause = error.__cause__ or error
        return f"{paths[0].name} cannot be loaded beside PyTorch {torch.__version__}: {cause}"
    return None


WHY_NOT: str | None = _load()
"""Why the native library is not in use, or None if it is."""


def run_by_triton(op: str, module: str) -> None:
    """Implement an operator for CUDA tensors by the function of its name in a module, imported on first use.

    To a compiler the operator stays opaque, as on the CPU: nothing around a visit to the rows could be fused
    into it, and one formula for its gradient serves all engines.
    """

    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), op)(*arguments)

    LIBRARY.impl(op, run, "CPU" if INTERPRETED else "CUDA")


def why_no_triton(device: torch.device) -> str | None:
    """Return why Triton's kernels cannot run on a device, or None if they can."""
    if NO_TRITON is not None:
        return NO_TRITON
    if INTERPRETED:
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 needs tensors on the CPU, got {device}"
    if device.type != "cuda":
        return f"expected tensors on a CUDA device, got {device}"
    if torch.version.hip is not None:
        return "AMD devices are not supported"
    # Under a compiler the device cannot be queried; Inductor itself needs a recent one.
    if not torch.compiler.is_compiling() and torch.cuda.get_device_capability(device) < OLDEST:
        return (
            f"{torch.cuda.get_device_name(device)} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
        )
    return None


def describe() -> dict[str, str]:
    """Return the engine of CPU tensors, its instruction set, and why no faster one is in use.

    Example:
        >>> sorted(describe())
        ['backend', 'instruction_set']
    """
    if WHY_NOT is not None:
        return {"backend": "reference", "instruction_set": f"none: {WHY_NOT}"}
    instruction_set: str = torch.ops.luce.instruction_set()
    if instruction_set in ("x86-64-v2", "x86-64-v3"):
        better = "AVX-512" if instruction_set == "x86-64-v3" else "AVX2 and FMA"
        instruction_set += f" (this processor has no {better}, or LUCE_INSTRUCTION_SET excludes it)"
    return {"backend": "cpu", "instruction_set": instruction_set}


def describe_gpu() -> str:
    """Return the engine of CUDA tensors, and why no faster one is in use.

    Example:
        >>> describe_gpu().startswith(("Triton", "reference: "))
        True
    """
    if INTERPRETED:
        why = why_no_triton(torch.device("cpu"))
        return f"reference: {why}" if why else "Triton, interpreted on the CPU (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return "reference: there is no CUDA device"
    why = why_no_triton(torch.device("cuda"))
    return f"reference: {why}" if why else f"Triton on {torch.cuda.get_device_name()}"


def choose(
    backend: str, like: Tensor, teacher: Tensor | None = None, *, no_kernel: str | None = NO_KERNEL
) -> Literal["cpu", "gpu", "reference"]:
    """Choose the engine for a call.

    Args:
        backend: One of `BACKENDS`.
        like: A tensor that the engine will process.
        teacher: A tensor without a gradient in the native engines: if it needs one, ``"auto"`` chooses the
            reference.
        no_kernel: Why there is no Triton kernel for this call, or None if there is one.
    Raises:
        ValueError: If the backend does not exist.
        RuntimeError: If the named backend cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected `backend` to be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "reference":
        return "reference"
    # Without grad mode no gradient will be taken, whatever the teacher requires.
    constant = teacher is None or not (teacher.requires_grad and torch.is_grad_enabled())
    if backend == "auto":
        if not constant:
            return "reference"
        if like.device.type == "cpu":
            return "cpu" if WHY_NOT is None else "reference"
        if like.device.type != "cuda":
            return "reference"
        return "gpu" if no_kernel is None and why_no_triton(like.device) is None else "reference"
    if not constant:
        raise RuntimeError(
            f"backend={backend!r} has no gradient for the teacher; detach its logits or use 'auto'"
        )
    if backend == "gpu":
        why_not = why_no_triton(like.device) or no_kernel
        if why_not is not None:
            raise RuntimeError(f"backend='gpu' cannot run here: {why_not}; use 'auto'")
        return "gpu"
    if like.device.type != "cpu":
        raise RuntimeError(f"expected tensors on the CPU for backend='cpu', got {like.device}; use 'auto'")
    if WHY_NOT is not None:
        raise RuntimeError(f"backend='cpu' needs Luce's native library, which is not in use: {WHY_NOT}")
    return "cpu"
