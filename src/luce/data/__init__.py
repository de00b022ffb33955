"""Data sets by name, their splits, and the batches a training loop reads.

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

from luce.data import augmentations
from luce.data.augmentations import augment
from luce.data.batches import EpochSampler, loader
from luce.data.dataset import Data, from_datasets
from luce.data.examples import UNLABELLED, Examples, hold_out, keep_labels, split
from luce.data.loaders import load, names
from luce.data.sources import InMemory, Source
from luce.data.text import Tokenizer

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
