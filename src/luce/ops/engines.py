"""The native library: loaded once, its operators declared, and the reason given where it is not there.

Every operator is declared here in Python, whether or not the library can be loaded. The library brings
the implementations for tensors on the CPU, Triton (``gpu.py`` beside an operator) those on CUDA devices.
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
"""Whether Triton's kernels run in its interpreter: slowly, on the CPU, where tests reach them."""

LIBRARY = torch.library.Library("luce", "DEF")
LIBRARY.define("instruction_set() -> str")

OLDEST = (8, 0)
"""The compute capability (Ampere) from which on the Triton kernels are used."""
OLDEST_TRITON = "3.6"
"""Older ones do not compile all kernels. This one comes with PyTorch 2.10."""


def _look_for_triton() -> str | None:
    """Why there is no Triton to use; it is not imported yet."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    for name in ("triton", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            if TorchVersion(version) < OLDEST_TRITON:
                return f"Triton {version} is older than {OLDEST_TRITON}: a newer PyTorch brings one"
    return None


NO_TRITON: str | None = _look_for_triton()
NO_KERNEL = "there is no Triton kernel for this operation"

_FOLDER = Path(__file__).parent / "lib"


def _load() -> str | None:
    """Load the library; the reason where that cannot be done."""
    if INTERPRETED:
        return "TRITON_INTERPRET=1 has Triton's kernels run on the CPU in its place"
    named = os.environ.get("LUCE_NATIVE_LIBRARY")  # another build, such as the sanitizers'
    found = [Path(named)] if named else sorted(_FOLDER.glob("luce_native.*"))
    if not found:
        why = _FOLDER / "why_not.txt"
        return why.read_text(encoding="utf-8").strip() if why.exists() else "Luce was installed without it"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        cause = error.__cause__ or error
        return f"{found[0].name} cannot be loaded beside PyTorch {torch.__version__}: {cause}"
    return None


WHY_NOT: str | None = _load()
"""Why the native library is not in use; None if it is."""


def run_by_triton(op: str, module: str) -> None:
    """Have an operator run on CUDA tensors by the function of its name in a module, imported when called.

    To a compiler the operator stays a closed box, as on the CPU: there is nothing around a visit to the
    rows that could be fused into it, and one formula for its gradient serves all engines.
    """

    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), op)(*arguments)

    LIBRARY.impl(op, run, "CPU" if INTERPRETED else "CUDA")


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device; None if they can."""
    if NO_TRITON is not None:
        return NO_TRITON
    if INTERPRETED:
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 is for tensors on the CPU, not {device}"
    if device.type != "cuda":
        return f"expected tensors on a CUDA device, got {device}"
    if torch.version.hip is not None:
        return "AMD's devices have not been tried"
    # A compiler cannot ask the device, and needs a new one itself.
    if not torch.compiler.is_compiling() and torch.cuda.get_device_capability(device) < OLDEST:
        return (
            f"{torch.cuda.get_device_name(device)} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
        )
    return None


def describe() -> dict[str, str]:
    """The engine that CPU tensors get, its instruction set, and why not a better one.

    Example:
        >>> sorted(describe())
        ['backend', 'instruction_set']
    """
    if WHY_NOT is not None:
        return {"backend": "reference", "instruction_set": f"none: {WHY_NOT}"}
    instruction_set: str = torch.ops.luce.instruction_set()
    if instruction_set in ("x86-64-v2", "x86-64-v3"):
        better = "AVX-512" if instruction_set == "x86-64-v3" else "AVX2 and FMA"
        instruction_set += f" (this processor does not offer {better}, or LUCE_INSTRUCTION_SET excludes it)"
    return {"backend": "cpu", "instruction_set": instruction_set}


def describe_gpu() -> str:
    """What CUDA tensors get, and why not something better.

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
    """The engine for tensors such as this one.

    Args:
        backend: One of `BACKENDS`.
        like: What the engine will work on.
        teacher: A tensor that the native engines take for constant: where it needs a gradient, ``"auto"``
            takes the reference.
        no_kernel: Why there is no Triton kernel for what is asked; None if there is one.
    Raises:
        ValueError: If there is no backend of that name.
        RuntimeError: If the named backend cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected `backend` to be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "reference":
        return "reference"
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
