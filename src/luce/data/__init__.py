"""Data sets by name, splits and batches.

>>> from luce import data
>>> digits = data.load("sklearn:digits")
>>> train, validation, test = data.split(digits, validation=0.1, seed=0)
>>> len(train), len(validation), len(test)
(1167, 130, 500)
>>> batch = next(iter(data.loader(train, batch_size=32, seed=0)))
>>> batch["input"].shape, batch["target"].shape
(torch.Size([32, 1, 8, 8]), torch.Size([32]))
"""

from __future__ import annotations

from . import augmentations
from .augmentations import augment
from .batches import EpochSampler, loader
from .dataset import Data, from_datasets
from .examples import UNLABELLED, Examples, hold_out, keep_labels, split
from .loaders import load, names
from .sources import InMemory, Source
from .text import Tokenizer

__all__ = [
    "UNLABELLED",
    "Data",
    "EpochSampler",
    "Examples",
    "InMemory",
    "Source",
    "Tokenizer",
    "augment",
    "augmentations",
    "from_datasets",
    "hold_out",
    "keep_labels",
    "load",
    "loader",
    "names",
    "split",
]
