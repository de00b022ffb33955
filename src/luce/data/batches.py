"""Batches in an order that a seed and an epoch determine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ..errors import UserError
from . import augmentations
from .examples import Examples, Rows, checked_seed


class EpochSampler(Sampler[int]):
    """A shuffle that is a pure function of ``(seed, epoch)``: a resumed epoch sees the rows in its old order.

    Args:
        size: Number of rows.
        seed: In ``0 .. 2**32 - 1``.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = checked_seed(seed)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        # Not `seed + epoch`: epoch 1 of seed 0 would then be epoch 0 of seed 1, and runs would share orders.
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
    """Batches of examples: dicts of ``input`` ``(N, ...)``, ``target`` ``(N,)`` and ``index`` ``(N,)``.

    Call ``loader.sampler.set_epoch(epoch)`` before each shuffled epoch. After ``Accelerator.prepare`` that
    is ``loader.set_epoch(epoch)``, which reaches the same sampler.

    Args:
        examples: What to read.
        batch_size: Rows per batch (and process).
        seed: None reads in order and leaves the global random state alone, so that evaluating more often
            does not change a training run. An integer shuffles, each epoch anew.
        augment: Applied to the whole input batch; draws from torch's global generator, so that restoring
            its state between epochs reproduces an epoch. See :mod:`luce.data.augmentations`.
        strong_augment: Makes a second view of the batch, ``strong``, of the same shape as ``input``: it is
            applied to ``augment`` drawn anew.
        workers: Processes that read; 0 reads in this one, which is fastest for data in memory.
        drop_last: Leave out a smaller last batch.

    Raises:
        UserError: If ``batch_size`` is not positive, or ``drop_last`` would leave no batch.
    """
    if batch_size < 1:
        raise UserError(f"expected `batch_size` to be at least 1, got {batch_size}")
    if drop_last and len(examples) < batch_size:
        raise UserError(
            f"{len(examples)} examples do not fill one batch of {batch_size}, and `drop_last` leaves out "
            "smaller ones; use a smaller `batch_size`"
        )
    return DataLoader(
        examples,
        batch_size=batch_size,
        sampler=None if seed is None else EpochSampler(len(examples), seed),
        # An iterator draws a base seed as it starts: from here if nothing is shuffled, else globally.
        generator=torch.Generator() if seed is None else None,
        collate_fn=partial(_collate, augment=augment, strong_augment=strong_augment),
        # Not persistent: fresh workers are seeded from the global generator, so an epoch can be reproduced.
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=drop_last,
    )


def _collate(
    rows: Rows,
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
