"""Random changes to a batch of images, drawn per image and applied without a loop over images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, unknown_name

PADDING = 4
"""Zero pixels on each side before a random crop, as for CIFAR."""

TURN = math.radians(15)
SHEAR = 0.1
ZOOM = 0.1
SHIFT = 0.1
COLOUR = 0.4
CUT = 0.25
"""How far `strong` goes: the shift is a part of the image's size, the cut of its shorter side."""


def none(images: Tensor) -> Tensor:
    """The images as they are."""
    return images


def flip(images: Tensor) -> Tensor:
    """Mirror each image left to right with probability 1/2; shape ``(N, C, H, W)``."""
    _check_images(images, "flip")
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def crop_flip(images: Tensor) -> Tensor:
    """Shift each image by up to 4 pixels each way, zeros coming in, then :func:`flip`; ``(N, C, H, W)``."""
    _check_images(images, "crop_flip")
    height, width = images.shape[-2:]
    # A view of every possible crop, (N, C, 9, 9, H, W); indexing copies one per image.
    crops = F.pad(images, [PADDING] * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(0, 2 * PADDING + 1, (2, len(images)), device=images.device)
    return flip(crops[torch.arange(len(images)), :, top, left])


def strong(images: Tensor) -> Tensor:
    """Distort each image, change its contrast and brightness, and cut a square out of it; ``(N, C, H, W)``.

    An image is turned by up to 15 degrees, sheared, zoomed and shifted by up to a tenth; contrast and
    brightness change by up to 40%, in [0, 1] as Luce's images are; zeros come in, and stand in the square of
    a quarter of the shorter side, which may reach over the edge. This is the kind of view that RandAugment
    makes, drawn at once for a whole batch; it is not RandAugment.
    """
    _check_images(images, "strong")
    return _cut_out(_recolour(_distort(images)))


def _distort(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    turn, shear, zoom = _about(0, TURN, images), _about(0, SHEAR, images), _about(1, ZOOM, images)
    right, down = _about(0, 2 * SHIFT, images), _about(0, 2 * SHIFT, images)
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    # A shear and then a turn in pixels, in a grid that runs from -1 to 1 along either side.
    onto_x = torch.stack([cos, (shear * cos - sin) * (height / width), right], dim=-1)
    onto_y = torch.stack([sin * (width / height), shear * sin + cos, down], dim=-1)
    grid = F.affine_grid(torch.stack([onto_x, onto_y], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _recolour(images: Tensor) -> Tensor:
    contrast, brightness = (_about(1, COLOUR, images).view(-1, 1, 1, 1) for _ in range(2))
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


def _about(middle: float, reach: float, images: Tensor) -> Tensor:
    """A number for each image, evenly from so far below the middle to so far above."""
    return middle + reach * (2 * torch.rand(len(images), dtype=images.dtype, device=images.device) - 1)


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": none,
    "flip": flip,
    "crop_flip": crop_flip,
    "strong": strong,
}


def augment(name: str) -> Callable[[Tensor], Tensor]:
    """The augmentation of that name, a function from a batch of inputs to a batch of inputs.

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
