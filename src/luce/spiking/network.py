"""Integrate-and-fire neurons, and the network of them that a chain becomes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..errors import UserError, unknown_name
from .calibration import Scale
from .chain import Chain, Layer

TOLERANCE = 1e-6
"""By which share of the threshold a membrane may fall short and still fire, since sums of floats do."""

Mode: TypeAlias = Literal["layerwise", "synchronous"]
Form: TypeAlias = Literal["threshold", "rescaled"]


def integrate_and_fire(potential: Tensor, current: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    r"""One step of integrate-and-fire neurons: no leak, reset by subtraction.

    .. math::
        V' = V + I, \qquad s = [V' \ge \theta], \qquad V'' = V' - \theta s,

    where :math:`\theta` is missed by at most a millionth of itself, which is what sums of floats lose.

    Args:
        potential: Of the membranes, any shape.
        current: Of the same shape.
        threshold: Positive, broadcast to that shape.
    Returns:
        The potential after the step, and the spikes: 1 where one was fired, else 0.
    Example:
        >>> potential, one = torch.zeros(1), torch.ones(1)
        >>> for step in range(1, 11):
        ...     potential, spikes = integrate_and_fire(potential, torch.tensor([0.3]), one)
        ...     if spikes:
        ...         print(step)
        4
        7
        10
    """
    potential = potential + current
    spikes = (potential >= threshold * (1 - TOLERANCE)).to(potential.dtype)
    return potential - threshold * spikes, spikes


@dataclass(frozen=True)
class Moment:
    """A spiking network after a time step.

    Attributes:
        time: Steps so far, from 1.
        logits: The current that the output has gathered, per step: an estimate of the source network's
            logits, ``(N, C)``.
        spikes: Of each layer in this step, 0 and 1, ``(N, ...)``.
        potentials: Of each layer's membranes after this step.
    """

    time: int
    logits: Tensor
    spikes: list[Tensor]
    potentials: list[Tensor]


class SpikingNetwork(nn.Module):
    r"""A chain whose activations are rates of spikes; made by `convert`.

    The input is a current that stays the same at every step, so that the first layer computes it once. The
    output gathers what its layer is sent, and never fires.

    With a scale :math:`\lambda_l` of each layer's activations, weights :math:`\alpha_o D` and a bias
    :math:`b_o`, a neuron of filter :math:`o` receives :math:`D s + b_o / (\lambda_{l-1} \alpha_o)` and fires
    at :math:`\lambda_l / (\lambda_{l-1} \alpha_o)`. So what is sent along binary weights is added or
    subtracted, and nothing is multiplied. The rescaled form with threshold 1 and weights
    :math:`\alpha_o D \lambda_{l-1} / \lambda_l` fires the same spikes.

    Args:
        synapses: From spikes to currents, for each layer and for the output.
        thresholds: Of each layer, broadcast to its current.
        paths: The names of the layers with weights, the output's the last.
        binary: Which of them have weights of -1 and 1 but for their scale.
    """

    def __init__(
        self,
        synapses: Sequence[nn.Module],
        thresholds: Sequence[Tensor],
        paths: Sequence[str],
        binary: Sequence[bool],
    ) -> None:
        super().__init__()
        self.synapses = nn.ModuleList(synapses)
        self.paths, self.binary = tuple(paths), tuple(binary)
        for index, threshold in enumerate(thresholds):
            self.register_buffer(f"threshold_{index}", threshold)

    @property
    def thresholds(self) -> list[Tensor]:
        return [getattr(self, f"threshold_{index}") for index in range(len(self.synapses) - 1)]

    def simulate(
        self, inputs: Tensor, steps: int, *, start: float = 0.5, mode: Mode = "layerwise"
    ) -> Iterator[Moment]:
        """Step by step, holding one step in memory at a time.

        Args:
            inputs: Normalised, ``(N, ...)``.
            steps: How many.
            start: Of the membranes, in thresholds: 0 rounds each rate down, 0.5 to the nearest.
            mode: ``layerwise`` lets a spike pass through all layers in the step in which it is fired,
                ``synchronous`` through one layer per step.
        Raises:
            UserError: If there is no step, or no such start or mode.
        """
        if steps < 1:
            raise UserError(f"expected at least 1 time step, got {steps}")
        if not 0 <= start < 1:
            raise UserError(
                f"expected membranes to start at 0 of their threshold or more, below 1, got {start}"
            )
        if mode not in get_args(Mode):
            raise unknown_name("order of updates", mode, get_args(Mode))
        return self._simulate(inputs, steps, start, mode)

    @torch.no_grad()
    def _simulate(self, inputs: Tensor, steps: int, start: float, mode: Mode) -> Iterator[Moment]:
        thresholds, last = self.thresholds, len(self.synapses) - 1
        constant = self.synapses[0](inputs)
        current, spikes, potentials = constant, [], []
        for synapse, threshold in zip(self.synapses[1:], thresholds, strict=True):
            potentials.append((start * threshold).expand_as(current))
            spikes.append(torch.zeros_like(current))
            current = synapse(spikes[-1])
        gathered = torch.zeros_like(current)
        for time in range(1, steps + 1):
            before = list(spikes)
            for index, threshold in enumerate(thresholds):
                sent = spikes if mode == "layerwise" else before
                current = constant if index == 0 else self.synapses[index](sent[index - 1])
                potentials[index], spikes[index] = integrate_and_fire(potentials[index], current, threshold)
            gathered = gathered + self.synapses[last]((spikes if mode == "layerwise" else before)[-1])
            yield Moment(time, gathered / time, list(spikes), list(potentials))

    def forward(self, inputs: Tensor, steps: int, **options: Any) -> Tensor:
        """Logits at every time step, ``(T, N, C)``."""
        return torch.stack([moment.logits for moment in self.simulate(inputs, steps, **options)])

    @torch.no_grad()
    def fan_outs(self, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """For each layer and the output, how many weights a spike of each neuron before it is sent along.

        The first entry is of the inputs themselves. Padding counts as nothing. Where windows of a pooling
        overlap, the mean over those that a neuron lies in.

        Args:
            inputs: One row, for its shape.
        Returns:
            Tensors of the shape of each layer's input, ``(1, ...)``, and the products that each layer takes
            of real numbers, ``(L + 1,)``: fewer than fan-outs where a pooling before it makes one of several.
        """
        found, products = [], []
        source = inputs
        for synapse in self.synapses:
            fan_out, count = _fan_out(synapse, source)
            found.append(fan_out)
            products.append(count)
            source = synapse(source)
        return found, torch.stack(products)


def _fan_out(synapse: Any, source: Tensor) -> tuple[Tensor, Tensor]:
    """Of each element of ``source`` through poolings to one layer with weights, and that layer's products."""
    position = next(i for i, module in enumerate(synapse) if getattr(module, "weight", None) is not None)
    before, counting = synapse[:position], copy.deepcopy(synapse[position])
    counting.weight.data.fill_(1.0)
    counting.bias = None
    with torch.enable_grad():
        leaf = torch.zeros_like(source).requires_grad_()
        pooled = before(leaf)
        (fan_out,) = torch.autograd.grad(counting(pooled).sum(), pooled, retain_graph=True)
        products = fan_out.sum()
        if len(before) == 0:
            return fan_out, products
        found, share = (
            torch.autograd.grad(pooled, leaf, along, retain_graph=True)[0]
            for along in (fan_out, torch.ones_like(fan_out))
        )
    return torch.where(share > 0, found / share, 0.0), products


