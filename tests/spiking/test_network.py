"""Neurons and networks of them: charge, rates, forms, orders of updates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luce.errors import UserError
from luce.models.binary import binary_parts
from luce.spiking import Calibration, Chain, SpikingNetwork, convert, integrate_and_fire, read


def fire(
    current: float, steps: int, start: float = 0.0, dtype: torch.dtype = torch.float32
) -> tuple[list[int], float]:
    """When a neuron of threshold 1 fires under a constant current, and what is left in it."""
    potential, one = torch.full((1,), start, dtype=dtype), torch.ones(1, dtype=dtype)
    times = []
    for time in range(1, steps + 1):
        potential, spikes = integrate_and_fire(potential, torch.full((1,), current, dtype=dtype), one)
        times += [time] * int(spikes)
    return times, potential.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_neuron_by_hand(dtype: torch.dtype) -> None:
    times, left = fire(0.3, 10, dtype=dtype)
    assert times == [4, 7, 10]
    assert left == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("start", "steps", "least"), [(0.0, 10, 7), (0.0, 100, 69), (0.5, 10, 7), (0.5, 100, 70)]
)
def test_sums_of_floats_lose_hardly_a_spike(start: float, steps: int, least: int) -> None:
    """0.7 added up in float32 ends just below whole numbers, in 100 steps by more than the tolerance."""
    assert least <= len(fire(0.7, steps, start)[0]) <= round(0.7 * steps)


def test_at_most_one_spike_a_step() -> None:
    assert len(fire(2.5, 10)[0]) == 10
    assert fire(-1.0, 5) == ([], -5.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 999), st.integers(1, 60))
def test_the_number_of_spikes_is_the_charge_rounded_down(current: int, start: int, steps: int) -> None:
    """For currents of at most a threshold, which stays above the membrane after each step."""
    potential, one, count = (
        torch.tensor(start / 1000, dtype=torch.float64),
        torch.ones((), dtype=torch.float64),
        0,
    )
    for _ in range(steps):
        potential, spikes = integrate_and_fire(potential, torch.tensor(current / 1000), one)
        assert -1e-6 <= potential < 1
        count += int(spikes)
    assert count == (start + steps * current) // 1000


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 50.0), st.floats(0.0, 0.99))
def test_no_charge_is_lost(seed: int, threshold: float, start: float) -> None:
    random = torch.Generator().manual_seed(seed)
    currents = threshold * torch.randn(30, 8, generator=random, dtype=torch.float64)
    theta = torch.tensor(threshold, dtype=torch.float64)
    potential = (start * theta).expand(8)
    count = torch.zeros(8, dtype=torch.float64)
    for time, current in enumerate(currents, 1):
        potential, spikes = integrate_and_fire(potential, current, theta)
        count += spikes
        expected = start * theta + currents[:time].sum(0) - theta * count
        torch.testing.assert_close(potential, expected, rtol=0, atol=1e-10 * max(1, threshold))


@pytest.mark.parametrize("mode", ["layerwise", "synchronous"])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_charge_in_every_layer(spiking: SpikingNetwork, images: Tensor, mode: str, start: float) -> None:
    counts: list[Tensor] = []
    received = [torch.zeros(())] * len(spiking.thresholds)
    before: list[Tensor] = []
    for moment in spiking.simulate(images, 9, start=start, mode=mode):
        if not counts:
            counts = [torch.zeros_like(spikes) for spikes in moment.spikes]
            before = [torch.zeros_like(spikes) for spikes in moment.spikes]
        sent = moment.spikes if mode == "layerwise" else before
        for index, threshold in enumerate(spiking.thresholds):
            counts[index] += moment.spikes[index]
            source = images if index == 0 else sent[index - 1]
            received[index] = received[index] + spiking.synapses[index](source)
            expected = start * threshold + received[index] - threshold * counts[index]
            torch.testing.assert_close(
                moment.potentials[index], expected, rtol=0, atol=1e-9 * float(threshold.max())
            )
            assert set(moment.spikes[index].unique().tolist()) <= {0, 1}
        before = moment.spikes


def test_thresholds_and_rescaled_weights_fire_the_same_spikes(chain: Chain, images: Tensor) -> None:
    scales = Calibration(chain, [images]).scales(98.0)
    forms = [convert(chain, scales, form=form).simulate(images, 25) for form in ("threshold", "rescaled")]
    fired = 0.0
    for ours, theirs in zip(*forms, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.spikes, theirs.spikes, strict=True))
        torch.testing.assert_close(ours.logits, theirs.logits)
        fired += sum(float(spikes.sum()) for spikes in ours.spikes)
    assert fired > 0


def test_rescaling_leaves_the_source_as_it_was(chain: Chain, images: Tensor) -> None:
    """Each hidden activation is divided by its scale, the logits are those of the network."""
    scales = Calibration(chain, [images]).scales(99.0)
    rescaled = convert(chain, scales, form="rescaled")
    expected, x = chain.activations(images), images
    for synapse, activation, scale in zip(rescaled.synapses, expected, [*scales, None], strict=True):
        x = synapse(x)
        if scale is not None:
            x = x.relu()
            torch.testing.assert_close(x, activation / scale.value)
    torch.testing.assert_close(x, expected[-1])


def test_nothing_is_multiplied_along_binary_weights(chain: Chain, spiking: SpikingNetwork) -> None:
    for index, layer in enumerate(chain.layers[:-1]):
        weights = next(m.weight for m in spiking.synapses[index] if hasattr(m, "weight"))
        assert not layer.binary or weights.unique().tolist() == [-1, 1]
        assert spiking.binary[index] == layer.binary


def test_thresholds_of_a_binary_layer_by_formula(images: Tensor) -> None:
    from luce import models

    model = models.build("binary:mlp", classes=3, input_shape=(2, 8, 8), hidden=[6, 5]).double().eval()
    chain = read(model)
    first, second = Calibration(chain, [images]).scales(100.0)
    spiking = convert(chain, [first, second])
    parts = binary_parts(model.stages[1][0])
    assert parts is not None
    torch.testing.assert_close(spiking.thresholds[0], torch.full((6,), first.value, dtype=torch.float64))
    torch.testing.assert_close(spiking.thresholds[1], second.value / (first.value * parts[1]))


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["layerwise", "synchronous"])
def test_the_error_falls_as_one_over_time(
    source: nn.Module, spiking: SpikingNetwork, images: Tensor, start: float, mode: str
) -> None:
    expected = source(images).detach()
    times = (16, 64, 256)
    logits = {
        m.time: m.logits
        for m in spiking.simulate(images, times[-1], start=start, mode=mode)
        if m.time in times
    }
    errors = [(logits[time] - expected).abs().max().item() for time in times]
    constants = [error * time for error, time in zip(errors, times, strict=True)]
    assert errors[-1] < 0.08 * expected.abs().max() + 0.2 * float(expected.std())
    # In 16 times as many steps an error that fell as the root of time would be 4 times as large here.
    assert constants[-1] < 2.5 * constants[0]


def test_half_a_threshold_rounds_and_none_rounds_down(images: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    chain, inputs = read(model), torch.randn(40, 4, dtype=torch.float64)
    scale = Calibration(chain, [inputs]).scales(100.0)
    spiking = convert(chain, scale)
    rates = chain.activations(inputs)[0] / scale[0].value
    for start, shift in ((0.0, 0.0), (0.5, 0.5)):
        counts = sum(moment.spikes[0] for moment in spiking.simulate(inputs, 7, start=start))
        assert torch.equal(counts, (7 * rates + shift + 1e-9).floor())


def test_a_lower_percentile_fires_no_less_at_once(chain: Chain, images: Tensor) -> None:
    calibration = Calibration(chain, [images])
    fired = [
        next(iter(convert(chain, calibration.scales(percentile)).simulate(images, 1))).spikes[0]
        for percentile in (100.0, 99.0, 90.0)
    ]
    assert (fired[1] >= fired[0]).all()
    assert (fired[2] >= fired[1]).all()
    assert fired[2].sum() > fired[0].sum()


def test_synchronous_layers_wait_for_each_other(spiking: SpikingNetwork, images: Tensor) -> None:
    depth = len(spiking.thresholds)
    quiet = convert_without_bias(depth)
    for moment in quiet.simulate(torch.ones(1, 1), depth + 2, start=0.0, mode="synchronous"):
        assert [int(spikes) for spikes in moment.spikes] == [
            int(moment.time > index) for index in range(depth)
        ]
        assert moment.logits.item() == pytest.approx(max(0, moment.time - depth) / moment.time)
    (first,) = quiet.simulate(torch.ones(1, 1), 1, start=0.0)
    assert [int(spikes) for spikes in first.spikes] == [1] * depth


def convert_without_bias(depth: int) -> SpikingNetwork:
    """Neurons in a row that pass on what they get."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(1, 1, bias=False), nn.ReLU()]
    layers.append(nn.Linear(1, 1, bias=False))
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    chain = read(model)
    return convert(chain, Calibration(chain, [torch.ones(1, 1)]).scales(100.0))


