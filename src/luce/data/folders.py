"""Images in folders, one folder per class."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .dataset import Data, describe
from .sources import LazyImages
from .transforms import evaluation_view, training_view

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def load_image_folder(path: str, root: Path | None, *, image_size: int = 224) -> Data:
    """Load ImageNet's layout: ``PATH/train/CLASS/*.jpg`` and ``PATH/test`` or, without it, ``PATH/val``.

    Classes are the folders of ``train`` in alphabetical order. Images are read on demand. ``train`` gives
    random crops; its ``plain`` view and ``test`` give centre crops (see :mod:`luce.data.transforms`).
    ``mean`` and ``std`` are those of ImageNet.

    Args:
        path: The folder, relative to ``root`` if that is given.
        root: Parent folder.
        image_size: Side of the square inputs in pixels.

    Raises:
        UserError: If folders or images are missing or, on reading, an image is damaged.
    """
    folder = (root or Path()) / Path(path).expanduser()
    test_folder = folder / "test" if _subfolders(folder / "test") else folder / "val"
    classes = _subfolders(folder / "train")
    for part in (folder / "train", test_folder):
        if not _subfolders(part):
            raise UserError(f"expected a folder {part} with one folder of images per class, got none")
    if unknown := set(_subfolders(test_folder)) - set(classes):
        raise UserError(f"expected the classes of {test_folder} to be in train too, `{min(unknown)}` is not")

    training, evaluation = (partial(view, size=image_size) for view in (training_view, evaluation_view))
    open_train, train_targets = _list_images(folder / "train", classes)
    open_test, test_targets = _list_images(test_folder, classes)
    return describe(
        f"imagefolder:{path}",
        LazyImages(open_train, train_targets, training, evaluation, files=open_train.args),
        LazyImages(open_test, test_targets, evaluation, files=open_test.args),
        classes=classes,
        licence="unknown",
    )


def _list_images(folder: Path, classes: list[str]) -> tuple[partial[Image.Image], Tensor]:
    files: list[bytes] = []
    targets: list[int] = []
    for label in [label for label, name in enumerate(classes) if (folder / name).is_dir()]:
        images = sorted(
            entry.name
            for entry in os.scandir(folder / classes[label])
            if entry.name.lower().endswith(SUFFIXES)
        )
        if not images:
            raise UserError(f"expected images ({', '.join(SUFFIXES)}) in {folder / classes[label]}, got none")
        files += [os.fsencode(os.path.join(classes[label], name)) for name in images]
        targets += [label] * len(images)
    # An array, not a list: reference counts of a million Python strings would copy their memory pages into
    # every reading process.
    return partial(_open_file, folder, np.array(files)), torch.tensor(targets)


def _open_file(folder: Path, files: np.ndarray, index: int) -> Image.Image:
    from PIL import Image

    path = folder / os.fsdecode(files[index])
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # Pillow's decoders raise different errors for damaged files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path} ({error}); replace or delete it") from error


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
