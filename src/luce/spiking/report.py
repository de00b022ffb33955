"""Everything that `luce spike` tells of a network: figures, pictures, a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..models import Classifier
from ..models.binary import size_in_bits
from ..reports.canvas import BLUE, DASHED, GREY, INK, OTHERS, STYLE, draw, name_rows
from ..reports.html import Gallery, write_page
from ..reports.statistics import number
from ..reports.table import Section, Table
from .calibration import Calibration, Scale
from .chain import read
from .evaluate import ADD, MULTIPLY_ADD, THRESHOLDS, Exit, Record, choose_exit, early_exit, record
from .network import Mode, convert

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Batches = Iterable[tuple[Tensor, Tensor]]
Watch = Callable[[str], AbstractContextManager[Callable[[], None]]]
"""AnswerKind what is simulated next; gives what is called at every step of every batch."""

ASSUMPTIONS = (
    f"{MULTIPLY_ADD} pJ for a multiplication with an addition and {ADD} pJ for an addition of 32-bit floats "
    "in 45 nm CMOS (Horowitz, ISSCC 2014); operations alone, no memory, no control, no adding to membranes; "
    "a spike costs nothing but its additions"
)
MARKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Time steps that a table has a column for."""


@dataclass(frozen=True)
class Settings:
    """How to convert and to simulate.

    Attributes:
        steps: Time steps.
        percentile: Of a layer's activations, that becomes a rate of one.
        lower: Further percentiles: lower thresholds, which fire sooner and saturate more.
        start: Of the membranes, in thresholds.
        mode: ``layerwise`` or ``synchronous``.
        exit_loss: The share of validation rows that leaving early may lose.
    """

    steps: int = 64
    percentile: float = 99.9
    lower: tuple[float, ...] = (99.0, 95.0)
    start: float = 0.5
    mode: Mode = "layerwise"
    exit_loss: float = 0.005


