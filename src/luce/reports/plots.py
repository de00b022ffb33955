"""The plots of a report, one per panel.

Matplotlib draws without a backend or global state, and is imported with the first plot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .canvas import (
    BLUE,
    DASHED,
    GREY,
    INK,
    OTHERS,
    Plot,
    colours,
    draw,
    name_lines,
    name_rows,
    over_epochs,
    short,
)
from .runs import Bin, Comparison, Run, Sample, panels
from .statistics import FOCUS, Difference, Spread, number, signed, spread, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 4.2  # inches


class Curve(NamedTuple):
    """Validation accuracy in percent: mean and deviation over the seeds that reached each epoch."""

    epochs: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def accuracy_curves(source: Run | Comparison) -> list[Plot]:
    """Plot validation accuracy over epochs, mean and band over seeds; a panel for each setting."""
    plots = []
    for index, (setting, methods) in enumerate(panels(source).items()):
        curves = {method: curve for method, runs in methods.items() if len((curve := _curve(runs)).epochs)}
        if not curves:
            continue
        if isinstance(source, Run):
            teacher = None if source.teacher is None else source.teacher.accuracy
        else:
            teacher = source.teacher_accuracy(setting.name)
        ends = ", ".join(f"{method} {curve.mean[-1]:.1f}%" for method, curve in curves.items())
        level = "" if teacher is None else f"; the teacher's test accuracy is {number(teacher)}%"
        alt = f"Validation accuracy over epochs; at the end: {ends}{level}."
        paint = partial(_paint_curves, curves=curves, palette=colours(source), teacher=teacher)
        plots.append(draw(f"curves-{index}", setting.label, alt, (WIDE, 2.8), paint))
    return plots


def loss_curves(run: Run) -> list[Plot]:
    """Plot the terms of the training loss and the validation loss over epochs."""
    names = dict.fromkeys(name for epoch in run.epochs for name in epoch.train)
    lines = {f"train {name}": [epoch.train.get(name, np.nan) for epoch in run.epochs] for name in names}
    lines["validation"] = [epoch.validation.get("loss", np.nan) for epoch in run.epochs]
    lines = {name: values for name, values in lines.items() if np.isfinite(values).any()}
    if not lines:
        return []
    ends = ", ".join(f"{name} {values[-1]:.3f}" for name, values in lines.items())
    alt = f"Losses over epochs; at the end: {ends}."
    epochs = [epoch.number for epoch in run.epochs]
    return [draw("losses", "", alt, (WIDE, 2.8), partial(_paint_losses, epochs=epochs, lines=lines))]


def differences(comparison: Comparison) -> list[Plot]:
    """Plot paired differences to the baseline: seeds, mean and 95% interval; a panel per setting."""
    plots = []
    for index, summary in enumerate(summarise(comparison).settings):
        shown = [
            difference
            for (_, reference), difference in summary.differences.items()
            if reference == comparison.baseline and difference.each
        ]
        if not shown:
            continue
        points = ", ".join(f"{d.method} {signed(d.mean)} points{_interval(d)}" for d in shown)
        alt = f"Test accuracy over {comparison.baseline}: {points}."
        paint = partial(_paint_differences, shown=shown, palette=colours(comparison))
        size = (WIDE, 0.8 + 0.42 * len(shown))
        plots.append(draw(f"differences-{index}", summary.setting.label, alt, size, paint))
    return plots


def fidelity(comparison: Comparison) -> list[Plot]:
    """Plot disagreement with the teacher and KL divergence from it; a panel per setting."""
    plots = []
    for index, summary in enumerate(summarise(comparison).settings):
        shown = {
            method: (spreads["agreement"], spreads["kl"])
            for method, spreads in summary.spreads.items()
            if "agreement" in spreads and "kl" in spreads and np.isfinite(spreads["kl"].mean)
        }
        if not shown:
            continue
        values = ", ".join(f"{m} {number(a.mean)}% and {kl.mean:.3f} nats" for m, (a, kl) in shown.items())
        alt = f"Agreement with the teacher, and KL from it: {values}."
        paint = partial(_paint_fidelity, shown=shown, palette=colours(comparison))
        size = (WIDE, 0.8 + 0.36 * len(shown))
        plots.append(draw(f"fidelity-{index}", summary.setting.label, alt, size, paint))
    return plots


def reliability(source: Run | Comparison) -> dict[str, list[Plot]]:
    """Plot accuracy against confidence at the last epoch, pooled over seeds; a panel per method."""
    palette = colours(source)
    by_setting: dict[str, list[Plot]] = {}
    for index, (setting, methods) in enumerate(panels(source).items()):
        for rank, (method, runs) in enumerate(methods.items()):
            bins = pool([bar for run in runs for bar in run.last.test.reliability])
            error = spread([run.last.test.calibration_error for run in runs]).mean
            pairs = ", ".join(f"{number(b.confidence)}% sure, {number(b.accuracy)}% right" for b in bins)
            plot = draw(
                f"reliability-{index}-{rank}",
                f"{method}, ECE {number(error)}%",
                f"Reliability of {method}: {pairs}.",
                (2.3, 2.2),
                partial(paint_reliability, bins=bins, colour=palette[method]),
            )
            by_setting.setdefault(setting.label, []).append(plot)
    return by_setting


def queries(comparison: Comparison) -> list[Plot]:
    """Plot test accuracy against queries of the teacher; a panel per setting in which they differ.

    Methods whose names differ only in the number of queries at the end, such as ``KD, 500`` and ``KD, 2000``,
    form one line.
    """
    plots = []
    for index, (setting, methods) in enumerate(panels(comparison).items()):
        lines: dict[str, dict[float, Spread]] = {}
        for method, runs in methods.items():
            counts = {run.prepared.get("queries") for run in runs}
            if len(counts) == 1 and (count := counts.pop()):
                line = re.sub(rf"\W*(?<!\d){count:.0f}$", "", method) or method
                lines.setdefault(line, {})[count] = spread([run.last.test.accuracy for run in runs])
        if all(len(line) < 2 for line in lines.values()):
            continue
        values = "; ".join(
            f"{name}: " + ", ".join(f"{number(line[x].mean)}% at {x:,.0f}" for x in sorted(line))
            for name, line in lines.items()
        )
        teacher = comparison.teacher_accuracy(setting.name)
        alt = f"Test accuracy against queries of the teacher. {values}."
        paint = partial(_paint_queries, lines=lines, teacher=teacher)
        plots.append(draw(f"queries-{index}", setting.label, alt, (WIDE, 3.2), paint))
    return plots


def samples(run: Run, columns: int = 12) -> list[Plot]:
    """Show images that the method generated, each under the teacher's answer."""
    if not run.samples:
        return []
    rows = math.ceil(len(run.samples) / columns)
    answers = ", ".join(f"{sample.label} ({number(sample.confidence)}%)" for sample in run.samples)
    alt = f"Generated images and the teacher's answers: {answers}."
    paint = partial(_paint_samples, samples=run.samples, rows=rows, columns=columns)
    return [draw("samples", "", alt, (2 * WIDE, 0.95 * rows), paint)]


