"""What a spiking network gets right after each time step, and what it spends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .network import Mode, SpikingNetwork

MULTIPLY_ADD, ADD = 4.6, 0.9
"""Picojoules of an operation on 32-bit floats in 45 nm CMOS, after M. Horowitz, Computing's energy problem
(and what we can do about it), ISSCC 2014: a multiplication takes 3.7, an addition 0.9. Without memory."""

POINT = 0.01


@dataclass(frozen=True)
class Record:
    """A spiking network on some rows, at every one of ``T`` time steps.

    Attributes:
        correct: Whether the first choice is right, ``(T, N)``.
        margin: By how much the first choice is more probable than the second, ``(T, N)``.
        spikes: Fired so far in all layers, ``(T, N)``.
        additions: Along weights because of them, so far, ``(T, N)``.
        layer_spikes: Of each layer, per row, after the last step, ``(L,)``.
        neurons: Of each layer, ``(L,)``.
        saturated: Share of each layer's neurons, over the rows, that fired at every step, ``(L,)``.
        products: Of the source network, per row, in each layer and the output, ``(L + 1,)``. Those of the
            first, which sees real numbers, are the spiking network's too.
        binary: Which of these have binary weights.
        source_correct: Of the source network, ``(N,)``.
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
        """After each step."""
        found: list[float] = self.correct.double().mean(1).tolist()
        return found

    @property
    def source_accuracy(self) -> float:
        return float(self.source_correct.double().mean())

    @property
    def within_a_point(self) -> int | None:
        """The first step after which the accuracy is at most one point below the source's; None if never."""
        least = self.source_accuracy - POINT - 1e-9
        return next((time for time, accuracy in enumerate(self.accuracy, 1) if accuracy >= least), None)

    @property
    def source_energy(self) -> dict[str, float]:
        """Nanojoules per row: ``multiplied``, and where a product with -1 or 1 is an ``added`` number."""
        binary = torch.tensor(self.binary)
        each = torch.where(binary, ADD, MULTIPLY_ADD).double()
        return {
            "multiplied": float(self.products.sum()) * MULTIPLY_ADD / 1e3,
            "added": float(self.products.double() @ each) / 1e3,
        }

    def energy(self, additions: float, time: float) -> dict[str, float]:
        """Nanojoules per row of the spiking network, of operations alone.

        ``held`` is that of a network whose input current is computed once and kept, ``recomputed`` of one
        that computes it at every step. Adding a current to its membrane is not counted.

        Args:
            additions: Per row.
            time: Steps.
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
    """Simulate a spiking network on labelled rows. Memory grows with steps times rows, not with neurons.

    Args:
        network: The spiking one.
        source: What it was made from, from the same inputs to logits.
        batches: Of normalised inputs and labels, on the device of both.
        steps: Time steps.
        start: See `SpikingNetwork.simulate`.
        mode: Likewise.
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
        seen: dict[str, list[Tensor]] = {name: [] for name in columns}
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
            seen["margin"].append(first - second)
            seen["correct"].append(moment.logits.argmax(-1) == target)
            seen["spikes"].append(spikes)
            seen["additions"].append(additions)
            advance()
        for name, column in seen.items():
            columns[name].append(torch.stack(column).cpu())
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
    """What leaving early gives: each row stops at the first step at which its margin reaches a threshold.

    Attributes:
        threshold: Of the margin; above 1 nothing leaves early.
        first: No row stops before this step.
        accuracy: At the steps at which rows leave.
        time: Mean of these steps.
        spikes: Mean number fired until then.
        additions: Mean number until then.
    """

    threshold: float
    first: int
    accuracy: float
    time: float
    spikes: float
    additions: float


NEVER = 2.0
THRESHOLDS = (*(index / 50 for index in range(50)), 0.99, 0.995, 0.999, 0.9999, NEVER)


def early_exit(seen: Record, threshold: float, *, first: int = 1) -> Exit:
    """What stopping each row early gives.

    Args:
        seen: On some rows.
        threshold: Of the margin between the two most probable classes.
        first: No row stops before this step.
    """
    sure = seen.margin >= threshold
    sure[: first - 1] = False
    sure[-1] = True
    at = sure.int().argmax(0, keepdim=True)
    return Exit(
        threshold,
        first,
        accuracy=seen.correct.gather(0, at).double().mean().item(),
        time=at.double().mean().item() + 1,
        spikes=seen.spikes.gather(0, at).double().mean().item(),
        additions=seen.additions.gather(0, at).double().mean().item(),
    )


def choose_exit(seen: Record, *, loss: float = 0.005) -> Exit:
    """The threshold and first step that stop soonest on rows, held out for this, while their accuracy stays.

    Margins after the very first steps come from a few spikes, which is why the first step is chosen too. A
    threshold of 0 stops all rows at the same step.

    Args:
        seen: On rows that are neither trained nor tested on.
        loss: The share of rows that may be lost against the last step.
    """
    firsts = [2**power for power in range(seen.steps.bit_length()) if 2**power <= seen.steps]
    exits = (early_exit(seen, threshold, first=first) for first in firsts for threshold in THRESHOLDS)
    enough = [found for found in exits if found.accuracy >= seen.accuracy[-1] - loss - 1e-9]
    return min(enough, key=lambda found: found.time)
