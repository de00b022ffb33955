"""Accuracy, spikes and energy of a spiking network after each time step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .network import Mode, SpikingNetwork

MULTIPLY_ADD, ADD = 4.6, 0.9
"""Picojoules of an operation on 32-bit floats in 45 nm CMOS, after M. Horowitz, Computing's energy problem
(and what we can do about it), ISSCC 2014: a multiplication takes 3.7, an addition 0.9. Memory is excluded."""

POINT = 0.01
ROUNDING = 1e-9
"""Slack in comparisons of accuracies: without it, rounding rejects a loss of exactly the allowed size."""


@dataclass(frozen=True)
class Record:
    """The figures of a spiking network on ``N`` rows after each of ``T`` time steps.

    Attributes:
        correct: Whether the most probable class is the label, ``(T, N)``.
        margin: Difference of the probabilities of the first and the second class, ``(T, N)``.
        spikes: Spikes up to this step in all layers, ``(T, N)``.
        additions: Additions along weights that these spikes cause, ``(T, N)``.
        layer_spikes: Spikes per row of each layer after the last step, ``(L,)``.
        neurons: Number of neurons of each layer, ``(L,)``.
        saturated: Share of each layer's neurons, over the rows, that fired at every step, ``(L,)``.
        products: Products per row of the source network in each layer and the output, ``(L + 1,)``. The
            spiking network shares those of the first layer, whose inputs are real numbers.
        binary: Whether each of these layers has binary weights.
        source_correct: Whether the source network is correct, ``(N,)``.
    """

    correct: Tensor
    margin: Tensor
    spikes: Tensor
    additions: Tensor
    layer_spikes: Tensor
    neurons: Tensor
    saturated: Tensor
    products: Tensor
    binary: tuple[bool, ...]
    source_correct: Tensor

    @property
    def steps(self) -> int:
        return len(self.correct)

    @property
    def rows(self) -> int:
        return self.correct.shape[1]

    @property
    def accuracy(self) -> list[float]:
        """Accuracy after each step."""
        accuracy: list[float] = self.correct.double().mean(1).tolist()
        return accuracy

    @property
    def source_accuracy(self) -> float:
        return float(self.source_correct.double().mean())

    @property
    def within_a_point(self) -> int | None:
        """The first step after which the accuracy is at most one point below the source's; None if never."""
        least = self.source_accuracy - POINT - ROUNDING
        return next((time for time, accuracy in enumerate(self.accuracy, 1) if accuracy >= least), None)

    @property
    def source_energy(self) -> dict[str, float]:
        """Nanojoules per row: ``multiplied``, and ``added`` if a product with ±1 counts as an addition."""
        binary = torch.tensor(self.binary)
        each = torch.where(binary, ADD, MULTIPLY_ADD).double()
        return {
            "multiplied": float(self.products.sum()) * MULTIPLY_ADD / 1e3,
            "added": float(self.products.double() @ each) / 1e3,
        }

    def energy(self, additions: float, time: float) -> dict[str, float]:
        """Return nanojoules per row of the spiking network, of its arithmetic alone.

        ``held`` computes the input current once and keeps it, ``recomputed`` computes it at every step.
        Adding a current to its membrane is not counted.

        Args:
            additions: Additions per row.
            time: Time steps.
        """
        first, added = float(self.products[0]) * MULTIPLY_ADD, additions * ADD
        return {"held": (first + added) / 1e3, "recomputed": (first * time + added) / 1e3}


