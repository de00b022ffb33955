"""Networks that make images and that tell made ones from real ones, sized by the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .network import image_channels

SLOPE = 0.2
"""Of the leaky ReLUs."""


class Generator(nn.Module):
    """From latents ``(N, C)`` to images ``(N, channels, height, width)`` with values in [-1, 1].

    A linear layer makes a small map, which is enlarged step by step, each time followed by a 3x3 convolution.
    With 32x32 pixels and a `width` of 128 it is the generator of MEKD's code (312,705 parameters for 10
    classes and grey images), except that batch normalisation has PyTorch's epsilon there, not 0.8. Other
    sizes are ours: the first map has about a quarter of the image's sides, and at most 8 pixels a side.

    Args:
        classes: Size of the latents.
        input_shape: ``(channels, height, width)`` of the images; any size.
        width: Channels within, at least 2; the last map has half as many.
    Example:
        >>> images = Generator(10, (3, 9, 14), width=8)(torch.randn(2, 10))
        >>> images.shape, bool(images.abs().max() <= 1)
        (torch.Size([2, 3, 9, 14]), True)

    References:
        Ma et al., Aligning Logits Generatively for Principled Black-Box Knowledge Distillation, CVPR 2024,
        arXiv 2205.10490.
    """

    def __init__(self, classes: int, input_shape: Sequence[int], width: int = 128) -> None:
        super().__init__()
        channels, sides = image_channels(input_shape), tuple(input_shape[1:])
        doublings = max(2, math.ceil(math.log2(max(sides) / 8)))
        sizes = [tuple(math.ceil(side / 2**left) for side in sides) for left in reversed(range(doublings))]
        first = tuple(math.ceil(side / 2**doublings) for side in sides)
        self.classes = classes
        layers: list[nn.Module] = [
            nn.Linear(classes, width * math.prod(first)),
            nn.Unflatten(1, (width, *first)),
            nn.BatchNorm2d(width),
        ]
        widths = [width] * doublings + [width // 2]
        for index, size in enumerate(sizes):
            layers += [
                nn.Upsample(size),
                nn.Conv2d(widths[index], widths[index + 1], 3, padding=1),
                nn.BatchNorm2d(widths[index + 1]),
                nn.LeakyReLU(SLOPE),
            ]
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Tanh())
        for module in self.body:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def draw(self, count: int) -> Tensor:
        """So many latents from the standard normal distribution, on the generator's device."""
        device = next(self.parameters()).device
        return torch.randn(count, self.classes).to(device)  # the same draws on every device

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.body(latents)
        return images


class Discriminator(nn.Module):
    """From images with values in [-1, 1] to the log-odds that they are real, ``(N,)``.

    Three 3x3 convolutions of stride 2 with leaky ReLUs, and a linear layer. It has no batch normalisation,
    unlike that of MEKD's code: shown real images and made ones apart, it takes the mean of either batch away,
    and where the last map is a single pixel nothing is left by which the two differ on average. On 8x8
    pixels such a discriminator learned nothing at all, nor did its generator.

    Args:
        input_shape: ``(channels, height, width)`` of the images; any size.
    Example:
        >>> Discriminator((3, 9, 14))(torch.zeros(2, 3, 9, 14)).shape
        torch.Size([2])
    """

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__()
        inputs, sides = image_channels(input_shape), tuple(input_shape[1:])
        layers: list[nn.Module] = []
        for outputs in (32, 64, 128):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
            inputs, sides = outputs, tuple(math.ceil(side / 2) for side in sides)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * math.prod(sides), 1))

    def forward(self, images: Tensor) -> Tensor:
        odds: Tensor = self.body(images).squeeze(1)
        return odds
