"""Several processes that train one student, for methods that make gradients of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def mean_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's mean over all processes; as it is where there is one. All must have the same dtype.

    >>> mean_over_processes([torch.ones(2)])
    [tensor([1., 1.])]
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1) or not tensors:
        return list(tensors)
    together = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(together)  # a sum, for not every backend knows a mean
    together /= dist.get_world_size()
    parts = together.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def share_weights(network: nn.Module) -> None:
    """Give every process the first one's parameters and buffers, as DDP does; alone, do nothing."""
    if dist.is_available() and dist.is_initialized():
        for tensor in (*network.parameters(), *network.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def as_first(compute: Callable[[], Tensor]) -> Tensor:
    """What the first process computes, in all of them, or the error that it meets; for what costs something.

    >>> as_first(lambda: torch.ones(2))
    tensor([1., 1.])
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return compute()
    found: list[Tensor | Exception] = [torch.empty(0)]
    if dist.get_rank() == 0:
        try:
            found = [compute().cpu()]
        except Exception as error:  # the others would wait for ever
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]
