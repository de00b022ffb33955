"""A forward pass of a network with other parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call


def forward_with(network: nn.Module, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Run a network with other parameters and buffers; its own stay unchanged.

    `torch.func.functional_call` alone leaves the replacements in a module that is registered under two names.

    Args:
        network: From inputs to logits.
        tensors: Replacements by the names in ``named_parameters`` and ``named_buffers``.
        inputs: A batch.
    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> forward_with(nn.Sequential(layer, layer), {"0.weight": torch.tensor([[2.0]])}, torch.ones(1, 1))
        tensor([[4.]])
    """
    # Each tensor has one name there; its replacement must go to every place that shares it.
    names = {id(own): name for name, own in (*network.named_parameters(), *network.named_buffers())}
    everywhere = {
        place: tensors[names[id(own)]]
        for path, module in network.named_modules()
        for place, own in (
            *module.named_parameters(path, False, False),
            *module.named_buffers(path, False, False),
        )
        if names[id(own)] in tensors
    }
    logits: Tensor = functional_call(network, everywhere, (inputs,), tie_weights=False)
    return logits
