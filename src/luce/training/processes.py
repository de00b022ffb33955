"""The processes that train together."""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from accelerate import PartialState


def processes(cpu: bool = False) -> PartialState:
    """This process among those that were launched together; alone unless a launcher says otherwise.

    Without a GPU, Accelerate looks for other processes only if it is told to stay on the CPU, and whoever
    asks first decides: so everybody asks here.
    """
    launched = "LOCAL_RANK" in os.environ
    return PartialState(cpu=cpu or (launched and not torch.accelerator.is_available()))


@atexit.register
def _part() -> None:
    """Leave the group before Python ends: the threads of one that is left behind may abort the process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