@dataclass(frozen=True)
class Report:
    """A network converted and simulated.

    Attributes:
        name: Of the run.
        model: Of the network.
        settings: How it was done.
        paths: Of the layers, the output's the last.
        scales: Of each layer's activations at the first percentile.
        calibration_rows: How many rows they come from.
        validation: On rows held out for the choice of the exit.
        tests: On test rows, by percentile; that of the settings first.
        chosen: The exit chosen on the validation rows, as it does on them.
        bits: The size of the network.
        command: That makes the report again.
        facts: Further lines for the end of the page.
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
        return self.tests[self.settings.percentile]

    @property
    def exit(self) -> Exit:
        """The chosen exit on the test rows."""
        return early_exit(self.test, self.chosen.threshold, first=self.chosen.first)

    @property
    def rates(self) -> list[float]:
        """Spikes per neuron and step, of each layer."""
        found: list[float] = (self.test.layer_spikes / self.test.neurons / self.test.steps).tolist()
        return found


def examine(
    student: Classifier,
    calibration: Batches,
    validation: Batches,
    test: Callable[[], Batches],
    settings: Settings,
    watch: Watch,
    **about: Any,
) -> Report:
    """Convert a student and simulate it.

    Args:
        student: In evaluation mode, on the device of the batches.
        calibration: Inputs, as they come from the data, and labels.
        validation: Likewise.
        test: Gives the test batches anew for every percentile.
        settings: How.
        watch: Hears of each simulation.
        about: ``name``, ``model``, ``command`` and ``facts`` of the report.
    Raises:
        UserError: If the network does not convert, or a setting is none.
    """
    chain = read(student.body)
    calibrated = Calibration(chain, (student.normalised(inputs) for inputs, _ in calibration))
    how: Any = {"start": settings.start, "mode": settings.mode}

    def simulate(percentile: float, what: str, batches: Batches) -> Record:
        spiking = convert(chain, calibrated.scales(percentile))
        rows = ((student.normalised(inputs), target) for inputs, target in batches)
        with watch(f"{what}, percentile {percentile:g}") as advance:
            return record(spiking, chain, rows, settings.steps, **how, advance=advance)

    tests = {
        percentile: simulate(percentile, "test rows", test())
        for percentile in dict.fromkeys((settings.percentile, *settings.lower))
    }
    held_out = simulate(settings.percentile, "validation rows", validation)
    return Report(
        settings=settings,
        paths=tuple(layer.path for layer in chain.layers),
        scales=calibrated.scales(settings.percentile),
        calibration_rows=calibrated.rows,
        validation=held_out,
        tests=tests,
        chosen=choose_exit(held_out, loss=settings.exit_loss),
        bits=size_in_bits(student.body),
        **about,
    )


# Plain values -----------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """Everything as plain values."""
    test = report.test
    additions = test.additions.double().mean(1).tolist()
    spent = [test.energy(each, time) for time, each in enumerate(additions, 1)]
    layers = [
        {
            "path": path,
            "binary": binary,
            "products": products,
            **(
                {
                    "scale": asdict(report.scales[index]),
                    "neurons": int(test.neurons[index]),
                    "spikes": float(test.layer_spikes[index]),
                    "rate": report.rates[index],
                    "saturated": float(test.saturated[index]),
                }
                if index < len(report.scales)
                else {}
            ),
        }
        for index, (path, binary, products) in enumerate(
            zip(report.paths, test.binary, test.products.tolist(), strict=True)
        )
    ]
    return {
        "run": report.name,
        "model": report.model,
        "command": report.command,
        "settings": asdict(report.settings),
        "rows": {
            "calibration": report.calibration_rows,
            "validation": report.validation.rows,
            "test": test.rows,
        },
        "source_accuracy": test.source_accuracy,
        "accuracy": test.accuracy,
        "within_a_point": test.within_a_point,
        "spikes": test.spikes.double().mean(1).tolist(),
        "additions": additions,
        "layers": layers,
        "energy_nanojoules": {
            "assumptions": ASSUMPTIONS,
            "source": test.source_energy,
            "held": [each["held"] for each in spent],
            "recomputed": [each["recomputed"] for each in spent],
        },
        "early_exit": {
            "rule": "the first step from `first` on at which the margin is at least `threshold`",
            "validation": asdict(report.chosen),
            "test": asdict(report.exit),
            "test_energy_nanojoules": test.energy(report.exit.additions, report.exit.time),
        },
        "lower_thresholds": {
            f"{percentile:.12g}": {
                "accuracy": seen.accuracy,
                "within_a_point": seen.within_a_point,
                "spikes": seen.spikes.double().mean(1).tolist(),
                "saturated": seen.saturated.tolist(),
            }
            for percentile, seen in report.tests.items()
            if percentile != report.settings.percentile
        },
        "size": report.bits,
        "facts": dict(report.facts),
    }


# For people -------------------------------------------------------------------------------------------------


def answers(report: Report) -> list[str]:
    """What the figures say, a sentence each."""
    test, chosen, found = report.test, report.chosen, report.exit
    steps, bits, source = test.steps, report.bits, test.source_energy
    sooner = (
        "no step comes within one point of it"
        if test.within_a_point is None
        else f"the first step within one point of it is {test.within_a_point}"
    )
    spent = test.energy(float(test.additions[-1].double().mean()), steps)["held"]
    early = test.energy(found.additions, found.time)["held"]
    added = f", {source['added']:,.0f} nJ where products with ±1 are additions" if any(test.binary) else ""
    said = [
        f"After {steps} time steps the spiking network is right on {number(test.accuracy[-1])}% of "
        f"{test.rows:,} test rows, the network it was made from on {number(test.source_accuracy)}%; "
        f"{sooner}.",
        f"Leaving at a margin of {chosen.threshold:g} from step {chosen.first} on, both chosen on validation "
        f"rows, takes {found.time:.1f} steps and {found.spikes:,.0f} spikes on average and is right on "
        f"{number(found.accuracy)}%; all {steps} steps take {test.spikes[-1].mean():,.0f} spikes.",
        f"Arithmetic alone: {spent:,.0f} nJ for {steps} steps and {early:,.0f} nJ with leaving early; the "
        f"network it was made from takes {source['multiplied']:,.0f} nJ with multiplications{added}.",
    ]
    if bits["binary_weights"]:
        said.append(
            f"Stored with one bit per binary weight it takes {bits['bits'] / 8192:,.1f} KiB, "
            f"{bits['full_precision_bits'] / bits['bits']:.1f} times less than with real weights."
        )
    return said


def warnings(report: Report) -> list[tuple[str, str]]:
    dead = [path for path, scale in zip(report.paths, report.scales, strict=False) if scale.dead]
    sparse = [path for path, scale in zip(report.paths, report.scales, strict=False) if scale.sparse]
    found = []
    if dead:
        found.append(("Dead layers.", f"On the calibration rows nothing came out of {', '.join(dead)}."))
    if sparse:
        text = f"The percentile is 0 in {', '.join(sparse)}: the largest activation stands in for it."
        found.append(("Sparse layers.", text))
    return found


def table(report: Report) -> Table:
    """Accuracy at powers of two, and what each layer does."""
    steps = report.settings.steps
    marks = sorted({*(mark for mark in MARKS if mark <= steps), steps})
    accuracy = [
        (
            f"percentile {percentile:g}",
            *(number(seen.accuracy[mark - 1]) for mark in marks),
        )
        for percentile, seen in report.tests.items()
    ]
    spikes = report.test.spikes.double().mean(1)
    accuracy.append(("spikes", *(f"{spikes[mark - 1]:,.0f}" for mark in marks)))
    additions = report.test.additions.double().mean(1)
    held = [report.test.energy(float(additions[mark - 1]), mark)["held"] for mark in marks]
    accuracy.append(("arithmetic, nJ", *(f"{each:,.0f}" for each in held)))
    return Table(
        headers=("after step", *(f"{mark}" for mark in marks)),
        sections=(Section("Test accuracy in %, and what it takes until then", tuple(accuracy)),),
        note=f"Percentile {report.settings.percentile:g} unless said otherwise; the source network is "
        f"right on {number(report.test.source_accuracy)}%. Energy is an estimate: {ASSUMPTIONS}; the input "
        "current is computed once and held.",
    )


def paint_accuracy(figure: Figure, *, report: Report) -> None:
    axes = figure.subplots()
    times = range(1, report.settings.steps + 1)
    colours = (BLUE, *OTHERS)
    for index, (percentile, seen) in enumerate(report.tests.items()):
        axes.plot(
            times,
            [100 * accuracy for accuracy in seen.accuracy],
            color=colours[index % len(colours)],
            label=f"percentile {percentile:g}",
            linewidth=1.6 if index == 0 else 1.1,
            zorder=3 - 0.1 * index,
        )
    source = 100 * report.test.source_accuracy
    axes.axhline(source, color=INK, linewidth=0.9, linestyle=DASHED, label="source network")
    axes.plot(
        [report.exit.time],
        [100 * report.exit.accuracy],
        "o",
        color=BLUE,
        markerfacecolor="white",
        label="leaving early",
        zorder=4,
    )
    _over_time(axes, report, "time steps")


def _over_time(axes: Axes, report: Report, label: str) -> None:
    ticks = [mark for mark in MARKS if mark <= report.settings.steps]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=label, ylabel="test accuracy (%)")
    axes.legend(frameon=False, loc="lower right")


def paint_layers(figure: Figure, *, report: Report) -> None:
    axes = figure.subplots()
    names = report.paths[:-1]
    for row, (spikes, rate) in enumerate(zip(report.test.layer_spikes.tolist(), report.rates, strict=True)):
        binary = report.test.binary[row]
        axes.barh(row, spikes, height=0.56, color=BLUE if binary else GREY, alpha=0.85)
        text = f"{spikes:,.0f}, {rate:.3f} per neuron and step"
        axes.annotate(text, (spikes, row), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    name_rows(axes, names)
    axes.set_xlim(0, 1.9 * max(*report.test.layer_spikes.tolist(), 1.0))
    axes.set_xlabel(f"spikes per row in {report.settings.steps} steps")


def paint_exit(figure: Figure, *, report: Report) -> None:
    axes = figure.subplots()
    exits = [early_exit(report.test, threshold, first=report.chosen.first) for threshold in THRESHOLDS]
    axes.plot([e.time for e in exits], [100 * e.accuracy for e in exits], color=BLUE, label="leaving early")
    times = range(1, report.settings.steps + 1)
    axes.plot(
        times,
        [100 * a for a in report.test.accuracy],
        color=GREY,
        linewidth=1.1,
        label="the same step for all",
    )
    axes.plot([report.exit.time], [100 * report.exit.accuracy], "o", color=BLUE, markerfacecolor="white")
    _over_time(axes, report, "mean time steps per row")


PANELS: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("accuracy", "Accuracy against time steps", paint_accuracy),
    ("layers", "Spikes per layer", paint_layers),
    ("exit", "Leaving early", paint_exit),
)


def picture(report: Report) -> bytes:
    """A PNG with the three panels side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = STYLE
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(13.5, 3.6), layout="constrained")
        parts: Any = figure.subfigures(1, len(PANELS))
        for part, (_, title, paint) in zip(parts, PANELS, strict=True):
            paint(part, report=report)
            part.suptitle(title, fontsize=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def write_html(report: Report, path: Path) -> Path:
    """Write the page; it needs no network.

    Raises:
        UserError: If it cannot be written.
    """
    said = answers(report)
    alts: Sequence[str] = (said[0], _layers_in_words(report), said[1])
    plots = [
        draw(name, title, alt, (4.2, 3.0), partial(paint, report=report))
        for (name, title, paint), alt in zip(PANELS, alts, strict=True)
    ]
    captions = (
        "A lower percentile lowers the thresholds: neurons fire sooner, and the largest activations are cut "
        "off. The dashed line is the network that was converted; the circle is leaving early.",
        "Blue layers have binary weights. The input is a constant current, and the output never fires.",
        "Each row stops once its two most probable classes are far enough apart, from step "
        f"{report.chosen.first} on: the curve goes over all thresholds of that margin on the test rows, the "
        "circle is the one chosen on validation rows.",
    )
    return write_page(
        {
            "title": report.name,
            "kind": "Spiking network",
            "question": "How many time steps does it take until spikes know what the network knew?",
            "answers": said,
            "warnings": warnings(report),
            "table": table(report),
            "colours": {},
            "galleries": [
                Gallery(title, caption, [plot])
                for (_, title, _), caption, plot in zip(PANELS, captions, plots, strict=True)
            ],
            "command": report.command,
            "recipe": "",
            "facts": [
                ("network", report.model),
                ("rows", f"{report.test.rows:,} test, {report.validation.rows:,} validation"),
                ("calibration", f"{report.calibration_rows:,} training rows"),
                (
                    "membranes",
                    f"start at {report.settings.start:g} of their threshold; {report.settings.mode}",
                ),
                ("saturated", _saturated(report)),
                *report.facts,
            ],
            "footer": "Written by luce spike. It loads nothing from the network.",
        },
        path,
    )


def _layers_in_words(report: Report) -> str:
    spikes = zip(report.paths, report.test.layer_spikes.tolist(), strict=False)
    return "Spikes per row: " + ", ".join(f"{path} {each:,.0f}" for path, each in spikes)


def _saturated(report: Report) -> str:
    shares = zip(report.paths, report.test.saturated.tolist(), strict=False)
    return ", ".join(f"{path} {number(share)}%" for path, share in shares) + " fire at every step"
