"""Modules of a network that stay in evaluation mode while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .classifier import Classifier


def resting(network: nn.Module) -> list[nn.Module]:
    """Return the modules that their owner set to evaluation mode for the training.

    These are all modules in evaluation mode within a part whose parameters are frozen, such as a backbone
    with batch normalisation and dropout; and modules without parameters that keep statistics, where the
    network as a whole is in training mode.

    Example:
        >>> norm = nn.BatchNorm1d(2).requires_grad_(False).eval()
        >>> resting(nn.Sequential(nn.Linear(2, 2), norm).eval()) == [norm]
        True
    """
    body = network.body if isinstance(network, Classifier) else network
    found: set[nn.Module] = set()
    for module in body.modules():
        trained = [parameter.requires_grad for parameter in module.parameters()]
        if trained and not any(trained):
            found.update(module.modules())
        elif not trained and body.training and next(module.buffers(), None) is not None:
            found.add(module)
    return [module for module in body.modules() if module in found and not module.training]


def rest(modules: list[nn.Module]) -> None:
    """Set evaluation mode again, after a `train` of the network that holds these modules."""
    for module in modules:
        module.training = False


@contextmanager
def in_evaluation(network: nn.Module) -> Iterator[None]:
    """Set evaluation mode for a block, and restore the mode of each module after it.

    >>> layer = nn.Dropout()
    >>> with in_evaluation(layer):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
