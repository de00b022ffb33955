"""Tables of figures for the terminal, Markdown and HTML."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .runs import Comparison, Run
from .statistics import SettingSummary, Spread, number, signed, summarise

if TYPE_CHECKING:
    import rich.console

NOTHING = "–"


@dataclass(frozen=True)
class Section:
    """The rows of one setting, each as long as the headers."""

    label: str
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Table:
    """Formatted text; the first column names the rows, the others hold figures."""

    headers: tuple[str, ...]
    sections: tuple[Section, ...]
    note: str


def table(source: Run | Comparison) -> Table:
    """Return the figures of a run or a comparison, in the units that the headers name."""
    return _run_table(source) if isinstance(source, Run) else _comparison_table(source)


def terminal_table(source: Run | Comparison | Table) -> rich.console.Group:
    """Return the table for ``rich.print``, one per setting with the same columns."""
    import rich.box
    from rich.console import Group
    from rich.table import Table as Grid
    from rich.text import Text

    content = source if isinstance(source, Table) else table(source)
    columns = zip(*(map(_tight, row) for section in content.sections for row in section.rows), strict=True)
    # Wrapping headers keeps the table within 80 characters: a column is as wide as its widest cell.
    widths = [max(5, *map(len, cells)) for cells in columns]
    parts: list[Grid | Text] = []
    for section in content.sections:
        grid = Grid(box=rich.box.SIMPLE_HEAD, show_edge=False, padding=0)
        for header, width in zip(content.headers, widths, strict=True):
            # `Text`, here and below, because a plain string "[bold]" would be read as markup.
            wrapped = Text(textwrap.fill(header, width, break_long_words=False))
            justify: Literal["left", "right"] = "right" if grid.columns else "left"
            grid.add_column(wrapped, justify=justify, vertical="bottom")
        for row in section.rows:
            grid.add_row(*(Text(_tight(cell)) for cell in row))
        if section.label:
            parts.append(Text(f"{section.label}\n", style="bold"))
        parts += [grid, Text()]
    return Group(*parts, Text(content.note, style="dim"))


def _tight(cell: str) -> str:
    return cell.replace("\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}", "±").replace(",\N{NO-BREAK SPACE}", ",")


def markdown_table(source: Run | Comparison) -> str:
    """Return the table in GitHub's Markdown, one per setting under its own heading."""
    content = table(source)
    rule = "| :-- |" + " --: |" * (len(content.headers) - 1)
    parts = []
    for section in content.sections:
        lines = [_markdown_row(content.headers), rule, *map(_markdown_row, section.rows)]
        heading = [f"### {section.label}", ""] if section.label else []
        parts.append("\n".join([*heading, *lines]))
    return "\n\n".join([*parts, content.note.replace("*", r"\*")]).strip() + "\n"


def _markdown_row(cells: tuple[str, ...]) -> str:
    escaped = (cell.replace("|", r"\|").replace("*", r"\*") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _comparison_table(comparison: Comparison) -> Table:
    last, best = summarise(comparison), summarise(comparison, at="best")
    sections = []
    for at_last, at_best in zip(last.settings, best.settings, strict=True):
        rows = [_method_row(method, at_last, at_best, comparison.baseline) for method in at_last.spreads]
        teacher = comparison.teacher_accuracy(at_last.setting.name)
        if teacher is not None:
            rows.insert(0, ("teacher", number(teacher), *[NOTHING] * 8))
        sections.append(Section(at_last.setting.label, tuple(rows)))
    return Table(
        headers=(
            "method",
            "last epoch %",
            "best epoch %",
            f"points over {comparison.baseline} [95% interval]",
            "agree %",
            "KL nats",
            "rank τ",
            "top-k %",
            "ECE %",
            "runs",
        ),
        sections=tuple(sections),
        note=(
            "Test accuracy at the last and the best epoch, mean ± sample standard deviation over seeds; all "
            "other columns are at the last epoch. Differences are paired by seed, with Student's t intervals "
            "one comparison at a time. * is beyond noise: p < 0.05 after Holm's correction for all "
            "comparisons of the setting (each method with the baseline, PLD with each method). With the "
            "teacher: agreement of the predicted class, KL divergence from it, Kendall's τ and overlap of "
            "the top k. ECE is the expected calibration error."
        ),
    )


def _method_row(method: str, last: SettingSummary, best: SettingSummary, baseline: str) -> tuple[str, ...]:
    spreads = last.spreads[method]
    return (
        method,
        _percent(spreads["accuracy"]),
        number(best.accuracy(method)),
        _difference(last, method, baseline),
        _mean(spreads.get("agreement"), percent=True),
        _mean(spreads.get("kl")),
        _mean(spreads.get("kendall_tau")),
        _mean(spreads.get("topk_overlap"), percent=True),
        _mean(spreads["calibration_error"], percent=True),
        str(spreads["accuracy"].count),
    )


def _percent(spread: Spread) -> str:
    # No-break spaces keep a cell on one line.
    deviation = (
        "" if spread.deviation is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{number(spread.deviation)}"
    )
    return number(spread.mean) + deviation


def _mean(spread: Spread | None, *, percent: bool = False) -> str:
    if spread is None:
        return NOTHING
    return number(spread.mean) if percent else f"{spread.mean:.3f}".replace("-", "−")


def _difference(summary: SettingSummary, method: str, baseline: str) -> str:
    difference = summary.differences.get((method, baseline))
    if difference is None or not difference.each:
        return NOTHING
    points = signed(difference.mean)
    if difference.low is None or difference.high is None:
        return points
    mark = "*" if difference.beyond_noise else ""
    interval = f"[{number(difference.low)},\N{NO-BREAK SPACE}{number(difference.high)}]"
    return f"{points}{mark}\N{NO-BREAK SPACE}{interval}"


def _run_table(run: Run) -> Table:
    last, best = run.last.test, run.best.test
    rows = [
        ("accuracy %", number(last.accuracy), number(best.accuracy)),
        *((f"accuracy of the {name} %", number(value), NOTHING) for name, value in run.co_trained.items()),
        ("negative log-likelihood, nats", f"{last.nll:.3f}", f"{best.nll:.3f}"),
        ("calibration error (ECE) %", number(last.calibration_error), number(best.calibration_error)),
    ]
    for name, at_last, at_best, percent in (
        ("agreement with the teacher %", last.agreement, best.agreement, True),
        ("KL divergence, nats", last.kl, best.kl, False),
        ("Kendall's τ with the teacher", last.kendall_tau, best.kendall_tau, False),
        ("top-k overlap with the teacher %", last.topk_overlap, best.topk_overlap, True),
        ("τ within the teacher's first tenth", last.kendall_tau_top, best.kendall_tau_top, False),
        ("τ within the teacher's last tenth", last.kendall_tau_bottom, best.kendall_tau_bottom, False),
        ("KL gradient on the first tenth %", last.kl_gradient_top, best.kl_gradient_top, True),
        ("KL gradient on the last tenth %", last.kl_gradient_bottom, best.kl_gradient_bottom, True),
    ):
        if at_last is not None:
            rows.append((name, _figure(at_last, percent), _figure(at_best, percent)))
    return Table(
        headers=("test set", f"last epoch ({run.last.epoch})", f"best epoch ({run.best.epoch})"),
        sections=(Section("", tuple(rows)),),
        note=f"The best epoch was chosen by: {run.selection}.",
    )


def _figure(value: float | None, percent: bool) -> str:
    if value is None:
        return NOTHING
    return number(value) if percent else f"{value:.3f}".replace("-", "−")