def pool(bins: Sequence[Bin], cells: int = 10) -> list[Bin]:
    """Merge the bars of several seeds by confidence, weighted by their examples; drop empty cells.

    Example:
        >>> pool([Bin(0.75, 0.5, 1), Bin(0.75, 1.0, 3)])
        [Bin(confidence=0.75, accuracy=0.875, count=4)]
    """
    joined: dict[int, list[Bin]] = {}
    for bar in bins:
        if bar.count:
            joined.setdefault(min(int(bar.confidence * cells), cells - 1), []).append(bar)
    pooled = []
    for _, bars in sorted(joined.items()):
        count = sum(bar.count for bar in bars)
        confidence = sum(bar.confidence * bar.count for bar in bars) / count
        accuracy = sum(bar.accuracy * bar.count for bar in bars) / count
        pooled.append(Bin(confidence, accuracy, count))
    return pooled


def _curve(runs: Sequence[Run]) -> Curve:
    values: dict[int, list[float]] = {}
    for run in runs:
        for epoch in run.epochs:
            if "accuracy" in epoch.validation:
                values.setdefault(epoch.number, []).append(100 * epoch.validation["accuracy"])
    epochs = sorted(values)
    spreads = [spread(values[epoch]) for epoch in epochs]
    mean = np.array([each.mean for each in spreads])
    return Curve(np.array(epochs), mean, np.array([each.deviation or 0.0 for each in spreads]))


