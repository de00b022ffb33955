"""The plots of a diagnosis, one per panel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..reports.canvas import BLUE, DASHED, GREY, INK, OTHERS, Plot, draw, name_rows, short
from .knowledge import Diagnosis, Knowledge, Pull
from .limits import Limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 4.2  # inches
TERMS = {
    "universe": ("smoothing, the same everywhere", GREY),
    "class_difficulty": ("class difficulty", OTHERS[3]),
    "class_relations": ("class relations", OTHERS[0]),
    "instance_confidence": ("instance confidence", OTHERS[4]),
    "instance_relations": ("instance relations", BLUE),
}
"""Label and colour of each term: grey for the universe, warm colours for classes, blue ones for rows."""
LIGHT = (OTHERS[3], OTHERS[4])
"""Colours too light for white text."""
MOST_NAMES = 30
"""Largest number of classes whose names fit next to a heat map."""
MOST_CELLS = 12
"""Largest number of classes whose figures fit into the cells."""


def shares(columns: Mapping[str, Knowledge]) -> Plot:
    """Plot the five terms as shares of each teacher's departure from the labels."""
    values = "; ".join(
        f"{name}: "
        + ", ".join(f"{TERMS[term][0]} {share:.0%}" for term, share in knowledge.terms.shares.items())
        for name, knowledge in columns.items()
    )
    size = (2 * WIDE, 1.3 + 0.36 * len(columns))
    return draw(
        "shares", "", f"Shares of the terms. {values}.", size, partial(_paint_shares, columns=columns)
    )


def _paint_shares(figure: Figure, *, columns: Mapping[str, Knowledge]) -> None:
    axes = figure.subplots()
    for row, knowledge in enumerate(columns.values()):
        left = 0.0
        for term, share in knowledge.terms.shares.items():
            label = TERMS[term][0] if row == 0 else None
            axes.barh(row, share, left=left, height=0.62, color=TERMS[term][1], label=label)
            if share >= 0.05:
                colour = INK if TERMS[term][1] in LIGHT else "white"
                axes.text(left + share / 2, row, f"{share:.0%}", color=colour, ha="center", va="center")
            left += share
        axes.text(1.01, row, f"{knowledge.departure:.2g}", va="center", color=INK)
    axes.text(1.01, -0.75, "total", va="center", color=INK)
    name_rows(axes, columns)
    axes.set(xlim=(0, 1), xticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)


def relations(name: str, title: str, knowledge: Knowledge, classes: Sequence[str]) -> Plot:
    """Plot the matrix R as a heat map; more than `MOST_NAMES` classes are ordered by clustering."""
    pairs = ", ".join(f"{a} as {b} {share:.0%}" for a, b, share in strongest(knowledge, classes, 5))
    side = WIDE if len(classes) <= MOST_NAMES else 1.4 * WIDE
    paint = partial(_paint_relations, relations=knowledge.relations, classes=classes)
    return draw(name, title, f"Class relations. Strongest: {pairs}.", (side, 0.92 * side), paint)


def strongest(knowledge: Knowledge, classes: Sequence[str], count: int) -> list[tuple[str, str, float]]:
    """Return the largest relations as ``(class, wrong class, share)``, in descending order."""
    flat = knowledge.relations.flatten()
    top = flat.topk(min(count, flat.numel()))
    size = len(classes)
    return [
        (classes[index // size], classes[index % size], share)
        for index, share in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        if share > 0
    ]


def _paint_relations(figure: Figure, *, relations: Tensor, classes: Sequence[str]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    values, names = relations.cpu().numpy(), list(classes)
    if len(names) > MOST_NAMES:
        order = _clustered_order(values)
        values = values[np.ix_(order, order)]
    axes = figure.subplots()
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=values.max() or 1, aspect="auto")
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10])
    percent = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, ticks=ticks, format=percent)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    if len(names) <= MOST_NAMES:
        labels = [short(name, 14) for name in names]
        slanted = max(map(len, labels)) > 2
        axes.set_xticks(
            range(len(names)), labels, rotation=60 if slanted else 0, ha="right" if slanted else "center"
        )
        axes.set_yticks(range(len(names)), labels)
    else:
        axes.set(xticks=[], yticks=[])
    if len(names) <= MOST_CELLS:
        for row, column in np.argwhere(values >= 0.005):
            share = values[row, column]
            colour = "white" if share > 0.6 * values.max() else INK
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7)
    axes.set(xlabel="wrong class, its share in %", ylabel="label of the row")


