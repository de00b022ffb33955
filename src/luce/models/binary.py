"""Binary weights: layers with one bit per weight and one scale per output filter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from ..errors import UserError

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose weights can be binary."""

GradientScale: TypeAlias = Literal["fan_in", "none"]


class BinaryWeight(nn.Module):
    r"""A parametrisation for `torch.nn.utils.parametrize` that maps latent weights to ``scale * sign``.

    The latent weights :math:`W` are centred over the input channels and clamped to :math:`[-1, 1]`, which
    gives :math:`V`. Filter :math:`o` with :math:`n` weights becomes

    .. math:: \hat W_o = \alpha_o \operatorname{sign}(V_o), \qquad \alpha_o = \frac1n \sum_i |V_{o,i}|,

    where the sign of 0 is +1. With :math:`g = \partial L / \partial \hat W` and :math:`I` input channels the
    latent weights receive

    .. math::
        \Bigl[\alpha_o g_i + \operatorname{sign}(V_i) \frac1n \sum_j \operatorname{sign}(V_j) g_j\Bigr]
        \bigl(1 - \tfrac1I\bigr) n,

    the gradient of :math:`\alpha \operatorname{sign}` with a straight-through sign. ``gradient_scale="none"``
    drops the last two factors; they scale the learning rate of SGD, and affect Adam only through its epsilon.

    The authors' code writes :math:`V` back into :math:`W` before every step. Here :math:`W` is unchanged, so
    no forward pass modifies a parameter. The next forward pass centres :math:`W` again, and a weight at the
    clamp gets no gradient that would move it further out.

    Args:
        gradient_scale: ``"fan_in"`` or ``"none"``.
    Example:
        >>> layer = nn.Linear(3, 2, bias=False)
        >>> layer.weight.data = torch.tensor([[0.2, -0.4, 0.6], [1.5, -0.1, 0.0]])
        >>> _ = parametrize.register_parametrization(layer, "weight", BinaryWeight())
        >>> layer.weight.detach()
        tensor([[ 0.3556, -0.3556,  0.3556],
                [ 0.6778, -0.6778, -0.6778]])

    References:
        Rastegari et al., XNOR-Net, ECCV 2016; Lu and Sengupta, Exploring the Connection Between Binary and
        Spiking Neural Networks, Frontiers in Neuroscience 14:535, 2020.
    """

    def __init__(self, gradient_scale: GradientScale = "fan_in") -> None:
        super().__init__()
        if gradient_scale not in get_args(GradientScale):
            raise UserError(
                f"expected `gradient_scale` to be one of {get_args(GradientScale)}, got {gradient_scale!r}"
            )
        self.gradient_scale = gradient_scale

    def forward(self, latent: Tensor) -> Tensor:
        binary: Tensor = _Binarize.apply(latent, self.factor(latent))  # type: ignore[no-untyped-call]
        return binary

    def factor(self, latent: Tensor) -> float:
        channels, weights = latent.shape[1], latent[0].numel()
        return weights * (1 - 1 / max(channels, 2)) if self.gradient_scale == "fan_in" else 1.0

    def parts(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signs, in the shape of the weights, and the scale of each filter, ``(O,)``."""
        signs, scale = _parts(_centred(latent.detach()).clamp(-1, 1))
        return signs, scale.flatten()


def _centred(latent: Tensor) -> Tensor:
    """Subtract the mean over the input channels; a single channel (depthwise layers) would become 0."""
    return latent - latent.mean(1, keepdim=True) if latent.shape[1] > 1 else latent


def _parts(clamped: Tensor) -> tuple[Tensor, Tensor]:
    signs = torch.where(clamped >= 0, 1.0, -1.0).to(clamped.dtype)
    return signs, clamped.abs().mean(tuple(range(1, clamped.ndim)), keepdim=True)


class _Binarize(torch.autograd.Function):
    @staticmethod
    def forward(latent: Tensor, factor: float) -> Tensor:
        signs, scale = _parts(_centred(latent).clamp(-1, 1))
        return scale * signs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        latent, ctx.factor = inputs
        ctx.save_for_backward(latent)
        ctx.save_for_forward(latent)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        centred = _centred(ctx.saved_tensors[0])
        through = _straight_through(centred, gradients[0])
        # A step against the gradient would move these weights further beyond the clamp, where nothing returns
        # them.
        outwards = (centred.abs() > 1) & (centred * through < 0)
        return ctx.factor * through.masked_fill(outwards, 0.0), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        latent = forward_ad.unpack_dual(ctx.saved_tensors[0]).primal
        return ctx.factor * _straight_through(_centred(latent), tangents[0])


def _straight_through(centred: Tensor, direction: Tensor) -> Tensor:
    """Apply the derivative of scale times sign, which is symmetric: backward and forward mode share it."""
    signs, scale = _parts(centred.clamp(-1, 1))
    return scale * direction + signs * (signs * direction).mean(tuple(range(1, signs.ndim)), keepdim=True)


def binarize_(model: nn.Module, gradient_scale: GradientScale = "fan_in") -> nn.Module:
    """Binarise the weights of all convolutions and linear layers except the first and the last, in place.

    First and last refer to the order of ``model.modules()``. The state dict holds the latent weights under
    ``parametrizations.weight.original``.

    Args:
        model: The network.
        gradient_scale: See `BinaryWeight`.
    Returns:
        The network.
    Raises:
        UserError: If there is no layer between the first and the last.
    """
    layers = [module for module in model.modules() if isinstance(module, WEIGHTED)]
    if len(layers) < 3:
        raise UserError(
            "expected a network with at least 3 convolutions and linear layers, of which the first and the "
            f"last keep real weights, got {len(layers)}"
        )
    for layer in layers[1:-1]:
        parametrize.register_parametrization(layer, "weight", BinaryWeight(gradient_scale))
    return model


def binary_parts(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return signs and scales of a layer with binary weights; None for other layers."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    chain: Any = layer.parametrizations["weight"]  # type: ignore[index]
    if not isinstance(chain[0], BinaryWeight) or len(chain) > 1:
        return None
    return chain[0].parts(chain.original)


def binary_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with binary weights by path."""
    return {path: module for path, module in model.named_modules() if binary_parts(module) is not None}


def baked(model: nn.Module) -> nn.Module:
    """Return a copy in which binary weights are plain parameters with two values per filter."""
    plain = copy.deepcopy(model)
    layer: Any
    for layer in binary_layers(plain).values():
        # Not `remove_parametrizations`: it changes the class, which the copy shares with the original.
        weight = layer.weight.detach().clone()
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer.register_parameter("weight", nn.Parameter(weight))
    return plain


def size_in_bits(model: nn.Module) -> dict[str, int]:
    """Return the number of bits that store a network, with and without binary weights.

    A binary weight takes 1 bit and each of its filters a scale of 32 bits; everything else, including the
    statistics of batch normalisation, takes the bits of its dtype.

    Returns:
        ``bits``, ``full_precision_bits`` (binary weights in the dtype of their latent weights),
        ``binary_weights``, ``scales`` and ``other`` (parameters and statistics).
    Example:
        >>> chain = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 2))
        >>> size_in_bits(binarize_(chain))["bits"] == 32 * 32 + (64 + 8 * 32) + 32 * 18
        True
    """
    kept = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.is_floating_point()}
    full = sum(tensor.numel() * tensor.element_size() * 8 for tensor in kept.values())
    weights = scales = saved = 0
    for layer in binary_layers(model).values():
        latent: Tensor = layer.parametrizations["weight"].original  # type: ignore[index,union-attr,assignment]
        weights, scales = weights + latent.numel(), scales + len(latent)
        saved += latent.numel() * (latent.element_size() * 8 - 1) - 32 * len(latent)
    return {
        "bits": full - saved,
        "full_precision_bits": full,
        "binary_weights": weights,
        "scales": scales,
        "other": sum(tensor.numel() for tensor in kept.values()) - weights,
    }


def split_options(options: Mapping[str, Any]) -> tuple[GradientScale, dict[str, Any]]:
    """Separate the options of ``binary:NAME`` from those of the network."""
    rest = dict(options)
    return rest.pop("gradient_scale", "fan_in"), rest
