"""Lets torchvision be imported beside the CPU build of PyTorch.

The wheels of torchvision bring operators compiled for CUDA. Beside a CPU-only PyTorch these do not load, and
the import of torchvision, and with it of timm, fails over `torchvision::nms does not exist`. Declaring the
operators that torchvision looks up at import is enough for its models and transforms. Load this as a pytest
plugin, before anything imports torchvision::

    python -m pytest -p tests.vision_cure tests/models/test_vision_loaders.py

It is not for an environment whose torchvision works: there the operators would be declared twice.
"""

from __future__ import annotations

import torch


def pytest_load_initial_conftests() -> None:
    # A hook, so that nothing is declared when this file is merely collected; this one, as the first of all.
    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
