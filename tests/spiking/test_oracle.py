"""Spike by spike against libraries of spiking networks, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luce.spiking import Calibration, Chain, Scale, convert

STEPS = 30
Step = Callable[[Tensor], Tensor]
"""From a current to spikes, with a membrane that it keeps."""


def of_snntorch(threshold: Tensor, start: Tensor) -> Step:
    library = pytest.importorskip("snntorch", reason="needs snntorch, which is in the extra test")
    neuron = library.Leaky(beta=1.0, threshold=threshold, reset_mechanism="subtract")
    membrane = [start]

    def step(current: Tensor) -> Tensor:
        spikes, membrane[0] = neuron(current, membrane[0])
        return spikes.to(current.dtype)

    return step


def of_spikingjelly(threshold: Tensor, start: Tensor) -> Step:
    reason = "needs spikingjelly, which is in no extra: pip install spikingjelly"
    library = pytest.importorskip("spikingjelly.activation_based.neuron", reason=reason)
    # Its threshold is one number; a current in units of the threshold of its filter does the same.
    neuron: Any = library.IFNode(v_threshold=1.0, v_reset=None)
    neuron.v = start / threshold
    return lambda current: neuron(current / threshold)


@pytest.fixture(autouse=True)
def _no_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries have none."""
    monkeypatch.setattr("luce.spiking.network.TOLERANCE", 0.0)


def scales_of(chain: Chain, images: Tensor, percentile: float) -> list[Scale]:
    """Such that no membrane meets its threshold exactly, where one library fires and the other does not."""
    scales = Calibration(chain, [images]).scales(percentile)
    return [replace(scale, value=1.0123 * scale.value) for scale in scales]


LIBRARIES = {"snntorch": of_snntorch, "spikingjelly": of_spikingjelly}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("start", "percentile"), [(0.0, 100.0), (0.5, 95.0)])
@torch.no_grad()
def test_every_spike_is_theirs(
    library: str, chain: Chain, images: Tensor, start: float, percentile: float
) -> None:
    spiking = convert(chain, scales_of(chain, images, percentile))
    first = spiking.synapses[0](images)
    moments = list(spiking.simulate(images, STEPS, start=start))
    neurons: list[Step] = []
    for index, threshold in enumerate(spiking.thresholds):
        shape = torch.zeros_like(moments[0].potentials[index])
        neurons.append(LIBRARIES[library](threshold, (start * threshold) + shape))
    total = 0.0
    gathered: Tensor | float = 0.0
    for moment in moments:
        current = first
        for index, neuron in enumerate(neurons):
            spikes = neuron(current)
            assert torch.equal(spikes, moment.spikes[index]), (moment.time, spiking.paths[index])
            total += float(spikes.sum())
            current = spiking.synapses[index + 1](spikes)
        gathered = gathered + current
        torch.testing.assert_close(moment.logits, gathered / moment.time)
    assert total > 100


@torch.no_grad()
def test_a_network_of_theirs_from_end_to_end(source: nn.Module, chain: Chain, images: Tensor) -> None:
    """With rescaled weights and thresholds of 1, as the literature has them, against our other form."""
    library = pytest.importorskip("snntorch", reason="needs snntorch, which is in the extra test")
    scales = scales_of(chain, images, 100.0)
    rescaled = convert(chain, scales, form="rescaled")
    ours = convert(chain, scales).simulate(images, 80, start=0.0)
    neurons = [library.Leaky(beta=1.0, threshold=1.0) for _ in scales]
    membranes = [neuron.init_leaky() for neuron in neurons]
    gathered = torch.zeros(())
    for moment in ours:
        x = images
        for index, neuron in enumerate(neurons):
            spikes, membranes[index] = neuron(rescaled.synapses[index](x), membranes[index])
            x = spikes.double()
        gathered = gathered + rescaled.synapses[-1](x)
        torch.testing.assert_close(moment.logits, gathered / moment.time)
    expected = source(images)
    assert (gathered / 80 - expected).abs().max() < 0.25 * expected.abs().max()
