"""Random changes to a batch of images, drawn per image and applied without a loop over images."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from luce.errors import UserError, unknown_name

PADDING = 4
"""Zero pixels on each side before a random crop, as for CIFAR."""


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


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": none, "flip": flip, "crop_flip": crop_flip}


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
