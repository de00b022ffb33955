"""The processes that train together."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState


def processes(cpu: bool = False) -> PartialState:
    """This process among those that were launched together; alone unless a launcher says otherwise.

    Without a GPU, Accelerate looks for other processes only if it is told to stay on the CPU, and whoever
    asks first decides: so everybody asks here.
    """
    launched = "LOCAL_RANK" in os.environ
    return PartialState(cpu=cpu or (launched and not torch.accelerator.is_available()))
