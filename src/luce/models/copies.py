"""Copies of networks, including some that `copy.deepcopy` refuses."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

from ..errors import UserError, one_line

M = TypeVar("M", bound=nn.Module)


def copy_of(network: M, purpose: str) -> M:
    """Return a copy that shares no tensor with the network.

    A tensor that a network keeps from its last pass, as `torch.nn.utils.weight_norm` does, is copied by
    value: `copy.deepcopy` refuses it for its gradient.

    Args:
        network: To be copied.
        purpose: What the copy is for and the option that asks for it, to end the message.
    Raises:
        UserError: If a part cannot be copied, such as a lock or an open file.
    Example:
        >>> import torch
        >>> layer = nn.utils.weight_norm(nn.Linear(2, 2))
        >>> answer = layer(torch.ones(1, 2))
        >>> torch.equal(copy_of(layer, "a test")(torch.ones(1, 2)), answer)
        True
    """
    derived = {
        id(value): value.detach().clone()
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(network, derived)
    except Exception as error:  # whatever a part raises that cannot be copied
        raise UserError(
            f"expected a network that `copy.deepcopy` can copy for {purpose}, got {_name(network)} "
            f"({one_line(error)}); take what cannot be copied out of the module"
        ) from error


def _name(network: nn.Module) -> str:
    return type(getattr(network, "body", network)).__name__
