"""Pillow images as tensors: the usual training and evaluation views of ImageNet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

CROP_SHARE = 0.95  # share of the short side in the evaluation crop
AREA = 0.08, 1.0  # share of the image's area in a training crop
ASPECT = 3 / 4, 4 / 3

# Statistics of ImageNet's training images. Measuring a large folder can take longer than training on it,
# other photographs have similar statistics, and pretrained networks expect these.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an image with 8 bits per channel, such as RGB or L, to float32 in [0, 1], ``(C, H, W)``."""
    values = torch.from_numpy(np.array(image))
    return values.reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous().float().div_(255)


def evaluation_view(image: Image.Image, size: int) -> Tensor:
    """Resize the short side to ``int(size / 0.95)`` pixels, bicubic; crop the centre ``size`` x ``size``."""
    from PIL.Image import Resampling

    scale = int(size / CROP_SHARE) / min(image.size)
    width, height = (max(round(side * scale), size) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Resampling.BICUBIC)
    return to_tensor(resized.crop((left, top, left + size, top + size)))


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