def _interval(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return ""
    return f" ({number(difference.low)} to {number(difference.high)})"


def _paint_curves(
    figure: Figure, *, curves: Mapping[str, Curve], palette: Mapping[str, str], teacher: float | None
) -> None:
    axes = figure.subplots()
    over_epochs(axes, "validation accuracy (%)")
    names = []
    for method, (epochs, mean, deviation) in curves.items():
        colour = palette[method]
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.14, linewidth=0)
        axes.plot(epochs, mean, color=colour, linewidth=2.2 if method == FOCUS else 1.5)
        names.append((method, mean[-1], colour))
    # Including the first quarter of training would squeeze the later differences against the top.
    heights = np.concatenate([curve.mean[len(curve.mean) // 4 :] for curve in curves.values()])
    if teacher is not None:
        axes.axhline(100 * teacher, color=INK, linewidth=1, linestyle=DASHED)
        names.append(("teacher", 100 * teacher, INK))
        heights = np.append(heights, 100 * teacher)
    low, high = heights.min(), heights.max()
    margin = 0.06 * max(high - low, 1.0)
    axes.set_ylim(low - margin, high + margin)
    name_lines(axes, names)


def _paint_queries(
    figure: Figure, *, lines: Mapping[str, Mapping[float, Spread]], teacher: float | None
) -> None:
    axes = figure.subplots()
    palette = (BLUE, *OTHERS, GREY)
    names = []
    for index, (name, line) in enumerate(lines.items()):
        colour = palette[index % len(palette)]
        counts = sorted(line)
        mean = np.array([100 * line[x].mean for x in counts])
        deviation = np.array([100 * (line[x].deviation or 0.0) for x in counts])
        axes.fill_between(counts, mean - deviation, mean + deviation, color=colour, alpha=0.14, linewidth=0)
        axes.plot(counts, mean, color=colour, linewidth=1.6, marker="o", markersize=3.5)
        names.append((name, mean[-1], colour))
    if teacher is not None:
        axes.axhline(100 * teacher, color=INK, linewidth=1, linestyle=DASHED)
        names.append(("teacher", 100 * teacher, INK))
    axes.set_xscale("log")
    ticks = sorted({x for line in lines.values() for x in line})
    axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    axes.minorticks_off()
    axes.set(xlabel="queries of the teacher", ylabel="test accuracy (%)")
    axes.grid(axis="x", visible=False)
    name_lines(axes, names)


def _paint_samples(figure: Figure, *, samples: Sequence[Sample], rows: int, columns: int) -> None:
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, sample in zip(grid.flat, samples, strict=False):
        # Three channels are colours; any other number is shown as its mean in grey.
        pixels = sample.pixels if len(sample.pixels) == 3 else sample.pixels.mean(0, keepdims=True)
        image = np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0).astype(np.uint8)
        axes.imshow(image, interpolation="none")
        axes.set_title(f"{short(sample.label, 12)}\n{number(sample.confidence)}%", fontsize=7, pad=2)


def _paint_losses(figure: Figure, *, epochs: Sequence[int], lines: Mapping[str, Sequence[float]]) -> None:
    axes = figure.subplots()
    over_epochs(axes, "loss")
    names = []
    palette = (BLUE, *OTHERS, GREY)
    for index, (name, values) in enumerate(lines.items()):
        colour = palette[index % len(palette)]
        axes.plot(epochs, values, color=colour, linewidth=1.6)
        names.append((name, np.extract(np.isfinite(values), values)[-1], colour))
    name_lines(axes, names)


def _paint_differences(figure: Figure, *, shown: Sequence[Difference], palette: Mapping[str, str]) -> None:
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=1)
    for row, difference in enumerate(shown):
        colour = palette[difference.method]
        points = 100 * np.asarray(difference.each)
        axes.scatter(points, np.full(len(points), row + 0.24), s=9, color=colour, alpha=0.5, linewidths=0)
        if difference.low is not None and difference.high is not None:
            ends = [100 * difference.low, 100 * difference.high]
            axes.plot(ends, [row, row], color=colour, linewidth=2)
        # Filled: beyond noise; hollow: within noise.
        fill = colour if difference.beyond_noise else "white"
        axes.scatter(
            100 * difference.mean, row, s=44, facecolor=fill, edgecolor=colour, linewidths=1.6, zorder=3
        )
    name_rows(axes, [difference.method for difference in shown])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"points over {short(shown[0].reference)}, test accuracy")


def _paint_fidelity(
    figure: Figure, *, shown: Mapping[str, tuple[Spread, Spread]], palette: Mapping[str, str]
) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for row, (method, (agreement, kl)) in enumerate(shown.items()):
        disagreement = 100 * (1 - agreement.mean)
        deviation = 100 * (agreement.deviation or 0.0)
        _bar(left, row, disagreement, deviation, palette[method], f"{disagreement:.1f}")
        _bar(right, row, kl.mean, kl.deviation or 0.0, palette[method], f"{kl.mean:.3f}")
    for axes, label in ((left, "disagreement (%)"), (right, "KL (nats)")):
        name_rows(axes, shown)
        axes.set_xlabel(label)
        axes.margins(x=0.25)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=3)


def _bar(axes: Axes, row: int, mean: float, deviation: float, colour: str, text: str) -> None:
    axes.barh(row, mean, height=0.56, color=colour, alpha=0.85)
    axes.plot([mean - deviation, mean + deviation], [row, row], color=INK, linewidth=1.2)
    end = (mean + deviation, row)
    axes.annotate(text, end, (4, 0), textcoords="offset points", va="center", fontsize=7.5)


def paint_reliability(figure: Figure, *, bins: Sequence[Bin], colour: str) -> None:
    """Draw accuracy against confidence."""
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle=DASHED)
    confidence = [100 * bar.confidence for bar in bins]
    accuracy = [100 * bar.accuracy for bar in bins]
    total = max(1, sum(bar.count for bar in bins))
    sizes = [8 + 90 * bar.count / total for bar in bins]
    axes.vlines(confidence, confidence, accuracy, color=colour, alpha=0.35, linewidth=3)
    axes.plot(confidence, accuracy, color=colour, linewidth=1.2)
    axes.scatter(confidence, accuracy, s=sizes, color=colour, linewidths=0, zorder=3)
    ticks = [0, 25, 50, 75, 100]
    axes.set(xlim=(0, 103), ylim=(0, 103), xticks=ticks, yticks=ticks, aspect="equal")
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)")
