"""How large the activations of a network get: percentiles over any number of them, in fixed memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .chain import Chain

BINS = 1 << 16


class Percentiles:
    """Percentiles of non-negative numbers that come in batches.

    They are counted in bins of equal width, whose number stays while their width doubles whenever a number is
    too large. So a percentile is right to within two bins of the 65,536 up to the largest number, however
    many numbers there are, and the 100th is the largest number itself. Where two neighbouring numbers are
    further apart, it is the lower one rather than what interpolation would put between them.

    Example:
        >>> percentiles = Percentiles()
        >>> percentiles.add(torch.arange(101.0))
        >>> round(percentiles(50.0), 2), percentiles(100.0)
        (50.0, 100.0)
    """

    def __init__(self) -> None:
        self.zeros = 0  # a ReLU has many, and they are no small numbers
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.width = 0.0
        self.largest = 0.0

    def add(self, values: Tensor) -> None:
        """Count some numbers; they may be on any device.

        Raises:
            ValueError: If one of them is negative, NaN or infinite.
        """
        values = values.detach().flatten()
        if values.numel() == 0:
            return
        low, high = (float(end) for end in values.aminmax())
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"expected finite numbers of at least 0, got {low} to {high}")
        positive = values[values > 0].double()
        self.zeros += values.numel() - positive.numel()
        if positive.numel() == 0:
            return
        self.largest = max(self.largest, high)
        if self.width == 0:
            self.width = high / BINS
        while self.width * BINS < high:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)])
            self.width *= 2
        bins = (positive / self.width).long().clamp(max=BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS).cpu()

    def __call__(self, percentile: float) -> float:
        """The number that so many percent are at most as large as; 0 if there are none.

        Raises:
            ValueError: If the percentile is not in (0, 100].
        """
        if not 0 < percentile <= 100:
            raise ValueError(f"expected a percentile above 0 and of at most 100, got {percentile}")
        positive = int(self.counts.sum())
        rank = percentile / 100 * (self.zeros + positive - 1) - self.zeros
        if percentile == 100 or positive == 0:
            return self.largest
        if rank < 0:
            return 0.0
        below = self.counts.cumsum(0)
        index = int(torch.searchsorted(below.double(), torch.tensor(rank, dtype=torch.float64), right=True))
        inside, before = int(self.counts[index]), int(below[index]) - int(self.counts[index])
        return min(self.width * (index + (rank - before) / inside), self.largest)


@dataclass(frozen=True)
class Scale:
    """What stands for a rate of one spike per step behind a layer.

    Attributes:
        value: An activation, positive.
        largest: The largest one seen.
        dead: No activation was above 0: the layer never fires.
        sparse: So many are 0 that the percentile is, too: the largest one stands in for it.
    """

    value: float
    largest: float
    dead: bool = False
    sparse: bool = False


class Calibration:
    """The activations of each layer of a chain, over some rows.

    Args:
        chain: What they run through.
        batches: Of normalised inputs, on the chain's device.
    Raises:
        UserError: If an activation is NaN or infinite.
    """

    @torch.no_grad()
    def __init__(self, chain: Chain, batches: Iterable[Tensor]) -> None:
        self.layers = [Percentiles() for _ in chain.layers[:-1]]
        self.rows = 0
        for batch in batches:
            self.rows += len(batch)
            for index, activation in enumerate(chain.activations(batch)[:-1]):
                try:
                    self.layers[index].add(activation)
                except ValueError as error:
                    path = chain.layers[index].path
                    raise UserError(f"cannot calibrate what comes out of `{path}`: {error}") from error

    def scales(self, percentile: float) -> list[Scale]:
        """What stands for a rate of one, layer by layer.

        Raises:
            ValueError: If the percentile is not in (0, 100].
        """
        found = []
        for layer in self.layers:
            value = layer(percentile)
            dead, sparse = layer.largest == 0, value == 0 < layer.largest
            found.append(Scale(1.0 if dead else value or layer.largest, layer.largest, dead, sparse))
        return found
