"""The native library: loaded once, its operators declared, and the reason given where it is not there.

Every operator is declared here in Python, whether or not the library can be loaded; the library and, one day,
other engines bring its implementations.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "cpu", "reference"]
BACKENDS = ("auto", "cpu", "reference")

LIBRARY = torch.library.Library("luce", "DEF")
LIBRARY.define("instruction_set() -> str")

_FOLDER = Path(__file__).parent / "lib"


def _load() -> str | None:
    """Load the library; the reason where that cannot be done."""
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


def choose(backend: str, like: Tensor, teacher: Tensor | None = None) -> Literal["cpu", "reference"]:
    """The engine for tensors such as this one.

    Args:
        backend: One of `BACKENDS`.
        like: What the engine will work on.
        teacher: A tensor that the native engine takes for constant: where it needs a gradient, ``"auto"``
            takes the reference.
    Raises:
        ValueError: If there is no backend of that name.
        RuntimeError: If the named backend cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected `backend` to be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "reference":
        return "reference"
    on_cpu = like.device.type == "cpu"
    constant = teacher is None or not (teacher.requires_grad and torch.is_grad_enabled())
    if backend == "auto":
        return "cpu" if on_cpu and constant and WHY_NOT is None else "reference"
    if not constant:
        raise RuntimeError("backend='cpu' has no gradient for the teacher; detach its logits or use 'auto'")
    if not on_cpu:
        raise RuntimeError(f"expected tensors on the CPU for backend='cpu', got {like.device}; use 'auto'")
    if WHY_NOT is not None:
        raise RuntimeError(f"backend='cpu' needs Luce's native library, which is not in use: {WHY_NOT}")
    return "cpu"