def _clustered_order(relations: np.ndarray) -> np.ndarray:
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    near = (relations + relations.T) / 2
    distance = near.max() - near
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False), method="average"))


def confidence(splits: Mapping[str, Diagnosis]) -> Plot:
    """Plot the distribution of the label's probability over the rows."""
    values = {name: split.teacher.label_probabilities for name, split in splits.items()}
    means = ", ".join(f"{name} {split.teacher.missing:.1%}" for name, split in splits.items())
    alt = f"Histogram of the label's probability; mean probability of wrong classes: {means}."
    paint = partial(_paint_histogram, values=values, low=0.0, high=1.0, label="probability of the label")
    return draw("confidence", "Confidence", alt, (WIDE, 2.6), paint)


def weights(columns: Mapping[str, Pull]) -> Plot:
    """Plot the distribution of the gradient weights over the rows."""
    all_weights = np.concatenate([pull.weights.cpu().numpy() for pull in columns.values()])
    low, high = np.quantile(all_weights, [0.005, 0.995])
    margin = 0.05 * (high - low) or 0.05
    means = ", ".join(
        f"{name} mean {pull.weights.mean():.3f}, {pull.negative:.1%} negative"
        for name, pull in columns.items()
    )
    values = {name: pull.weights for name, pull in columns.items()}
    paint = partial(
        _paint_histogram, values=values, low=low - margin, high=high + margin, label="weight of the row"
    )
    return draw("weights", "Gradient weights", f"Histogram of the weights: {means}.", (WIDE, 2.6), paint)


def _paint_histogram(
    figure: Figure, *, values: Mapping[str, Tensor], low: float, high: float, label: str
) -> None:
    axes = figure.subplots()
    edges = np.linspace(low, high, 41)
    for (name, numbers), colour in zip(values.items(), (BLUE, OTHERS[0], GREY), strict=False):
        inside = np.clip(numbers.cpu().numpy(), low, high)
        counts, _ = np.histogram(inside, edges)
        share = 100 * counts / len(inside)
        axes.stairs(share, edges, color=colour, fill=True, alpha=0.2)
        axes.stairs(share, edges, color=colour, label=name, linewidth=1.3)
    axes.set(xlabel=label, ylabel="rows (%)", xlim=(low, high))
    axes.set_ylim(bottom=0)
    if low < 0 < high:
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=DASHED)
    axes.legend(frameon=False)
    axes.grid(axis="x", visible=False)


def gradients(pull: Pull) -> Plot:
    """Plot the norm of each part of the gradient and its cosine with the gradient of cross-entropy."""
    norms = ", ".join(f"{name} {norm:.3f}" for name, norm in pull.norms.items())
    size = (WIDE, 2.6)
    return draw(
        "gradients", "Gradient by part", f"Mean norms: {norms}.", size, partial(_paint_gradients, pull=pull)
    )


