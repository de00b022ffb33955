"""Percentiles of a network's activations over any number of rows, in fixed memory."""

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
    """Percentiles of non-negative numbers that arrive in batches.

    Numbers are counted in 65,536 bins of equal width, which doubles whenever a number exceeds the last bin. A
    percentile is therefore accurate to two bins, that is to 2/65,536 of the largest number; the 100th is the
    largest number itself. Between two neighbouring numbers further apart than a bin, the result is the lower
    one rather than an interpolation.

    Example:
        >>> percentiles = Percentiles()
        >>> percentiles.add(torch.arange(101.0))
        >>> round(percentiles(50.0), 2), percentiles(100.0)
        (50.0, 100.0)
    """

    def __init__(self) -> None:
        # Zeros are counted apart: a ReLU gives many, and in the first bin they would pass for small numbers.
        self.zeros = 0
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.width = 0.0
        self.largest = 0.0

    def add(self, values: Tensor) -> None:
        """Count a batch of numbers on any device.

        Raises:
            ValueError: If a number is negative, NaN or infinite.
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
        # Each new bin is the union of two old ones, so that no count has to be split.
        while self.width * BINS < high:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)])
            self.width *= 2
        # The largest number falls on the upper edge of the last bin, or past it by a rounding.
        bins = (positive / self.width).long().clamp(max=BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS).cpu()

    def __call__(self, percentile: float) -> float:
        """Return the given percentile; 0 if no numbers were added.

        Raises:
            ValueError: If the percentile is not in (0, 100].
        """
        if not 0 < percentile <= 100:
            raise ValueError(f"expected a percentile in (0, 100], got {percentile}")
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
    """The activation of a layer that corresponds to a rate of one spike per step.

    Attributes:
        value: The activation, positive.
        largest: The largest activation of the calibration rows.
        dead: Whether no activation was above 0; the layer never fires.
        sparse: Whether the percentile was 0 because most activations are; ``value`` is the largest one then.
    """

    value: float
    largest: float
    dead: bool = False
    sparse: bool = False


class Calibration:
    """Percentiles of the activations of each layer of a chain.

    Args:
        chain: The chain that computes the activations.
        batches: Normalised inputs, on the chain's device.
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
                    raise UserError(f"cannot calibrate the output of `{path}`: {error}") from error

    def scales(self, percentile: float) -> list[Scale]:
        """Return the scale of each layer at a percentile.

        Raises:
            ValueError: If the percentile is not in (0, 100].
        """
        scales = []
        for layer in self.layers:
            value = layer(percentile)
            dead, sparse = layer.largest == 0, value == 0 < layer.largest
            scales.append(Scale(1.0 if dead else value or layer.largest, layer.largest, dead, sparse))
        return scales
