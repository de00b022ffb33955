"""Results as tables and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write, write_text
from .results import Record, read_latest

if TYPE_CHECKING:
    import rich.console
    from matplotlib.axes import Axes

PLOT = "ratios.png"
NOTHING = "–"
MARKS = {"aim reached": " ★", "met": " ✓", "missed": " ✗", "not measured": " ?"}
NOTE = """A ratio is a baseline's time over the candidate's in the same round, on the same inputs, in one
process: above 1 the candidate is faster. Medians, with the 20th and the 80th percentile in brackets. Except
for softmax and overhead, which are forward only, a step is forward and backward through autograd, outputs
allocated anew. Memory is the peak beyond the inputs in arrays of N x C, scratch of native code included, for
cases with at least 8 MB of logits. Copy is what a large copy reads and writes per second in the same run."""


def duration(seconds: float) -> str:
    """
    Example:
        >>> duration(2.5), duration(0.0123), duration(45e-6)
        ('2.5 s', '12.3 ms', '45 µs')
    """
    # 999.7 µs are 1 ms: three digits are shown.
    unit, factor = ("s", 1) if seconds >= 0.9995 else ("ms", 1e3) if seconds >= 0.9995e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def goal(found: dict[str, Any]) -> str:
    """The verdict on a goal, what came, and what was asked for."""
    came = "" if found["value"] is None else f" {found['value']:.2f}"
    return f"{found['verdict']}{came} ({found['text']})"


def table(records: Sequence[Record], *, brief: bool) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a group. In `brief`, verdicts are marks behind their figures; else they are words,
    and percentiles, the memory of baselines and ids are there too."""

    def figure(values: dict[str, float] | None, show: Any, mark: str) -> str:
        if values is None:
            return NOTHING
        return show(values["median"]) + (mark or f" [{show(values['p20'])}, {show(values['p80'])}]")

    def arrays(found: Record, mark: str) -> str:
        shown = [f"{name} {value:.2f}" for name, value in found["memory"].items()][: 1 if brief else None]
        return ", ".join(shown).removeprefix(f"{found['candidate']} ") + mark if shown else NOTHING

    baselines = list(dict.fromkeys(name for found in records for name in found["ratios"]))
    over = [f"over {name.removeprefix('softmax ')}" for name in baselines]
    headers = ["case", "threads", "time", *over, "memory", *([] if brief else ["goals", "row"])]
    rows = []
    for found in records:
        words = {(g["measure"], g["against"]): g["verdict"] for g in found["goals"]}
        marks = {key: MARKS[word] for key, word in words.items()} if brief else {}
        of_time = next((mark for (measure, _), mark in marks.items() if measure == "microseconds"), "  ")
        row = [
            found["case"].removeprefix(f"{found['group']}/"),
            str(found["threads"]),
            figure(found["seconds"].get(found["candidate"]), duration, of_time if brief else ""),
        ]
        for name in baselines:
            mark = marks.get(("speed", name), "  ") if brief else ""
            row.append(figure(found["ratios"].get(name), "{:.2f}".format, mark))
        row.append(arrays(found, marks.get(("memory", ""), "  ") if brief else ""))
        rows.append(row if brief else [*row, "; ".join(map(goal, found["goals"])) or NOTHING, found["id"]])
    return headers, rows


def failures(records: Sequence[Record]) -> list[str]:
    """Who has no figures, and why, each once."""
    return list(dict.fromkeys(f"{name}: {why}" for f in records for name, why in f["failed"].items()))


def verdict(records: Sequence[Record]) -> list[str]:
    """How many goals are reached, then a line for each that is missed."""
    goals = [(found, g) for found in records for g in found["goals"]]
    count = {word: sum(g["verdict"] == word for _, g in goals) for word in ("aim reached", "met", "missed")}
    unmeasured = len(goals) - sum(count.values())
    return [
        f"{len(goals)} goals: {count['met'] + count['aim reached']} met, {count['aim reached']} of them with "
        f"the aim; {count['missed']} missed, {unmeasured} not measured.",
        *(f"{f['case']}, threads {f['threads']}: {goal(g)}" for f, g in goals if g["verdict"] == "missed"),
    ]


