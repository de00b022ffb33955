"""The report of a simulated spiking network: plain values, sentences, a picture and a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reports.canvas import BLUE, DASHED, GREY, INK, OTHERS, draw, draw_png, name_rows
from ..reports.page import Gallery, Page, write_page
from ..reports.statistics import number
from ..reports.table import Section, Table
from .evaluate import ADD, MULTIPLY_ADD, THRESHOLDS, early_exit
from .experiment import SpikingResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ASSUMPTIONS = (
    f"{MULTIPLY_ADD} pJ for a multiplication with an addition and {ADD} pJ for an addition of 32-bit floats "
    "in 45 nm CMOS (Horowitz, ISSCC 2014). Memory, control and the update of membranes are not counted; a "
    "spike costs its additions only"
)
MARKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Time steps that a table has a column for."""


# Plain values -----------------------------------------------------------------------------------------------


def as_json(result: SpikingResult) -> dict[str, Any]:
    """Return all figures as plain values for JSON."""
    test = result.test
    additions = test.additions.double().mean(1).tolist()
    spent = [test.energy(each, time) for time, each in enumerate(additions, 1)]
    layers = [
        {
            "path": path,
            "binary": binary,
            "products": products,
            **(
                {
                    "scale": asdict(result.scales[index]),
                    "neurons": int(test.neurons[index]),
                    "spikes": float(test.layer_spikes[index]),
                    "rate": result.rates[index],
                    "saturated": float(test.saturated[index]),
                }
                if index < len(result.scales)
                else {}
            ),
        }
        for index, (path, binary, products) in enumerate(
            zip(result.paths, test.binary, test.products.tolist(), strict=True)
        )
    ]
    return {
        "run": result.name,
        "model": result.model,
        "command": result.command,
        "settings": asdict(result.settings),
        "rows": {
            "calibration": result.calibration_rows,
            "validation": result.validation.rows,
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
            "validation": asdict(result.chosen),
            "test": asdict(result.exit),
            "test_energy_nanojoules": test.energy(result.exit.additions, result.exit.time),
        },
        "lower_thresholds": {
            f"{percentile:.12g}": {
                "accuracy": test_record.accuracy,
                "within_a_point": test_record.within_a_point,
                "spikes": test_record.spikes.double().mean(1).tolist(),
                "saturated": test_record.saturated.tolist(),
            }
            for percentile, test_record in result.tests.items()
            if percentile != result.settings.percentile
        },
        "size": result.bits,
        "facts": dict(result.facts),
    }


# Text and table ---------------------------------------------------------------------------------------------


def answers(result: SpikingResult) -> list[str]:
    """Return the result in sentences."""
    test, chosen, early = result.test, result.chosen, result.exit
    steps, bits, source = test.steps, result.bits, test.source_energy
    within = (
        "no step comes within one point of it"
        if test.within_a_point is None
        else f"step {test.within_a_point} is the first within one point of it"
    )
    all_steps = test.energy(float(test.additions[-1].double().mean()), steps)["held"]
    early_energy = test.energy(early.additions, early.time)["held"]
    added = (
        f", or {source['added']:,.0f} nJ if products with ±1 count as additions" if any(test.binary) else ""
    )
    sentences = [
        f"After {steps} time steps the spiking network classifies {number(test.accuracy[-1])}% of "
        f"{test.rows:,} test rows correctly; the source network {number(test.source_accuracy)}%, and "
        f"{within}.",
        f"With early exit at a margin of {chosen.threshold:g} from step {chosen.first} on, chosen on "
        f"validation rows, a row takes {early.time:.1f} steps and {early.spikes:,.0f} spikes on average, and "
        f"the accuracy is {number(early.accuracy)}%. All {steps} steps take "
        f"{test.spikes[-1].mean():,.0f} spikes.",
        f"The arithmetic takes {all_steps:,.0f} nJ for {steps} steps and {early_energy:,.0f} nJ with early "
        f"exit; the source network takes {source['multiplied']:,.0f} nJ with multiplications{added}.",
    ]
    if bits["binary_weights"]:
        sentences.append(
            f"Stored with one bit per binary weight, the network takes {bits['bits'] / 8192:,.1f} KiB, "
            f"{bits['full_precision_bits'] / bits['bits']:.1f} times less than with real weights."
        )
    return sentences


