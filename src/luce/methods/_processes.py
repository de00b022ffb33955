"""Communication between the processes that train one student, for methods with gradients of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def several_processes() -> bool:
    """Whether more than one process trains the student."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor's mean over all processes; unchanged in a single one. All must have the same dtype.

    >>> mean_over_processes([torch.ones(2)])
    [tensor([1., 1.])]
    """
    if not several_processes() or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)  # a sum: not every backend can average
    flat /= dist.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all processes, which must have equally many; unchanged in a single one.

    >>> gather_rows(torch.ones(2))
    tensor([1., 1.])
    """
    if not several_processes():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def share_weights(network: nn.Module) -> None:
    """Copy the first process's parameters and buffers to all others, as DDP does."""
    if several_processes():
        for tensor in (*network.parameters(), *network.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def as_first(compute: Callable[[], Tensor]) -> Tensor:
    """Compute a tensor in the first process only and return it, or raise its error, in all of them.

    For computations that cost something, such as queries of a teacher.

    >>> as_first(lambda: torch.ones(2))
    tensor([1., 1.])
    """
    if not several_processes():
        return compute()
    result: list[Tensor | Exception] = [torch.empty(0)]
    if dist.get_rank() == 0:
        try:
            result = [compute().cpu()]
        except Exception as error:  # without a broadcast the others would wait forever
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]
