"""Images in folders, one folder per class."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import log
from ..config import as_path
from ..errors import UserError
from .dataset import Data, describe
from .headers import Headers
from .images import Size, read_image
from .listing import HARMLESS, PROBABLE_MISTAKES, Listing, list_images, named, shown
from .sources import LazyImages
from .transforms import views

if TYPE_CHECKING:
    from PIL import Image


def load_image_folder(
    path: str, root: Path | None, *, image_size: int | None = None, random_crop: bool = False
) -> Data:
    """Load ImageNet's layout: ``PATH/train/CLASS/*.jpg`` and ``PATH/test`` or, without it, ``PATH/val``.

    Classes are the folders of ``train`` in alphabetical order; images in folders below a class's belong to
    it. `luce.data.listing` decides which files count. Images are read on demand, as RGB
    (`luce.data.images.as_seen`). ``mean`` and ``std`` are those of ImageNet. What was read and left out is
    said in one line.

    Args:
        path: The folder, relative to ``root`` if that is given.
        root: Parent folder.
        image_size: Side of the square inputs in pixels, a centre crop of the scaled image. None keeps images
            of one size as they are.
        random_crop: Whether training rows are random crops, half of them mirrored; the ``plain`` view of
            them, and ``test``, are centre crops (see :mod:`luce.data.transforms`).

    Raises:
        UserError: If folders or images are missing, images of several sizes come without ``image_size``, or,
            on reading, an image is damaged.
    """
    name = f"imagefolder:{shown(path)}"
    training, evaluation = views(image_size, random_crop)
    folder = (root or Path()) / as_path(path)
    train, test = _parts(folder)
    paths = [part.folder / name for part in (train, test) for name in part.names]
    headers = Headers.read(len(paths), lambda index: (paths[index], shown(paths[index])))
    size = headers.only_size() if image_size is None else None
    counts = ", ".join(
        f"{part.folder.name} {len(part.names):,} images in {len(part.classes)} classes"
        for part in (train, test)
    )
    remarks = [*headers.plan(image_size, random_crop), "RGB, mean and std of ImageNet"]
    log.info("; ".join([f"{name}: {counts}", *remarks, *_remarks(folder, train, test)]))
    _warn(name, train, test)
    open_train, train_targets = _rows(train, train.classes, size)
    open_test, test_targets = _rows(test, train.classes, size)
    plain = evaluation if random_crop else None
    return describe(
        name,
        LazyImages(open_train, train_targets, training, plain, files=open_train.args),
        LazyImages(open_test, test_targets, evaluation, files=open_test.args),
        classes=[shown(label) for label in train.classes],
        licence="unknown",
    )


def _parts(folder: Path) -> tuple[Listing, Listing]:
    """List the images of ``train``, and of ``test`` or, if no class folder in it holds images, ``val``."""
    train = list_images(folder / "train")
    if not train.classes:
        raise _no_images(folder, train)
    tests = (list_images(folder / part) for part in ("test", "val"))
    test = next((listing for listing in tests if listing.classes), None)
    if test is None:
        raise _no_images(folder, list_images(folder / "test"))
    if unknown := sorted(set(test.classes) - set(train.classes)):
        raise UserError(
            f"expected the classes of {shown(test.folder)} to have images in train too, "
            f"`{shown(unknown[0])}` has none"
        )
    return train, test


def _no_images(folder: Path, part: Listing) -> UserError:
    """Return the error for a part without images: what was expected, and what lies there."""
    place = shown(part.folder)
    either = " or val" if part.folder.name == "test" else ""
    if os.path.isdir(part.folder):
        left_out = [f"{len(names):,} {reason}" for reason, names in part.left_out.items() if names]
        found = ", ".join([f"{len(part.files)} class folders", *left_out])
    elif os.path.isdir(folder):
        below = sorted(entry.name for entry in os.scandir(folder))
        found = f"only {named(below)} in {shown(folder)}" if below else f"an empty folder {shown(folder)}"
    else:
        found = f"no folder {shown(folder)}"
    return UserError(
        f"expected a folder {place}{either} with a folder of images per class, such as {place}/cat/1.jpg, "
        f"got {found}"
    )


def _remarks(folder: Path, train: Listing, test: Listing) -> list[str]:
    """State what is not used, and what was left out for a harmless reason."""
    remarks = []
    if nested := train.nested + test.nested:
        remarks.append(f"{nested:,} of the images lie in folders below that of their class")
    unused = "val" if test.folder.name == "test" else "test"
    if os.path.isdir(folder / unused):
        cause = (
            ": validation rows come from train" if unused == "val" else ", as no folder in it holds images"
        )
        remarks.append(f"{unused} is not used{cause}")
    for reason in HARMLESS:
        if names := _left_out(train, test, reason):
            remarks.append(f"left out {reason}: {named(names)}")
    return remarks


def _warn(name: str, train: Listing, test: Listing) -> None:
    """Warn of what was left out and looks like a mistake."""
    for reason in PROBABLE_MISTAKES:
        if names := _left_out(train, test, reason):
            log.warning(f"{name}: left out {reason}: {named(names)}; move or delete them")
    if empty := [label for label in train.files if label not in train.classes]:
        log.warning(
            f"{name}: folders of train without images are no classes: {named(empty)}; delete or fill them"
        )
    if train.places & test.places:
        log.warning(
            f"{name}: {test.folder.name} is, or leads by links to, folders of train, whose rows are not held "
            "out for testing"
        )
    if len(train.classes) == 1:
        log.warning(
            f"{name}: there is only one class, {shown(train.classes[0])}; "
            f"check the folders in {shown(train.folder)}"
        )


def _left_out(train: Listing, test: Listing, reason: str) -> list[str]:
    return [
        os.path.join(part.folder.name, name)
        for part in (train, test)
        for name in part.left_out.get(reason, [])
    ]


def _rows(part: Listing, classes: list[str], size: Size | None) -> tuple[partial[Image.Image], Tensor]:
    counts = torch.tensor([len(part.files.get(label, [])) for label in classes])
    # An array, not a list: reference counts of a million Python strings would copy their memory pages into
    # every reading process.
    files = np.array([os.fsencode(name) for label in classes for name in part.files.get(label, [])])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return partial(_open_file, part.folder, files, size=size), labels


def _open_file(folder: Path, files: np.ndarray, index: int, size: Size | None) -> Image.Image:
    path = folder / os.fsdecode(files[index])
    return read_image(path, shown(path), size=size)
