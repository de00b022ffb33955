"""The Triton kernels, on a CUDA device where there is one and in Triton's interpreter everywhere.

Triton has to be told to interpret before it is imported. So test_interpreter.py has all tests of this folder
run once more in processes of their own; here, without a device, they are skipped.
"""

from __future__ import annotations

import pytest
import torch

from luce.ops import engines


@pytest.fixture
def device() -> torch.device:
    if engines.NO_TRITON is not None:
        pytest.skip(engines.NO_TRITON)
    return torch.device("cpu" if engines.INTERPRETED else "cuda")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs look at 16 classes at a time, so that short rows already take several steps."""
    from luce.ops.triton import launch

    monkeypatch.setattr(launch, "TILE", 16)
