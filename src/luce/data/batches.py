"""Batches in an order determined by seed and epoch."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info

from .. import stops
from ..errors import UserError
from . import augmentations
from .examples import Examples, LazyRows, checked_seed


class EpochSampler(Sampler[int]):
    """A shuffle that is a pure function of ``(seed, epoch)``: a resumed epoch repeats its order.

    Args:
        size: Number of rows.
        seed: Seed in ``0 .. 2**32 - 1``.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = checked_seed(seed)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        # Not `seed + epoch`: epoch 1 of seed 0 would equal epoch 0 of seed 1, and runs would not be
        # independent.
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist())


def loader(
    examples: Examples,
    *,
    batch_size: int,
    seed: int | None,
    augment: Callable[[Tensor], Tensor] | None = None,
    strong_augment: Callable[[Tensor], Tensor] | None = None,
    workers: int = 0,
    drop_last: bool = False,
) -> DataLoader[dict[str, Any]]:
    """Load batches of examples: dicts of ``input`` ``(N, ...)``, ``target`` ``(N,)`` and ``index`` ``(N,)``.

    Call ``loader.sampler.set_epoch(epoch)`` before each shuffled epoch. After ``Accelerator.prepare`` that
    is ``loader.set_epoch(epoch)``, which reaches the same sampler.

    Args:
        examples: Rows to load.
        batch_size: Rows per batch (and process).
        seed: An integer shuffles every epoch anew. None keeps the order and does not touch the global random
            state, so that additional evaluations do not change a training run.
        augment: Applied to the whole input batch. Draws from torch's global generator; restoring its state
            between epochs reproduces an epoch. See :mod:`luce.data.augmentations`.
        strong_augment: Adds a second view of the batch, ``strong``, of the same shape as ``input``: a new
            draw of ``augment``, followed by ``strong_augment``.
        workers: Number of reading processes; 0 reads in the current process, fastest for data in memory.
        drop_last: Drop a smaller last batch.

    Raises:
        UserError: If ``batch_size`` is not positive, or ``drop_last`` leaves no batch.
    """
    if batch_size < 1:
        raise UserError(f"expected `batch_size` to be at least 1, got {batch_size}")
    if drop_last and len(examples) < batch_size:
        raise UserError(
            f"expected at least one batch of {batch_size} with `drop_last`, got {len(examples)} examples; "
            "use a smaller `batch_size`"
        )
    return DataLoader(
        examples,
        batch_size=batch_size,
        sampler=None if seed is None else EpochSampler(len(examples), seed),
        # Every iterator draws a base seed; without a generator of its own, evaluation would advance the
        # global one.
        generator=torch.Generator() if seed is None else None,
        collate_fn=partial(_collate, augment=augment, strong_augment=strong_augment),
        # Not persistent: new workers are seeded from the global generator, so restoring it reproduces an
        # epoch.
        num_workers=workers,
        worker_init_fn=stops.ignore_in_worker if workers else None,
        pin_memory=torch.cuda.is_available(),
        drop_last=drop_last,
    )


class ReaderError(Exception):
    """Brings an error of a reading process to the main one, where it is raised with its type and message.

    PyTorch calls the type of the error with a text that ends in its message. The message of this type is the
    pickled error, and calling it with that text returns the error itself.
    """

    def __new__(cls, text: str) -> Any:
        traceback, name, pickled = text.rpartition(f"{cls.__qualname__}: ")
        if not name:
            return super().__new__(cls, text)
        error = pickle.loads(base64.b85decode(pickled.strip()))
        error.__cause__ = RuntimeError(traceback)
        return error


def _collate(
    rows: LazyRows,
    augment: Callable[[Tensor], Tensor] | None,
    strong_augment: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    try:
        return _read(rows, augment, strong_augment)
    except Exception as error:
        if get_worker_info() is None:
            raise
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:  # some errors cannot be made again: PyTorch raises their text
            raise error from None
        raise ReaderError(base64.b85encode(pickled).decode()) from error


def _read(
    rows: LazyRows,
    augment: Callable[[Tensor], Tensor] | None,
    strong_augment: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    batch = rows.collated()
    augment = augment or augmentations.none
    plain = batch["input"]
    batch["input"] = augment(plain)
    if strong_augment is not None:
        batch["strong"] = strong_augment(augment(plain))
    return batch