@torch.no_grad()
def record(
    network: SpikingNetwork,
    source: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    *,
    start: float = 0.5,
    mode: Mode = "layerwise",
    advance: Callable[[], None] = lambda: None,
) -> Record:
    """Simulate a spiking network on labelled rows, in memory that grows with steps times rows, not neurons.

    Args:
        network: The spiking network.
        source: The source network, from the same inputs to logits.
        batches: Normalised inputs and labels, on the device of both networks.
        steps: Number of time steps.
        start: See `SpikingNetwork.simulate`.
        mode: See `SpikingNetwork.simulate`.
        advance: Called after every time step of every batch.
    Raises:
        ValueError: If there are no rows.
    """
    columns: dict[str, list[Tensor]] = {name: [] for name in ("correct", "margin", "spikes", "additions")}
    source_correct = []
    layers: list[Tensor] = []
    saturated: list[Tensor] = []
    neurons, fan_outs, products, rows = torch.zeros(0), None, torch.zeros(0), 0
    for inputs, target in batches:
        if fan_outs is None:
            fan_outs, products = network.fan_outs(inputs[:1])
        source_correct.append((source(inputs).argmax(-1) == target).cpu())
        rows += len(target)
        batch: dict[str, list[Tensor]] = {name: [] for name in columns}
        spikes = additions = torch.zeros(len(target), device=inputs.device, dtype=inputs.dtype)
        counts: list[Tensor] = []
        for moment in network.simulate(inputs, steps, start=start, mode=mode):
            if not counts:
                counts = [torch.zeros_like(fired) for fired in moment.spikes]
            for count, fired, fan_out in zip(counts, moment.spikes, fan_outs[1:], strict=True):
                count += fired
                spikes = spikes + fired.flatten(1).sum(1)
                additions = additions + (fired * fan_out).flatten(1).sum(1)
            first, second = moment.logits.softmax(-1).topk(2).values.T
            batch["margin"].append(first - second)
            batch["correct"].append(moment.logits.argmax(-1) == target)
            batch["spikes"].append(spikes)
            batch["additions"].append(additions)
            advance()
        for name, column in batch.items():
            columns[name].append(torch.stack(column).cpu())
        # float64: float32 sums lose single spikes beyond 2^24.
        layers.append(torch.stack([count.sum(dtype=torch.float64) for count in counts]).cpu())
        saturated.append(torch.stack([(count == steps).sum() for count in counts]).cpu())
        neurons = torch.tensor([count[0].numel() for count in counts])
    if fan_outs is None:
        raise ValueError("expected rows to simulate, got none")
    return Record(
        **{name: torch.cat(column, 1) for name, column in columns.items()},
        layer_spikes=torch.stack(layers).sum(0) / rows,
        neurons=neurons,
        saturated=torch.stack(saturated).sum(0) / (rows * neurons),
        products=products.cpu(),
        binary=network.binary,
        source_correct=torch.cat(source_correct),
    )


@dataclass(frozen=True)
class Exit:
    """Early exit: each row stops at the first step at which its margin reaches a threshold.

    Attributes:
        threshold: Threshold of the margin; above 1 no row exits early.
        first: First step at which a row may exit.
        accuracy: Accuracy at the exits.
        time: Mean time step of the exits.
        spikes: Mean number of spikes up to the exit.
        additions: Mean number of additions up to the exit.
    """

    threshold: float
    first: int
    accuracy: float
    time: float
    spikes: float
    additions: float


NEVER = 2.0
"""A threshold that no margin reaches."""
THRESHOLDS = (*(index / 50 for index in range(50)), 0.99, 0.995, 0.999, 0.9999, NEVER)


def early_exit(figures: Record, threshold: float, *, first: int = 1) -> Exit:
    """Return the figures of early exit at a threshold.

    Args:
        figures: Record of the rows.
        threshold: Threshold of the margin between the two most probable classes.
        first: First step at which a row may exit.
    """
    exits = figures.margin >= threshold
    exits[: first - 1] = False
    exits[-1] = True
    at = exits.int().argmax(0, keepdim=True)  # of equal values argmax returns the first
    return Exit(
        threshold,
        first,
        accuracy=figures.correct.gather(0, at).double().mean().item(),
        time=at.double().mean().item() + 1,
        spikes=figures.spikes.gather(0, at).double().mean().item(),
        additions=figures.additions.gather(0, at).double().mean().item(),
    )


def choose_exit(figures: Record, *, loss: float = 0.005) -> Exit:
    """Return the earliest exit whose accuracy is at most ``loss`` below that of the last step.

    The search covers thresholds and first steps: margins after the first few steps rest on a few spikes and
    are unreliable. A threshold of 0 stops all rows at the same step.

    Args:
        figures: Record of held-out rows, used for neither training nor testing.
        loss: Share of rows that may be lost compared with the last step.
    """
    firsts = [2**power for power in range(figures.steps.bit_length()) if 2**power <= figures.steps]
    exits = (early_exit(figures, threshold, first=first) for first in firsts for threshold in THRESHOLDS)
    accurate = [each for each in exits if each.accuracy >= figures.accuracy[-1] - loss - ROUNDING]
    return min(accurate, key=lambda each: each.time)