def warnings(result: SpikingResult) -> list[tuple[str, str]]:
    """Return heading and text of each problem that calibration met."""
    dead = [path for path, scale in zip(result.paths, result.scales, strict=False) if scale.dead]
    sparse = [path for path, scale in zip(result.paths, result.scales, strict=False) if scale.sparse]
    problems = []
    if dead:
        text = f"All activations on the calibration rows are 0 in {', '.join(dead)}."
        problems.append(("Dead layers.", text))
    if sparse:
        text = f"The percentile is 0 in {', '.join(sparse)}; the largest activation replaces it."
        problems.append(("Sparse layers.", text))
    return problems


def table(result: SpikingResult) -> Table:
    """Return accuracy, spikes and energy after powers of two of time steps."""
    steps = result.settings.steps
    marks = sorted({*(mark for mark in MARKS if mark <= steps), steps})
    accuracy = [
        (
            f"percentile {percentile:g}",
            *(number(test_record.accuracy[mark - 1]) for mark in marks),
        )
        for percentile, test_record in result.tests.items()
    ]
    spikes = result.test.spikes.double().mean(1)
    accuracy.append(("spikes", *(f"{spikes[mark - 1]:,.0f}" for mark in marks)))
    additions = result.test.additions.double().mean(1)
    held = [result.test.energy(float(additions[mark - 1]), mark)["held"] for mark in marks]
    accuracy.append(("arithmetic, nJ", *(f"{each:,.0f}" for each in held)))
    return Table(
        headers=("after step", *(f"{mark}" for mark in marks)),
        sections=(Section("Test accuracy in %, spikes and energy per row up to that step", tuple(accuracy)),),
        note=f"Spikes and energy are those at percentile {result.settings.percentile:g}. The source network "
        f"reaches {number(result.test.source_accuracy)}%. Energy is an estimate: {ASSUMPTIONS}. The input "
        "current is computed once and held.",
    )


def paint_accuracy(figure: Figure, *, result: SpikingResult) -> None:
    axes = figure.subplots()
    times = range(1, result.settings.steps + 1)
    colours = (BLUE, *OTHERS)
    for index, (percentile, test_record) in enumerate(result.tests.items()):
        axes.plot(
            times,
            [100 * accuracy for accuracy in test_record.accuracy],
            color=colours[index % len(colours)],
            label=f"percentile {percentile:g}",
            linewidth=1.6 if index == 0 else 1.1,
            zorder=3 - 0.1 * index,
        )
    source = 100 * result.test.source_accuracy
    axes.axhline(source, color=INK, linewidth=0.9, linestyle=DASHED, label="source network")
    axes.plot(
        [result.exit.time],
        [100 * result.exit.accuracy],
        "o",
        color=BLUE,
        markerfacecolor="white",
        label="early exit",
        zorder=4,
    )
    _over_time(axes, result, "time steps")


def _over_time(axes: Axes, result: SpikingResult, label: str) -> None:
    ticks = [mark for mark in MARKS if mark <= result.settings.steps]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=label, ylabel="test accuracy (%)")
    axes.legend(frameon=False, loc="lower right")


