"""Convert the student of a run to a spiking network and simulate it on the run's data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from .. import __version__, data, stops
from ..config import as_path
from ..data import Examples
from ..errors import UserError
from ..recipes import read_stored
from ..recipes.build import adapt, prepare_data
from ..spiking import read
from ..spiking.experiment import Settings, SpikingResult, convert_and_simulate
from ..training import checkpoint
from ..training.progress import Bar
from ..training.setup import new_accelerator

BATCH = 250
"""Rows simulated together; their membranes and the records of all time steps must fit into memory."""


@dataclass(frozen=True)
class SpikeOptions(Settings):
    """How to convert and simulate the student of a run, and on how many rows.

    Attributes:
        calibration: At most this number of training rows, on which the activations are measured.
        rows: At most this number of test rows, and of validation rows; None for all.
        cpu: Use the CPU even if there is a GPU.
        trusted: Let the run folder name code of others, such as python: networks.
    """

    calibration: int = 4096
    rows: int | None = None
    cpu: bool = False
    trusted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("calibration", "rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"expected `{name}` of at least 1, got {value}")


def spike(
    folder: Path | str,
    options: SpikeOptions | None = None,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> SpikingResult:
    """Convert the student of a finished run to a spiking network, simulate it, and choose an early exit.

    Calibrates on training rows, chooses the exit on validation rows, and measures on test rows, as the recipe
    of the run splits them. Writes nothing: `luce.spiking.report` has the JSON, the picture and the page.

    Args:
        folder: A finished run, with ``recipe.yaml`` and an exported student.
        options: How to convert and simulate; the defaults if None.
        command: Command that reproduces the result, for the report.
        progress: Display for the progress bars; None shows none.
    Returns:
        Accuracy, spikes, additions and energy after every time step.
    Raises:
        UserError: If the folder holds no finished run, the network cannot be converted, or the data cannot be
            loaded.
    Example:
        >>> spike("runs/digits-bsnn", SpikeOptions(steps=32)).test.accuracy[-1]  # doctest: +SKIP
        0.974
    """
    options, folder = options or SpikeOptions(), as_path(folder)
    student, description = checkpoint.load_student(folder, trusted=options.trusted)
    read(student.body)  # refuse a network that cannot be converted before loading the data
    recipe = read_stored(folder / "recipe.yaml", {"teacher": None}, trusted=options.trusted)
    recipe.training.cpu = recipe.training.cpu or options.cpu
    inputs = prepare_data(recipe)
    adapt(student, description, inputs.data, str(folder), "name")
    # The chain answers in the order of the network, so labels follow it; the last one is that of no class.
    order = range(len(inputs.data.classes)) if student.order is None else student.order.tolist()
    labels = torch.tensor([*order, data.UNLABELLED])
    device = new_accelerator(recipe.training).device
    student = student.to(device)
    train = _spaced(inputs.train.plain, options.calibration)
    validation, test = (
        _spaced(part.plain.labelled, options.rows) for part in (inputs.validation, inputs.test)
    )

    def batches(rows: Examples) -> Iterator[tuple[Tensor, Tensor]]:
        with stops.noted():
            for batch in data.loader(rows, batch_size=BATCH, seed=None, workers=recipe.data.workers):
                yield batch["input"].to(device), labels[batch["target"]].to(device)
                stops.check()

    @contextmanager
    def bar(simulation: str) -> Iterator[Callable[[], None]]:
        rows = len(validation if simulation.startswith("validation") else test)
        with Bar(progress, simulation, total=options.steps * -(-rows // BATCH)) as shown:
            yield shown.advance

    return convert_and_simulate(
        student,
        batches(train),
        batches(validation),
        lambda: batches(test),
        Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}),
        bar,
        name=str(folder),
        model=description["model"],
        command=command,
        facts=(("luce", __version__), ("torch", str(torch.__version__)), ("device", str(device))),
    )


def _spaced(rows: Examples, limit: int | None) -> Examples:
    """All rows, or `limit` of them at even distances: the first ones may all be of one class."""
    if limit is None or limit >= len(rows):
        return rows
    at = torch.linspace(0, len(rows) - 1, limit).round().long()
    return Examples(rows.source, rows.indices[at], rows.targets[at])
