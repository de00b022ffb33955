"""Generator and discriminator of images, sized by the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .network import image_channels

SLOPE = 0.2
"""Negative slope of the leaky ReLUs."""


class Generator(nn.Module):
    """Generates images ``(N, channels, height, width)`` with values in [-1, 1] from latents ``(N, C)``.

    A linear layer makes a small map; each step enlarges it and applies a 3x3 convolution. With 32x32 pixels
    and a width of 128 this is the generator of MEKD's code (312,705 parameters for 10 classes and grey
    images), except that batch normalisation has PyTorch's epsilon instead of 0.8. For other sizes we choose a
    first map with about a quarter of the image's sides and at most 8 pixels per side.

    Args:
        classes: Size of the latents.
        input_shape: ``(channels, height, width)`` of the images; any size.
        width: Hidden channels, at least 2; the last map has half as many.
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
        """Draw ``count`` latents from the standard normal distribution, on the generator's device."""
        device = next(self.parameters()).device
        # On the CPU first: a seed then gives the same latents on every device.
        return torch.randn(count, self.classes).to(device)

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.body(latents)
        return images


class Discriminator(nn.Module):
    """Returns the log-odds that images with values in [-1, 1] are real, ``(N,)``.

    Three 3x3 convolutions of stride 2 with leaky ReLUs, and a linear layer. Unlike the one in MEKD's code it
    has no batch normalisation: with real and generated images in separate batches, normalisation removes the
    mean of each batch, and with a last map of one pixel the two no longer differ on average. On 8x8 pixels
    neither such a discriminator nor its generator learned anything.

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
