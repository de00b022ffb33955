"""Batches of rows outside the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
from rich.progress import Progress
from torch import Tensor

from .. import data, stops
from ..data import Examples
from .progress import Bar

EVALUATION_BATCH = 256
"""Rows per batch where nothing is trained."""


def in_order(examples: Examples, batch_size: int = EVALUATION_BATCH) -> Iterable[dict[str, Tensor]]:
    """Return batches of all rows in order and without augmentation."""
    return data.loader(examples.plain, batch_size=batch_size, seed=None)


class TrainingBatches:
    """The training rows for a method that prepares itself; implements `luce.methods.TrainingRows`.

    Args:
        examples: The rows.
        device: Of the batches.
        seed: Of the order of shuffled passes.
        augment: Applied to shuffled passes.
        workers: Processes that read data.
        progress: Display that each pass adds a bar to.
        at_most: Number of batches after which every pass ends, for a dry run.
    """

    def __init__(
        self,
        examples: Examples,
        device: torch.device,
        seed: int = 0,
        augment: Callable[[Tensor], Tensor] | None = None,
        workers: int = 0,
        progress: Progress | None = None,
        at_most: int | None = None,
    ) -> None:
        self.examples, self.device, self.seed, self.augment = examples, device, seed, augment
        self.workers, self.progress, self.at_most = workers, progress, at_most

    @property
    def trial(self) -> bool:
        return self.at_most is not None

    def batches(
        self, batch_size: int = 256, *, epochs: int = 1, shuffle: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        loader = data.loader(
            self.examples if shuffle else self.examples.plain,
            batch_size=batch_size,
            seed=self.seed if shuffle else None,
            augment=self.augment if shuffle else None,
            workers=self.workers,
        )
        total = epochs * len(loader) if self.at_most is None else self.at_most
        # Reading processes end in a destructor, where Ctrl-C would be lost; without them it acts at once.
        watched = stops.noted() if self.workers else nullcontext()
        with watched, Bar(self.progress, "preparation", total) as bar:
            done = 0
            for epoch in range(epochs):
                if isinstance(loader.sampler, data.EpochSampler):
                    loader.sampler.set_epoch(epoch)
                for batch in loader:
                    if done == total:
                        return
                    yield {name: part.to(self.device) for name, part in batch.items()}
                    done += 1
                    bar.advance()
                    stops.check()
