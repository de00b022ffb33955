"""Data by name: one loader per source."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import log
from ..config import as_path
from ..errors import MissingExtra, UserError, import_optional, unknown_name
from .dataset import Data, describe, stratified
from .folders import load_image_folder
from .hub import load_hub
from .idx import read_idx
from .sources import InMemory

SKLEARN = ("breast_cancer", "digits", "iris", "wine")
DEBIAN = Path("usr/share/datasets/fashion-mnist")
DOWNLOADS = Path("~/.cache/luce")

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load(name: str, *, root: str | Path | None = None, **options: Any) -> Data:
    """Load a data set by name.

    - ``sklearn:NAME``: digits (images), iris, wine or breast_cancer (features), part of scikit-learn. The
      test rows are a fixed stratified sample: 500 of the digits, a quarter of the others.
    - ``fashion-mnist``: 60,000 and 10,000 images, from IDX files in ``root``, from Debian's package
      ``dataset-fashion-mnist``, or downloaded by torchvision.
    - ``torchvision:NAME``: CIFAR10, CIFAR100, MNIST and others that torchvision holds in memory.
    - ``imagefolder:PATH``: ``PATH/train/CLASS/*.jpg`` and ``PATH/test`` or ``PATH/val``. Options
      ``image_size`` and ``random_crop``.
    - ``hf:NAME``: any data set of ``datasets.load_dataset``. Options ``config``, ``input_column``,
      ``label_column``, ``test_split``, ``image_size`` and ``random_crop``, for texts ``tokenizer`` and
      ``max_length``.
    - ``python:MODULE.FUNCTION``: the result of your function, called with the options, and ``root`` if given.

    Args:
        name: One of the above.
        root: Folder of the files; None uses the default of each loader (``~/.cache/luce`` for torchvision's
            downloads).
        **options: Options of the loader.

    Raises:
        UserError: If a name or option is unknown, or the data is missing or damaged.

    Example:
        >>> digits = load("sklearn:digits")
        >>> len(digits.train), len(digits.test), digits.input_shape, digits.classes[:3]
        (1297, 500, (1, 8, 8), ('0', '1', '2'))
    """
    kind, _, argument = name.partition(":")
    pattern = next((p for p in LOADERS if p.partition(":")[0] == kind), None)
    if pattern is None or bool(argument) != (":" in pattern):
        raise unknown_name("data", name, names())
    loader = LOADERS[pattern]
    if loader is not load_python:
        parameters = inspect.signature(loader).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        for option in options.keys() - known:
            raise UserError(f"data `{name}` has no option `{option}`; it has: {', '.join(known) or 'none'}")
    return loader(argument, None if root is None else as_path(root), **options)


def names() -> tuple[str, ...]:
    """List the names that :func:`load` accepts; capitals are placeholders.

    Example:
        >>> names()[0], names()[-1]
        ('sklearn:breast_cancer', 'python:MODULE.FUNCTION')
    """
    return (*(f"sklearn:{name}" for name in SKLEARN), *(p for p in LOADERS if p != "sklearn:NAME"))


def load_sklearn(name: str, root: Path | None) -> Data:
    """Load a classification set that is part of scikit-learn."""
    from sklearn import datasets

    if name not in SKLEARN:
        raise unknown_name("data", f"sklearn:{name}", [f"sklearn:{known}" for known in SKLEARN])
    bunch = getattr(datasets, f"load_{name}")()
    values = bunch.images[:, None] / 16 if name == "digits" else bunch.data
    inputs, targets = torch.from_numpy(values).float(), torch.from_numpy(bunch.target)
    train, test = stratified(targets, 500 if name == "digits" else 0.25, seed=0)
    return describe(
        f"sklearn:{name}",
        InMemory(inputs[train], targets[train]),
        InMemory(inputs[test], targets[test]),
        classes=[str(label) for label in bunch.target_names],
        licence="BSD-3-Clause, distributed with scikit-learn",
    )


def load_fashion_mnist(_: str, root: Path | None) -> Data:
    """Load Fashion-MNIST from IDX files, gzipped or not, or through torchvision."""
    folders = [root, root / "FashionMNIST/raw", root / DEBIAN] if root else []
    for folder in [*folders, "/" / DEBIAN]:
        if any(folder.glob("train-images-idx3-ubyte*")):
            if root is not None and folder not in folders:
                log.info(f"`fashion-mnist`: read from {folder}, as {root} has none of its files")
            return describe(
                "fashion-mnist",
                _read_idx_part(folder, "train"),
                _read_idx_part(folder, "t10k"),
                classes=FASHION_CLASSES,
                licence="MIT",
            )
    try:
        return replace(load_torchvision("FashionMNIST", root), name="fashion-mnist", licence="MIT")
    except MissingExtra as error:
        raise UserError(
            "Fashion-MNIST was not found; run `apt-get install dataset-fashion-mnist`, set `root` to a "
            "folder with its four IDX files, or `pip install 'luce[vision]'` to let torchvision download it"
        ) from error


def _read_idx_part(folder: Path, part: str) -> InMemory:
    def find(stem: str) -> Path:
        return folder / stem if (folder / stem).is_file() else folder / f"{stem}.gz"

    images = read_idx(find(f"{part}-images-idx3-ubyte"), dims=3)
    labels = read_idx(find(f"{part}-labels-idx1-ubyte"), dims=1)
    if len(images) != len(labels):
        raise UserError(
            f"expected one label per image in the {part} files of {folder}, "
            f"got {len(images)} images and {len(labels)} labels"
        )
    return InMemory(images[:, None], labels)


def load_torchvision(name: str, root: Path | None) -> Data:
    """Load a torchvision class with images in ``data`` and labels in ``targets`` or ``labels``."""
    module = import_optional("torchvision.datasets", "vision")
    if not hasattr(module, name):
        raise unknown_name("torchvision data set", name, [n for n in vars(module) if n[0].isupper()])
    make = getattr(module, name)
    has_flag = "train" in inspect.signature(make).parameters
    folder = str(root or DOWNLOADS.expanduser())
    parts = []
    for part in ("train", "test"):
        which = {"train": part == "train"} if has_flag else {"split": part}
        try:
            dataset = make(folder, download=True, **which)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"torchvision could not load the {part} split of {name}: {error}") from error
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
        if labels is None or not hasattr(dataset, "data"):
            raise UserError(
                f"torchvision's {name} does not hold its images in memory; "
                "use `imagefolder:PATH` on its files, or wrap it in a function for `python:`"
            )
        images = torch.as_tensor(dataset.data)
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2).contiguous()
        parts.append(InMemory(images, torch.as_tensor(labels)))
    return describe(
        f"torchvision:{name}",
        *parts,
        classes=getattr(dataset, "classes", None),
        licence="not stated by torchvision",
    )


def load_python(path: str, root: Path | None, **options: Any) -> Data:
    """Call the user's function, given as ``package.module.function``, and return its result."""
    module_name, _, attribute = path.rpartition(".")
    try:
        make = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"expected `python:{path}` to name a function as package.module.function: {error}"
        ) from error
    data = make(**options) if root is None else make(root=root, **options)
    if not isinstance(data, Data):
        raise UserError(f"expected `python:{path}` to return luce.data.Data, got {type(data).__name__}")
    return data


LOADERS: dict[str, Callable[..., Data]] = {
    "sklearn:NAME": load_sklearn,
    "fashion-mnist": load_fashion_mnist,
    "torchvision:NAME": load_torchvision,
    "imagefolder:PATH": load_image_folder,
    "hf:NAME": load_hub,
    "python:MODULE.FUNCTION": load_python,
}
