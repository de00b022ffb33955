"""What a method that trains networks of its own does where several processes train together."""

from __future__ import annotations

from collections.abc import Iterable

from torch import distributed, nn


def together() -> bool:
    """Whether there is a group of processes."""
    return distributed.is_available() and distributed.is_initialized()


def share_weights(network: nn.Module) -> None:
    """Give every process the first one's weights and buffers, as DDP does; alone, do nothing."""
    if together():
        for tensor in (*network.parameters(), *network.buffers()):
            distributed.broadcast(tensor.detach(), src=0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients, as DDP does; alone, do nothing."""
    if together():
        for parameter in parameters:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= distributed.get_world_size()
