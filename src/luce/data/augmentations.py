"""Random augmentations of a batch of images, drawn per image and applied without a loop over images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, unknown_name

PADDING = 4
"""Zero pixels on each side before a random crop, as for CIFAR."""

ROTATION = math.radians(15)
SHEAR = 0.1
ZOOM = 0.1
SHIFT = 0.1
COLOUR = 0.4
CUT = 0.25
"""Limits of `strong`; ``SHIFT`` is a share of the image's size, ``CUT`` a share of its shorter side."""


def none(images: Tensor) -> Tensor:
    """Return the images unchanged."""
    return images


def flip(images: Tensor) -> Tensor:
    """Mirror each image left to right with probability 1/2; shape ``(N, C, H, W)``."""
    _check_images(images, "flip")
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def crop_flip(images: Tensor) -> Tensor:
    """Shift each image by up to 4 pixels each way, fill with zeros, then :func:`flip`; ``(N, C, H, W)``."""
    _check_images(images, "crop_flip")
    height, width = images.shape[-2:]
    # A view of every possible crop, (N, C, 9, 9, H, W); indexing copies one per image.
    crops = F.pad(images, [PADDING] * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(0, 2 * PADDING + 1, (2, len(images)), device=images.device)
    return flip(crops[torch.arange(len(images)), :, top, left])


def strong(images: Tensor) -> Tensor:
    """Distort each image, change its contrast and brightness, and erase a square; ``(N, C, H, W)``.

    An image is rotated by up to 15 degrees and sheared, zoomed and shifted by up to a tenth. Contrast and
    brightness change by up to 40% and are clamped to [0, 1]. Zeros fill the borders and a square with a side
    of a quarter of the shorter side, which may extend beyond the edge. The result resembles RandAugment but
    is not the same: all draws are made at once for the whole batch.
    """
    _check_images(images, "strong")
    return _cut_out(_recolour(_distort(images)))


def _distort(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    rotation, shear, zoom = (
        _uniform(0, ROTATION, images),
        _uniform(0, SHEAR, images),
        _uniform(1, ZOOM, images),
    )
    right, down = _uniform(0, 2 * SHIFT, images), _uniform(0, 2 * SHIFT, images)
    cos, sin = zoom * rotation.cos(), zoom * rotation.sin()
    # Shear, then rotation. The grid runs from -1 to 1 along both sides, so without the ratio of the sides a
    # rotation would distort images that are not square.
    onto_x = torch.stack([cos, (shear * cos - sin) * (height / width), right], dim=-1)
    onto_y = torch.stack([sin * (width / height), shear * sin + cos, down], dim=-1)
    grid = F.affine_grid(torch.stack([onto_x, onto_y], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _recolour(images: Tensor) -> Tensor:
    contrast, brightness = (_uniform(1, COLOUR, images).view(-1, 1, 1, 1) for _ in range(2))
    mean = images.mean((1, 2, 3), keepdim=True)
    return (brightness * (mean + contrast * (images - mean))).clamp(0, 1)


def _cut_out(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    side = max(1, round(CUT * min(height, width)))

    def stripe(size: int) -> Tensor:
        first = torch.randint(1 - side, size, (len(images), 1), device=images.device)
        place = torch.arange(size, device=images.device) - first
        return (place >= 0) & (place < side)

    return images.masked_fill(stripe(height)[:, None, :, None] & stripe(width)[:, None, None, :], 0)


def _uniform(middle: float, reach: float, images: Tensor) -> Tensor:
    """Draw a number for each image, uniformly from ``middle - reach`` to ``middle + reach``."""
    return middle + reach * (2 * torch.rand(len(images), dtype=images.dtype, device=images.device) - 1)


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": none,
    "flip": flip,
    "crop_flip": crop_flip,
    "strong": strong,
}


def augment(name: str) -> Callable[[Tensor], Tensor]:
    """Return an augmentation by name, a function from a batch of inputs to a batch of inputs.

    Example:
        >>> augment("flip")(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """
    if name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]


def _check_images(images: Tensor, name: str) -> None:
    if images.ndim != 4:
        raise UserError(
            f"augmentation `{name}` expects images of shape (N, C, H, W), got {tuple(images.shape)}; "
            "use `none`"
        )