def conditions(records: Sequence[Record]) -> str:
    """Where, when and how quietly, in a few sentences."""
    run = records[0]["run"]
    facts = ", ".join(f"{name} {value}" for name, value in run["environment"].items() if value)
    copies = {f"{found['copy_gbps']:.1f} GB/s (threads {found['threads']})": 0 for found in records}
    load = "unknown" if run["load"] is None else f"{run['load']:.2f}"
    noise = "" if run["quiet"] else " (**not quiet: read ratios with care and times not at all**)"
    return (
        f"{facts}. Copy: {', '.join(copies)}. Load before the run: {load}{noise}. "
        f"Tests of the ops: {run['tests']}."
    )


def terminal(records: Sequence[Record]) -> rich.console.Group:
    """The tables for ``rich.print``."""
    import rich.box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Table | Text] = []
    for group, members in groupby(records, itemgetter("group")):
        shown = list(members)
        headers, rows = table(shown, brief=True)
        grid = Table(box=rich.box.SIMPLE_HEAD, show_edge=False, title=group, title_justify="left", padding=0)
        grid.add_column(headers[0], no_wrap=True, min_width=max(len(row[0]) for row in rows))
        for header in headers[1:]:
            grid.add_column(header.replace("_", " "), justify="right")
        for row in rows:
            grid.add_row(*map(Text, row))
        parts += [grid, *(Text(text, style="dim") for text in failures(shown)), Text()]
    marks = Text(", ".join(f"{mark.strip()} {word}" for word, mark in MARKS.items()), style="dim")
    return Group(*parts, marks, *map(Text, verdict(records)))


def markdown(records: Sequence[Record], file: str) -> str:
    """The page: verdict, conditions, and a table for each group."""
    first, *missed = verdict(records)
    parts = ["# CPU benchmarks", first, "\n".join(f"- {line}" for line in missed), conditions(records), NOTE]
    parts.append(f"![Ratios over all baselines that have a goal]({PLOT})" if _goals_of_speed(records) else "")
    for group, members in groupby(records, itemgetter("group")):
        shown = list(members)
        headers, rows = table(shown, brief=False)
        rule = ["--:" if header.startswith("over ") else ":--" for header in headers]
        parts += [f"## {group}", f"Candidate: {shown[0]['candidate']}."]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in (headers, rule, *rows)))
        parts.append("\n".join(f"- {text}" for text in failures(shown)))
    parts.append(f"A row is a line of `{file}`, which holds all runs; this page shows the last one.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _goals_of_speed(records: Sequence[Record]) -> list[tuple[Record, dict[str, Any]]]:
    return [(f, g) for f in records for g in f["goals"] if g["measure"] == "speed" and g["value"] is not None]


def plot(records: Sequence[Record], path: Path) -> None:
    """Ratios that have a goal, a point for each number of threads, with what they should reach."""
    import matplotlib
    from matplotlib.figure import Figure

    from ..reports.canvas import STYLE

    if not (shown := _goals_of_speed(records)):
        return
    shown.sort(key=lambda pair: (pair[0]["group"], pair[1]["against"]))
    rows = list(dict.fromkeys((found["case"], g["against"]) for found, g in shown))
    style: Any = STYLE
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 1.2 + 0.19 * len(rows)), layout="constrained")
        _paint(figure.subplots(), shown, rows)
        write(path, lambda aside: figure.savefig(aside, format="png", dpi=130))


def _paint(axes: Axes, shown: Sequence[tuple[Record, dict[str, Any]]], rows: list[tuple[str, str]]) -> None:
    from ..reports.canvas import BLUE, GREY, INK, OTHERS

    counts = sorted({found["threads"] for found, _ in shown})
    colours = dict(zip(counts, (BLUE, *OTHERS) * len(counts), strict=False))
    for count, colour in colours.items():
        axes.plot([], [], "o", markersize=4, color=colour, label=f"{count} thread{'s' * (count > 1)}")
    for found, g in shown:
        row, colour = rows.index((found["case"], g["against"])), colours[found["threads"]]
        height = row + 0.25 * (counts.index(found["threads"]) - (len(counts) - 1) / 2)
        spread = found["ratios"][g["against"]]
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
    """``README.md`` and the plot beside the results in `path`, of the run that was added last."""
    records = read_latest(path)
    write_text(path.with_name("README.md"), markdown(records, path.name))
    plot(records, path.with_name(PLOT))
