"""Tables and a plot of a run's records."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results import Record, read_latest, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = "ratios.png"
NOTHING = "–"
MARKS = {"aim reached": " ★", "met": " ✓", "missed": " ✗", "not measured": " ?"}
NOTE = """A ratio is a baseline's time over the candidate's in the same round, on the same inputs, in one
process: above 1 the candidate is faster. Medians, with the 20th and the 80th percentile in brackets. Except
for softmax and overhead, which are forward only, a step is forward and backward through autograd, outputs
allocated anew. Memory is the peak beyond the inputs in arrays of N x C, scratch of native code included; on a
CPU for cases with at least 8 MB of logits. Copy is what a large copy reads and writes per second."""


def duration(seconds: float) -> str:
    """
    Example:
        >>> duration(2.5), duration(0.0123), duration(45e-6)
        ('2.5 s', '12.3 ms', '45 µs')
    """
    # 999.7 µs are 1 ms: three digits are shown.
    unit, factor = ("s", 1) if seconds >= 0.9995 else ("ms", 1e3) if seconds >= 0.9995e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def goal(judged: dict[str, Any]) -> str:
    """Return the verdict on a goal, its value and its bounds."""
    value = "" if judged["value"] is None else f" {_short(judged['value'])}"
    return f"{judged['verdict']}{value} ({judged['text']})"


def _short(value: float) -> str:
    return f"{value:.0e}" if 0 < abs(value) < 1e-3 else f"{value:.2f}"


def table(records: Sequence[Record], *, brief: bool) -> tuple[list[str], list[list[str]]]:
    """Return the headers and rows of a group.

    In `brief`, verdicts are marks behind their figures; otherwise they are spelled out, with percentiles, the
    memory of the baselines and the rows' ids.
    """

    def figure(values: dict[str, float] | None, show: Any, mark: str) -> str:
        if values is None:
            return NOTHING
        return show(values["median"]) + (mark or f" [{show(values['p20'])}, {show(values['p80'])}]")

    def arrays(record: Record, mark: str) -> str:
        shown = [f"{name} {value:.2f}" for name, value in record["memory"].items()][: 1 if brief else None]
        return ", ".join(shown).removeprefix(f"{record['candidate']} ") + mark if shown else NOTHING

    baselines = list(dict.fromkeys(name for record in records for name in record["ratios"]))
    gpu = records[0]["device"] == "gpu"
    over = [f"over {name.removeprefix('softmax ')}" for name in baselines]
    first = ["case", "time", "of copy", "errors"] if gpu else ["case", "threads", "time"]
    headers = [*first, *over, "memory", *([] if brief else ["goals", "row"])]
    rows = []
    for record in records:
        verdicts = {(g["measure"], g["against"]): g["verdict"] for g in record["goals"]}
        marks = {key: MARKS[verdict] for key, verdict in verdicts.items()} if brief else {}

        def mark_of(measure: str, against: str = "", *, marks: dict[Any, str] = marks) -> str:
            return marks.get((measure, against), "  ") if brief else ""

        row = [record["case"].removeprefix(f"{record['group']}/"), *([] if gpu else [str(record["threads"])])]
        row.append(figure(record["seconds"].get(record["candidate"]), duration, mark_of("microseconds")))
        if gpu:
            share, errors = record["copy_share"], record["errors"]
            row.append(NOTHING if share is None else f"{share:.2f}{mark_of('copy')}")
            shown = [f"{errors[name]:.0e}{mark_of(name)}" for name in errors]
            row.append(", ".join(shown) or NOTHING)
        for name in baselines:
            row.append(figure(record["ratios"].get(name), "{:.2f}".format, mark_of("speed", name)))
        against = next((g["against"] for g in record["goals"] if g["measure"] == "memory"), "")
        row.append(arrays(record, mark_of("memory", against)))
        rows.append(row if brief else [*row, "; ".join(map(goal, record["goals"])) or NOTHING, record["id"]])
    return headers, rows


def failures(records: Sequence[Record]) -> list[str]:
    """Return the steps without figures, each with its reason, once."""
    return list(dict.fromkeys(f"{name}: {why}" for r in records for name, why in r["failed"].items()))


def verdict(records: Sequence[Record]) -> list[str]:
    """Return how many goals are reached, then a line for each that is missed."""
    goals = [(record, g) for record in records for g in record["goals"]]
    count = {word: sum(g["verdict"] == word for _, g in goals) for word in ("aim reached", "met", "missed")}
    unmeasured = len(goals) - sum(count.values())
    return [
        f"{len(goals)} goals: {count['met'] + count['aim reached']} met, {count['aim reached']} of them with "
        f"the aim; {count['missed']} missed, {unmeasured} not measured.",
        *(f"{_named(r)}: {goal(g)}" for r, g in goals if g["verdict"] == "missed"),
    ]


def _named(record: Record) -> str:
    return record["case"] if record["device"] == "gpu" else f"{record['case']}, threads {record['threads']}"


def conditions(records: Sequence[Record]) -> str:
    """Return the machine, the versions and the load in a few sentences."""
    run = records[0]["run"]
    facts = ", ".join(f"{name} {value}" for name, value in run["environment"].items() if value)
    copies = {f"{record['copy_gbps']:.1f} GB/s (threads {record['threads']})": 0 for record in records}
    load = "unknown" if run["load"] is None else f"{run['load']:.2f}"
    noise = "" if run["quiet"] else " (**not quiet: read ratios with care and times not at all**)"
    return f"{facts}. Copy: {', '.join(copies)}. Load before the run: {load}{noise}. Tests: {run['tests']}."


def text(records: Sequence[Record]) -> str:
    """Return the tables for a terminal."""
    parts = []
    for group, members in groupby(records, itemgetter("group")):
        shown = list(members)
        headers, rows = table(shown, brief=True)
        cells = [headers, *rows]
        widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
        lines = [
            "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in
                      enumerate(zip(row, widths, strict=True))).rstrip()
            for row in cells
        ]  # fmt: skip
        parts.append("\n".join([group, *lines, *failures(shown)]))
    marks = ", ".join(f"{mark.strip()} {meaning}" for meaning, mark in MARKS.items())
    return "\n\n".join([*parts, marks, "\n".join(verdict(records))])


def markdown(records: Sequence[Record], file: str) -> str:
    """Return the page: verdict, conditions, and a table for each group."""
    first, *missed = verdict(records)
    device = "GPU" if records[0]["device"] == "gpu" else "CPU"
    parts = [
        f"# {device} benchmarks",
        first,
        "\n".join(f"- {line}" for line in missed),
        conditions(records),
        NOTE,
    ]
    parts.append(f"![Ratios over all baselines that have a goal]({PLOT})" if _goals_of_speed(records) else "")
    for group, members in groupby(records, itemgetter("group")):
        shown = list(members)
        headers, rows = table(shown, brief=False)
        rule = ["--:" if header.startswith("over ") else ":--" for header in headers]
        parts += [f"## {group}", f"Candidate: {shown[0]['candidate']}."]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in (headers, rule, *rows)))
        parts.append("\n".join(f"- {line}" for line in failures(shown)))
    parts.append(f"A row is a line of `{file}`, which holds all runs; this page shows the last one.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _goals_of_speed(records: Sequence[Record]) -> list[tuple[Record, dict[str, Any]]]:
    return [(r, g) for r in records for g in r["goals"] if g["measure"] == "speed" and g["value"] is not None]


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw the ratios that have a goal, a point for each number of threads, with their bounds."""
    import matplotlib
    from matplotlib.figure import Figure

    from luce.reports.canvas import STYLE

    from .pictures import save_picture

    shown = sorted(_goals_of_speed(records), key=lambda pair: (pair[0]["group"], pair[1]["against"]))
    rows = list(dict.fromkeys((record["case"], g["against"]) for record, g in shown))
    style: Any = STYLE
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 1.2 + 0.19 * len(rows)), layout="constrained")
        _paint(figure.subplots(), shown, rows)
        save_picture(figure, path, dpi=130)


