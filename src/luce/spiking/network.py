"""Integrate-and-fire neurons, and the spiking network that a chain converts to."""

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
"""Share of the threshold by which a membrane may fall short and still fire: ten times 0.1 sums to below 1."""

Mode: TypeAlias = Literal["layerwise", "synchronous"]
Form: TypeAlias = Literal["threshold", "rescaled"]


def integrate_and_fire(potential: Tensor, current: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    r"""Advance integrate-and-fire neurons by one step: no leak, reset by subtraction.

    .. math::
        V' = V + I, \qquad s = [V' \ge \theta], \qquad V'' = V' - \theta s,

    where a membrane also fires up to a millionth below :math:`\theta`, to absorb rounding of sums.

    Args:
        potential: Membrane potentials, any shape.
        current: Input currents, same shape.
        threshold: Positive thresholds, broadcast to that shape.
    Returns:
        The potentials after the step, and the spikes: 1 where a neuron fires, else 0.
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
    """The state of a spiking network after a time step.

    Attributes:
        time: Number of the step, from 1.
        logits: Mean current per step into the output, an estimate of the source network's logits, ``(N, C)``.
        spikes: Spikes of each layer in this step, 0 and 1, ``(N, ...)``.
        potentials: Membrane potentials of each layer after this step.
    """

    time: int
    logits: Tensor
    spikes: list[Tensor]
    potentials: list[Tensor]


class SpikingNetwork(nn.Module):
    r"""A chain whose activations are rates of spikes; made by `convert`.

    The input is a current that is the same at every step, so the first layer is computed once. The output
    accumulates its current and never fires.

    With a scale :math:`\lambda_l` of each layer's activations, weights :math:`\alpha_o D` and a bias
    :math:`b_o`, a neuron of filter :math:`o` receives :math:`D s + b_o / (\lambda_{l-1} \alpha_o)` and fires
    at :math:`\lambda_l / (\lambda_{l-1} \alpha_o)`. Spikes along binary weights therefore cause additions and
    subtractions only. The rescaled form with threshold 1 and weights
    :math:`\alpha_o D \lambda_{l-1} / \lambda_l` fires the same spikes.

    Args:
        synapses: Modules from spikes to currents, one per layer and one for the output.
        thresholds: Thresholds of each layer, broadcast to its current.
        paths: Paths of the layers with weights, the output last.
        binary: Whether each of them has weights of -1 and 1 up to its scale.
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
        """Simulate step by step, with one step in memory at a time.

        Args:
            inputs: Normalised inputs, ``(N, ...)``.
            steps: Number of time steps, at least 1.
            start: Initial potential as a share of the threshold, in [0, 1): 0 rounds rates down, 0.5 to the
                nearest.
            mode: ``layerwise`` passes a spike through all layers within a step, ``synchronous`` through one
                layer per step.
        Raises:
            UserError: If ``steps``, ``start`` or ``mode`` is invalid.
        """
        if steps < 1:
            raise UserError(f"expected `steps` to be at least 1, got {steps}")
        if not 0 <= start < 1:
            raise UserError(
                f"expected `start`, the initial potential as a share of the threshold, in [0, 1), got {start}"
            )
        if mode not in get_args(Mode):
            raise unknown_name("`mode`", mode, get_args(Mode))
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
        accumulated = torch.zeros_like(current)
        for time in range(1, steps + 1):
            # The update runs from input to output. Layerwise mode reads the spikes of this step, so a spike
            # reaches the output at once; synchronous mode must read those of the step before, all at one
            # time.
            before = list(spikes)
            for index, threshold in enumerate(thresholds):
                sent = spikes if mode == "layerwise" else before
                current = constant if index == 0 else self.synapses[index](sent[index - 1])
                potentials[index], spikes[index] = integrate_and_fire(potentials[index], current, threshold)
            accumulated = accumulated + self.synapses[last]((spikes if mode == "layerwise" else before)[-1])
            yield Moment(time, accumulated / time, list(spikes), list(potentials))

    def forward(self, inputs: Tensor, steps: int, **options: Any) -> Tensor:
        """Return the logits after every time step, ``(T, N, C)``."""
        return torch.stack([moment.logits for moment in self.simulate(inputs, steps, **options)])

    @torch.no_grad()
    def fan_outs(self, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """Count, for each layer and the output, the weights that a spike of each of its inputs reaches.

        The first entry counts those of the network's inputs. Padding does not count. Where pooling windows
        overlap, the count is the mean over the windows that contain the neuron.

        Args:
            inputs: One row, used for its shape.
        Returns:
            Counts of the shape of each layer's input, ``(1, ...)``, and the number of products of each layer
            on real numbers, ``(L + 1,)``; pooling makes it smaller than the sum of the counts.
        """
        fan_outs, products = [], []
        source = inputs
        for synapse in self.synapses:
            fan_out, count = _fan_out(synapse, source)
            fan_outs.append(fan_out)
            products.append(count)
            source = synapse(source)
        return fan_outs, torch.stack(products)


def _fan_out(synapse: Any, source: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fan-out of each element of ``source`` through poolings to a layer, and the layer's products.

    With all weights 1, the gradient of the summed output counts the weights that each input reaches.
    """
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
        through, share = (
            torch.autograd.grad(pooled, leaf, along, retain_graph=True)[0]
            for along in (fan_out, torch.ones_like(fan_out))
        )
    return torch.where(share > 0, through / share, 0.0), products


LEAST = 1e-12
"""Lower bound of a filter's scale: a filter whose weights are all 0 would have an infinite threshold."""


def convert(chain: Chain, scales: Sequence[Scale], *, form: Form = "threshold") -> SpikingNetwork:
    """Convert a chain to a spiking network.

    Args:
        chain: The chain; unchanged.
        scales: Scales of its activations, from `Calibration.scales`.
        form: ``threshold`` keeps binary weights at -1 and 1; ``rescaled`` has thresholds of 1. Both fire the
            same spikes up to rounding.
    Raises:
        UserError: If ``form`` is unknown.
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
        thresholds.append(threshold.view(-1, *_ones_after_channels(layer)))
        before = scale.value
    output = chain.layers[-1]
    synapses.append(output.scaled(before * output.scale, 1.0))
    paths, binary = zip(*((layer.path, layer.binary) for layer in chain.layers), strict=True)
    return SpikingNetwork(synapses, thresholds, paths, binary).eval()


def _ones_after_channels(layer: Layer) -> list[int]:
    """Return a 1 for each dimension after the channels."""
    weight: Any = layer.weighted.weight
    return [1] * (weight.ndim - 2)