def paint_layers(figure: Figure, *, result: SpikingResult) -> None:
    axes = figure.subplots()
    names = result.paths[:-1]
    for row, (spikes, rate) in enumerate(zip(result.test.layer_spikes.tolist(), result.rates, strict=True)):
        binary = result.test.binary[row]
        axes.barh(row, spikes, height=0.56, color=BLUE if binary else GREY, alpha=0.85)
        text = f"{spikes:,.0f}, {rate:.3f} per neuron and step"
        axes.annotate(text, (spikes, row), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    name_rows(axes, names)
    axes.set_xlim(0, 1.9 * max(*result.test.layer_spikes.tolist(), 1.0))
    axes.set_xlabel(f"spikes per row in {result.settings.steps} steps")


def paint_exit(figure: Figure, *, result: SpikingResult) -> None:
    axes = figure.subplots()
    exits = [early_exit(result.test, threshold, first=result.chosen.first) for threshold in THRESHOLDS]
    axes.plot([e.time for e in exits], [100 * e.accuracy for e in exits], color=BLUE, label="early exit")
    times = range(1, result.settings.steps + 1)
    axes.plot(
        times,
        [100 * a for a in result.test.accuracy],
        color=GREY,
        linewidth=1.1,
        label="same step for all rows",
    )
    axes.plot([result.exit.time], [100 * result.exit.accuracy], "o", color=BLUE, markerfacecolor="white")
    _over_time(axes, result, "mean time steps per row")


PANELS: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("accuracy", "Accuracy against time steps", paint_accuracy),
    ("layers", "Spikes per layer", paint_layers),
    ("exit", "Early exit", paint_exit),
)


def picture(result: SpikingResult) -> bytes:
    """Return a PNG with the three panels side by side."""

    def paint_all(figure: Figure) -> None:
        parts: Any = figure.subfigures(1, len(PANELS))
        for part, (_, title, paint) in zip(parts, PANELS, strict=True):
            paint(part, result=result)
            part.suptitle(title, fontsize=10)

    return draw_png((13.5, 3.6), paint_all)


def write_html(result: SpikingResult, path: Path) -> Path:
    """Write the page; it needs no network.

    Raises:
        UserError: If it cannot be written.
    """
    sentences = answers(result)
    alts: Sequence[str] = (sentences[0], _spikes_by_layer(result), sentences[1])
    plots = [
        draw(name, "", alt, (4.2, 3.0), partial(paint, result=result))  # the gallery's heading is its title
        for (name, _, paint), alt in zip(PANELS, alts, strict=True)
    ]
    captions = (
        "A lower percentile lowers the thresholds: neurons fire earlier, and the largest activations "
        "saturate. The dashed line is the source network, the circle the early exit.",
        "Blue layers have binary weights. The input is a constant current; the output never fires.",
        "A row exits once the probabilities of its first two classes differ by the margin, from step "
        f"{result.chosen.first} on. The curve varies the margin on the test rows; the circle marks the "
        "margin chosen on validation rows.",
    )
    page = Page(
        title=result.name,
        kind="Spiking network",
        question="How many time steps do spikes need to reach the accuracy of the source network?",
        answers=sentences,
        warnings=warnings(result),
        table=table(result),
        galleries=[
            Gallery(title, caption, [plot])
            for (_, title, _), caption, plot in zip(PANELS, captions, plots, strict=True)
        ],
        command=result.command,
        facts=[
            ("network", result.model),
            ("rows", f"{result.test.rows:,} test, {result.validation.rows:,} validation"),
            ("calibration", f"{result.calibration_rows:,} training rows"),
            ("membranes", f"start at {result.settings.start:g} of the threshold; {result.settings.mode}"),
            ("saturated", _saturated(result)),
            *result.facts,
        ],
    )
    return write_page(page, path)


def _spikes_by_layer(result: SpikingResult) -> str:
    spikes = zip(result.paths, result.test.layer_spikes.tolist(), strict=False)
    return "Spikes per row: " + ", ".join(f"{path} {each:,.0f}" for path, each in spikes)


def _saturated(result: SpikingResult) -> str:
    shares = zip(result.paths, result.test.saturated.tolist(), strict=False)
    return ", ".join(f"{path} {number(share)}%" for path, share in shares) + " fire at every step"