def _paint(axes: Axes, shown: Sequence[tuple[Record, dict[str, Any]]], rows: list[tuple[str, str]]) -> None:
    from luce.reports.canvas import BLUE, GREY, INK, OTHERS

    counts = sorted({record["threads"] for record, _ in shown})
    colours = dict(zip(counts, (BLUE, *OTHERS) * len(counts), strict=False))
    for count, colour in colours.items():
        axes.plot([], [], "o", markersize=4, color=colour, label=f"{count} thread{'s' * (count > 1)}")
    for record, g in shown:
        row, colour = rows.index((record["case"], g["against"])), colours[record["threads"]]
        height = row + 0.25 * (counts.index(record["threads"]) - (len(counts) - 1) / 2)
        spread = record["ratios"][g["against"]]
        face = "white" if g["verdict"] == "missed" else colour
        axes.vlines(g["least"], row - 0.4, row + 0.4, color=INK, linewidth=1.6)
        axes.vlines(g["aim"], row - 0.4, row + 0.4, color=GREY, linewidth=1, linestyle=(0, (2, 1.5)))
        axes.hlines(height, spread["p20"], spread["p80"], color=colour, linewidth=1)
        axes.plot(spread["median"], height, "o", markersize=4, color=colour, markerfacecolor=face)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks([x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= x <= high])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("times faster; bar: at least, dashes: aim\nhollow: missed, line: 20th to 80th percentile")
    axes.set_yticks(range(len(rows)), [f"{case} over {against}" for case, against in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(counts), frameon=False)


def write_pages(path: Path) -> None:
    """Write ``README.md`` and the plot beside the results in `path`, of the run that was added last.

    Where Matplotlib is missing, as on a machine that only measures its GPU, there is no new plot.
    """
    records = read_latest(path)
    write_atomically(path.with_name("README.md"), markdown(records, path.name).encode())
    if _goals_of_speed(records):
        try:
            plot(records, path.with_name(PLOT))
        except ModuleNotFoundError as error:
            print(f"no {PLOT}: {error}")
