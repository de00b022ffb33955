"""Percentiles of numbers that come in batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from luce.errors import UserError
from luce.spiking import Calibration, Percentiles, convert, read


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 400),
    st.floats(0.1, 100.0),
    st.floats(1e-3, 1e3),
    st.integers(1, 7),
)
def test_as_numpy_has_them(seed: int, count: int, percentile: float, size: float, batches: int) -> None:
    """To within two bins, where numbers are that near to each other."""
    random = torch.Generator().manual_seed(seed)
    numbers = (size * torch.randn(count, generator=random, dtype=torch.float64)).relu()
    percentiles = Percentiles()
    for batch in numbers.chunk(batches):
        percentiles.add(batch)
    rank = percentile / 100 * (count - 1)
    ordered = numbers.sort().values
    low, high = ordered[int(rank)], ordered[min(int(rank) + 1, count - 1)]
    slack = 2 * float(numbers.max()) / 2**16 * 2
    assert low - slack <= percentiles(percentile) <= high + slack
    assert percentiles(100.0) == numbers.max()


def test_the_order_and_the_batches_hardly_matter() -> None:
    numbers = torch.rand(10_000).square()
    found = []
    for order in (numbers, numbers.sort().values, numbers.sort(descending=True).values):
        percentiles = Percentiles()
        for batch in order.split(17):
            percentiles.add(batch)
        found.append(percentiles(99.0))
    expected = numbers.quantile(0.99).item()
    assert found == [pytest.approx(expected, abs=2e-4)] * 3


def test_more_numbers_than_float32_can_count() -> None:
    """2**24 + 2**22 of them, in one batch, most in one bin."""
    numbers = torch.ones(2**24 + 2**22)
    numbers[: 2**20] = torch.linspace(1, 100, 2**20)
    percentiles = Percentiles()
    percentiles.add(numbers)
    assert int(percentiles.counts.sum()) == len(numbers)
    # Of all numbers 5% are spread evenly from 1 to 100, so that 1% of all lie above 1 + 0.8 * 99.
    assert percentiles(99.0) == pytest.approx(1 + 0.8 * 99, rel=1e-3)
    assert percentiles(50.0) == pytest.approx(1, rel=2e-3)


def test_a_percentile_just_below_the_largest_of_many_numbers() -> None:
    """Its rank, 0.03 less than that of the largest number, is none that float32 has."""
    percentiles = Percentiles()
    percentiles.add(torch.tensor([1.0]))
    percentiles.counts *= 2**25 + 2
    assert percentiles(99.9999999) == pytest.approx(1.0, rel=1e-6)


def test_a_network_that_has_lost_its_mind() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.constant_(network[0].bias, float("nan"))
    with pytest.raises(UserError, match="cannot calibrate the output of `0`: expected finite numbers"):
        Calibration(read(network), [torch.ones(4, 2)])


@pytest.mark.parametrize("bad", [[-1.0], [float("nan")], [1.0, float("inf")]])
def test_what_is_no_activation(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="expected finite numbers of at least 0"):
        Percentiles().add(torch.tensor(bad))


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1])
def test_what_is_no_percentile(percentile: float) -> None:
    with pytest.raises(ValueError, match="expected a percentile in"):
        Percentiles()(percentile)


def test_nothing_and_zeros() -> None:
    percentiles = Percentiles()
    percentiles.add(torch.zeros(0))
    assert percentiles(50.0) == percentiles(100.0) == 0
    percentiles.add(torch.zeros(9))
    percentiles.add(torch.tensor([5.0]))
    assert percentiles(50.0) == 0
    assert percentiles(100.0) == 5


def test_a_dead_layer_and_a_sparse_one_have_scales() -> None:
    dead = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    nn.init.constant_(dead[0].weight, -1.0)
    nn.init.constant_(dead[0].bias, 0.5)
    nn.init.zeros_(dead[2].bias)
    nn.init.constant_(dead[2].weight, -1.0)
    inputs = torch.ones(1000, 2)
    inputs[0] = 0.0  # only this row lets the first layer speak
    chain = read(dead.eval())
    first, second = Calibration(chain, [inputs[:500], inputs[500:]]).scales(99.0)
    assert (first.value, first.sparse, first.dead) == (0.5, True, False)
    assert (second.value, second.sparse, second.dead) == (1.0, False, True)
    logits = convert(chain, [first, second])(inputs, 20)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[-1], dead(inputs), rtol=0, atol=0.1)
