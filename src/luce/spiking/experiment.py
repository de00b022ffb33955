"""Convert a trained student to a spiking network, simulate it on labelled rows and record the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor

from ..errors import UserError
from ..models import Classifier
from ..models.binary import size_in_bits
from .calibration import Calibration, Scale
from .chain import read
from .evaluate import Exit, Record, choose_exit, early_exit, record
from .network import Mode, convert

LabelledBatches = Iterable[tuple[Tensor, Tensor]]
"""Batches of inputs and class indices."""

Progress = Callable[[str], AbstractContextManager[Callable[[], None]]]
"""Called with the name of a simulation; gives a function to call after every time step of every batch."""


@dataclass(frozen=True)
class Settings:
    """How to convert and simulate a network.

    Attributes:
        steps: Number of time steps.
        percentile: Percentile of a layer's activations that becomes a rate of one spike per step.
        lower: Lower percentiles to compare with: thresholds fall, so neurons fire earlier and saturate more.
        start: Initial membrane potential as a share of the threshold.
        mode: Order of updates, ``layerwise`` or ``synchronous``; see `SpikingNetwork.simulate`.
        exit_loss: Share of validation rows that early exit may lose.
    """

    steps: int = 64
    percentile: float = 99.9
    lower: tuple[float, ...] = (99.0, 95.0)
    start: float = 0.5
    mode: Mode = "layerwise"
    exit_loss: float = 0.005

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"expected `steps` of at least 1, got {self.steps}")
        for percentile in (self.percentile, *self.lower):
            if not 0 < percentile <= 100:
                raise UserError(f"expected percentiles above 0 and of at most 100, got {percentile:g}")
        if not 0 <= self.start < 1:
            raise UserError(f"expected `start` of at least 0 and below 1, got {self.start:g}")
        if self.mode not in get_args(Mode):
            raise UserError(f"expected `mode` layerwise or synchronous, got {self.mode}")
        if not 0 <= self.exit_loss <= 1:
            raise UserError(f"expected `exit_loss` in [0, 1], got {self.exit_loss:g}")


@dataclass(frozen=True)
class SpikingResult:
    """The figures of a converted and simulated network.

    Attributes:
        name: Name of the run.
        model: Name of the source network.
        settings: Settings of conversion and simulation.
        paths: Paths of the layers with weights, the output last.
        scales: Scale of each hidden layer's activations at ``settings.percentile``.
        calibration_rows: Number of rows that the scales are measured on.
        validation: Record of the rows on which the exit is chosen.
        tests: Records of the test rows by percentile, ``settings.percentile`` first.
        chosen: The chosen exit, with its figures on the validation rows.
        bits: Size of the network; see `luce.models.binary.size_in_bits`.
        command: Reproduces the result.
        facts: Further names and values for the report.
    """

    name: str
    model: str
    settings: Settings
    paths: tuple[str, ...]
    scales: list[Scale]
    calibration_rows: int
    validation: Record
    tests: dict[float, Record]
    chosen: Exit
    bits: dict[str, int]
    command: str = ""
    facts: tuple[tuple[str, str], ...] = field(default=())

    @property
    def test(self) -> Record:
        """The record of the test rows at ``settings.percentile``."""
        return self.tests[self.settings.percentile]

    @property
    def exit(self) -> Exit:
        """The chosen exit, with its figures on the test rows."""
        return early_exit(self.test, self.chosen.threshold, first=self.chosen.first)

    @property
    def rates(self) -> list[float]:
        """Spikes per neuron and step of each layer."""
        rates: list[float] = (self.test.layer_spikes / self.test.neurons / self.test.steps).tolist()
        return rates


def convert_and_simulate(
    student: Classifier,
    calibration: LabelledBatches,
    validation: LabelledBatches,
    test: Callable[[], LabelledBatches],
    settings: Settings,
    progress: Progress,
    **about: Any,
) -> SpikingResult:
    """Convert a student, simulate it on test and validation rows, and choose an early exit.

    Args:
        student: In evaluation mode, on the device of the batches.
        calibration: Raw inputs (the student normalises them) and labels.
        validation: As ``calibration``.
        test: Returns the test batches; called once per percentile.
        settings: Settings of conversion and simulation.
        progress: Called with the name of each simulation.
        about: ``name``, ``model``, ``command`` and ``facts`` of the result.

    Raises:
        UserError: If the network cannot be converted, or a setting is invalid.
    """
    chain = read(student.body)
    calibrated = Calibration(chain, (student.normalised(inputs) for inputs, _ in calibration))
    how: Any = {"start": settings.start, "mode": settings.mode}

    def simulate(percentile: float, rows_name: str, batches: LabelledBatches) -> Record:
        spiking = convert(chain, calibrated.scales(percentile))
        rows = ((student.normalised(inputs), target) for inputs, target in batches)
        with progress(f"{rows_name}, percentile {percentile:g}") as advance:
            return record(spiking, chain, rows, settings.steps, **how, advance=advance)

    tests = {
        percentile: simulate(percentile, "test rows", test())
        for percentile in dict.fromkeys((settings.percentile, *settings.lower))
    }
    held_out = simulate(settings.percentile, "validation rows", validation)
    return SpikingResult(
        settings=settings,
        paths=tuple(layer.path for layer in chain.layers),
        scales=calibrated.scales(settings.percentile),
        calibration_rows=calibrated.rows,
        validation=held_out,
        tests=tests,
        # Chosen on validation rows: choosing on test rows would make the reported exit look better than it
        # is.
        chosen=choose_exit(held_out, loss=settings.exit_loss),
        bits=size_in_bits(student.body),
        **about,
    )
