"""Processes of a distributed training."""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from accelerate import PartialState


def processes(cpu: bool = False) -> PartialState:
    """Return this process's place among those that were launched together; a single one without a launcher.

    All code must call this instead of `PartialState`: without a GPU, Accelerate looks for other processes
    only with ``cpu=True``, and the first call in a process decides.
    """
    launched = "LOCAL_RANK" in os.environ
    return PartialState(cpu=cpu or (launched and not torch.accelerator.is_available()))


@atexit.register
def _part() -> None:
    """Destroy the process group before Python ends; its threads may otherwise abort the process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
