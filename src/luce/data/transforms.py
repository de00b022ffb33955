"""Pillow images as tensors: the usual training and evaluation views of ImageNet."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from PIL import Image

CROP_SHARE = 0.95  # share of the short side in the evaluation crop
AREA = 0.08, 1.0  # share of the image's area in a training crop
ASPECT = 3 / 4, 4 / 3

# Statistics of ImageNet's training images. Measuring a large folder can take longer than training on it,
# other photographs have similar statistics, and pretrained networks expect these.
LARGEST = 2**13
"""Side of inputs in pixels, beyond which a batch fits into no memory."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def views(
    image_size: int | None, random_crop: bool
) -> tuple[Callable[[Image.Image], Tensor], Callable[[Image.Image], Tensor]]:
    """Return the views of training and evaluation; without ``image_size``, images stay as they are.

    Raises:
        UserError: If ``image_size`` is no positive integer, or missing for ``random_crop``, or the latter is
            no truth value.
    """
    if type(random_crop) is not bool:
        raise UserError(f"expected `random_crop` to be true or false, got {random_crop!r}")
    if image_size is None:
        if random_crop:
            raise UserError("expected `image_size`, the side of the crops, with `random_crop`")
        return to_tensor, to_tensor
    if type(image_size) is not int or not 1 <= image_size <= LARGEST:
        raise UserError(
            f"expected `image_size` to be a positive number of pixels, at most {LARGEST}, got {image_size!r}"
        )
    evaluation = partial(evaluation_view, size=image_size)
    return partial(training_view, size=image_size) if random_crop else evaluation, evaluation


def described(image_size: int, random_crop: bool) -> str:
    """State in words what the views do."""
    side = f"{image_size} x {image_size}"
    random = f"random crops of {side} in training, half of them mirrored, otherwise " if random_crop else ""
    return f"{random}short side to {short_side(image_size)}, centre crop of {side}"


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an image with 8 bits per channel, such as RGB or L, to float32 in [0, 1], ``(C, H, W)``."""
    values = torch.from_numpy(np.array(image))
    return values.reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous().float().div_(255)


def evaluation_view(image: Image.Image, size: int) -> Tensor:
    """Resize the short side to ``int(size / 0.95)`` pixels, bicubic; crop the centre ``size`` x ``size``.

    An image of exactly ``size`` x ``size`` stays as it is.
    """
    from PIL.Image import Resampling

    if image.size == (size, size):
        return to_tensor(image)
    scale = short_side(size) / min(image.size)
    width, height = (max(round(side * scale), size) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Resampling.BICUBIC)
    return to_tensor(resized.crop((left, top, left + size, top + size)))


def short_side(size: int) -> int:
    """Return the short side in pixels before the centre crop of :func:`evaluation_view`."""
    return int(size / CROP_SHARE)


def training_view(image: Image.Image, size: int) -> Tensor:
    """Scale a random crop to ``size`` x ``size``, mirror half of them; use torch's global generator."""
    from PIL.Image import Resampling, Transpose

    view = image.resize((size, size), Resampling.BICUBIC, box=random_box(*image.size))
    if torch.rand(()) < 0.5:
        view = view.transpose(Transpose.FLIP_LEFT_RIGHT)
    return to_tensor(view)


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Draw left, top, right and bottom of a crop with 8 to 100% of the area and a ratio of 3/4 to 4/3.

    Area and ratio are drawn uniformly, the ratio on a log scale. If ten draws do not fit into the image, as
    in a very long one, the result is the largest centred crop with a ratio within the limits.
    """
    for _ in range(10):
        area = width * height * _uniform(*AREA)
        aspect = math.exp(_uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(torch.randint(room + 1, ())) for room in (width - w, height - h))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