def test_a_row_alone_and_rows_together(spiking: SpikingNetwork, images: Tensor) -> None:
    together = spiking(images, 12)
    for index, image in enumerate(images[:3]):
        torch.testing.assert_close(spiking(image[None], 12)[:, 0], together[:, index])
    assert spiking(images[:0], 3).shape == (3, 0, 5)


def test_fan_outs_by_counting(images: Tensor) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.AvgPool2d(2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).double()
    chain = read(model)
    spiking = convert(chain, Calibration(chain, [images]).scales(100.0))
    (inputs, hidden), products = spiking.fan_outs(images[:1])
    # A pixel in the middle is in 9 windows of 3 filters, one in the corner in 4.
    assert (inputs[0, 0, 4, 4], inputs[0, 1, 0, 0], inputs[0, 0, 0, 3]) == (27, 12, 18)
    assert inputs.sum() == 3 * 2 * (9 * 36 + 6 * 24 + 4 * 4)
    assert (hidden == 5).all()  # its cell of the pooling goes to 5 classes
    assert hidden.shape == (1, 3, 4, 4)
    assert products.tolist() == [inputs.sum(), 12 * 5]


def test_memory_does_not_grow_with_time(chain: Chain, images: Tensor) -> None:
    moments = convert(chain, Calibration(chain, [images]).scales(100.0)).simulate(images, 10**9)
    assert [next(moments).time for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps": 0}, "expected `steps` to be at least 1"),
        ({"steps": 3, "start": 1.0}, "expected `start`, the initial potential"),
        ({"steps": 3, "mode": "layerwize"}, "did you mean `layerwise`"),
    ],
)
def test_what_is_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        convert_without_bias(1)(torch.ones(1, 1), **options)
    chain = read(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)))
    with pytest.raises(UserError, match="did you mean `threshold`"):
        convert(chain, [], form="treshold")  # type: ignore[arg-type]


def test_a_filter_of_zeros_stays_silent() -> None:
    from luce.models.binary import binarize_

    model = binarize_(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    )
    nn.init.zeros_(model[2].parametrizations.weight.original.data[1])
    chain, inputs = read(model.eval()), torch.randn(9, 3)
    spiking = convert(chain, Calibration(chain, [inputs]).scales(100.0))
    for moment in spiking.simulate(inputs, 30):
        assert not moment.spikes[1][:, 1].any()
    assert math.isfinite(moment.logits.sum())