def _paint_gradients(figure: Figure, *, pull: Pull) -> None:
    axes = figure.subplots()
    colours = (INK, GREY, OTHERS[0], BLUE)
    for row, ((name, norm), colour) in enumerate(zip(pull.norms.items(), colours, strict=True)):
        axes.barh(row, norm, height=0.56, color=colour, alpha=0.85)
        cosine = pull.cosines.get(name)
        text = f"{norm:.3f}" + ("" if cosine is None else f", cosine {cosine:+.2f}".replace("-", "−"))
        axes.annotate(text, (norm, row), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    name_rows(axes, [name.replace("_", "-") for name in pull.norms])
    axes.set_xlim(0, 1.6 * max(*pull.norms.values(), 1e-12))
    axes.set_xlabel("mean norm over the rows")
    axes.locator_params(axis="x", nbins=5)


def over_temperatures(sweep: Sequence[Diagnosis], chosen: float) -> list[Plot]:
    """Plot the shares of the terms and the strength of each level over temperatures."""
    values = "; ".join(
        f"T = {point.temperature:g}: universe {point.teacher.terms.shares['universe']:.0%}" for point in sweep
    )
    lines = {
        "wrong classes": ([point.teacher.missing for point in sweep], GREY),
        "relations": ([point.teacher.relation_share for point in sweep], OTHERS[0]),
        "weights": ([point.teacher.fresh_weight_spread for point in sweep], BLUE),
    }
    at = [point.temperature for point in sweep]
    return [
        draw(
            "sweep-shares",
            "Shares of the terms",
            f"Shares of the terms over temperatures. {values}.",
            (WIDE, 2.6),
            partial(_paint_sweep, sweep=sweep, chosen=chosen),
        ),
        draw(
            "sweep-lines",
            "Strength of each level",
            "Over temperatures, from the first to the last: "
            + "; ".join(f"{name} {line[0]:.3f} to {line[-1]:.3f}" for name, (line, _) in lines.items()),
            (WIDE, 2.6),
            partial(_paint_lines, at=at, lines=lines, chosen=chosen, label="strength (no unit)"),
        ),
    ]


def limit(limits: Limits) -> list[Plot]:
    """Plot KD over temperatures with its limit and logit matching, and the cosines of their gradients."""
    at = [point.temperature for point in limits.sweep]
    values = {
        "KD": ([point.kd for point in limits.sweep], BLUE),
        "limit": ([limits.limit] * len(at), OTHERS[1]),
        "logit matching": ([limits.matching] * len(at), OTHERS[0]),
    }
    cosines = {
        "limit": ([_number(point.cosine_limit) for point in limits.sweep], OTHERS[1]),
        "logit matching": ([_number(point.cosine_matching) for point in limits.sweep], OTHERS[0]),
    }
    losses = ", ".join(f"{point.kd:.3g} at T = {point.temperature:g}" for point in limits.sweep)
    return [
        draw(
            "limit-values",
            "The loss",
            f"KD {losses}; limit {limits.limit:.3g}, logit matching {limits.matching:.3g}.",
            (WIDE, 2.6),
            partial(_paint_lines, at=at, lines=values, chosen=limits.chosen.temperature, label="loss (nats)"),
        ),
        draw(
            "limit-cosines",
            "Cosine of KD's gradient with that of",
            "Cosine of KD's gradient with the limit's and with logit matching's, over temperatures: "
            + ", ".join(f"{c:.3f} at T = {t:g}" for t, c in zip(at, cosines["limit"][0], strict=True)),
            (WIDE, 2.6),
            partial(_paint_lines, at=at, lines=cosines, chosen=limits.chosen.temperature, label="cosine"),
        ),
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _paint_sweep(figure: Figure, *, sweep: Sequence[Diagnosis], chosen: float) -> None:
    axes = figure.subplots()
    at = [point.temperature for point in sweep]
    heights = [[point.teacher.terms.shares[term] for point in sweep] for term in TERMS]
    axes.stackplot(at, heights, colors=[colour for _, colour in TERMS.values()], linewidth=0)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _temperature_axis(axes, at, chosen, "white")


def _paint_lines(
    figure: Figure,
    *,
    at: Sequence[float],
    lines: Mapping[str, tuple[Sequence[float], str]],
    chosen: float,
    label: str,
) -> None:
    axes = figure.subplots()
    for index, (name, (values, colour)) in enumerate(lines.items()):
        level = len(set(values)) == 1
        axes.plot(
            at,
            values,
            color=colour,
            label=name,
            linewidth=1.5,
            linestyle=DASHED if level else "-",
            zorder=3 - index,
        )
    axes.set_ylabel(label)
    figure.legend(loc="outside upper center", ncols=len(lines), frameon=False)  # inside, lines would cross it
    _temperature_axis(axes, at, chosen, INK)


def _temperature_axis(axes: Axes, at: Sequence[float], chosen: float, colour: str) -> None:
    axes.set_xscale("log", base=2)
    ticks = [value for value in at if math.log2(value) % (2 if max(at) > 64 else 1) == 0]
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(at), max(at))
    axes.set_xlabel("temperature")
    if min(at) <= chosen <= max(at):
        axes.axvline(chosen, color=colour, linewidth=1.2, linestyle=DASHED)