LEAST = 1e-12
"""Scale of a filter whose weights are all 0: the little that keeps its threshold finite."""


def convert(chain: Chain, scales: Sequence[Scale], *, form: Form = "threshold") -> SpikingNetwork:
    """The spiking network of a chain.

    Args:
        chain: Unchanged.
        scales: Of its activations, from `Calibration.scales`.
        form: ``threshold`` keeps binary weights at -1 and 1; ``rescaled`` has thresholds of 1. Both fire the
            same spikes, but for rounding.
    Raises:
        UserError: If there is no such form.
    """
    if form not in get_args(Form):
        raise unknown_name("form of a spiking network", form, get_args(Form))
    synapses, thresholds = [], []
    before = 1.0
    for layer, scale in zip(chain.layers[:-1], scales, strict=True):
        filters = layer.scale.clamp(min=LEAST)
        if form == "threshold":
            synapses.append(layer.scaled(1.0, 1 / (before * filters)))
            threshold = scale.value / (before * filters)
        else:
            synapses.append(layer.scaled(before / scale.value * filters, 1 / scale.value))
            threshold = torch.ones_like(filters)
        thresholds.append(threshold.view(-1, *_beside_channels(layer)))
        before = scale.value
    output = chain.layers[-1]
    synapses.append(output.scaled(before * output.scale, 1.0))
    paths, binary = zip(*((layer.path, layer.binary) for layer in chain.layers), strict=True)
    return SpikingNetwork(synapses, thresholds, paths, binary).eval()


def _beside_channels(layer: Layer) -> list[int]:
    """Ones for the dimensions behind the channels."""
    weight: Any = layer.weighted.weight
    return [1] * (weight.ndim - 2)
