"""The same figures in the terminal and in Markdown."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from luce.reports import markdown_table, read_comparison, read_run, terminal_table
from luce.reports.plots import pool
from luce.reports.runs import Bin


def rendered(source, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal_table(source))
    return console.file.getvalue()


@pytest.fixture
def comparison(tmp_path, write_comparison):
    methods = {"cross-entropy": [0.80, 0.82], "PLD": [0.90, 0.91]}
    return read_comparison(write_comparison(tmp_path, {"few": methods, "all": methods}))


def test_markdown_rows_by_hand(comparison):
    lines = markdown_table(comparison).splitlines()
    assert lines[0] == "### few"
    row = next(line for line in lines if line.startswith("| PLD"))
    cells = [cell.strip().replace("\N{NO-BREAK SPACE}", " ") for cell in row.strip("|").split("|")]
    # Accuracies 90 and 91: deviation 1 / sqrt(2). Differences 10 and 9: half their distance 0.5 times t(1).
    # The only comparison, with t = 9.5 / 0.5 and p = 1 - atan(19) * 2 / pi = 0.03: marked.
    deviation, margin = 1 / math.sqrt(2), 12.7062 * 0.5
    assert cells[1] == f"90.5 ± {deviation:.1f}"
    assert cells[3] == rf"+9.5\* [{9.5 - margin:.1f}, {9.5 + margin:.1f}]"
    # Agreement is the accuracy here, KL twice the error, tau and overlap 0.25 and 0.125 less, ECE a quarter.
    assert cells[4:] == ["90.5", "0.190", "0.655", "78.0", "2.4", "2"]
    columns = {line.count("|") for line in lines if line.startswith("|")}
    assert len(columns) == 1


def test_a_run_tells_of_both_ends_of_the_teachers_order_where_they_were_measured(tmp_path, write_run):
    folder = write_run(tmp_path / "run", "PLD", 0, 0.9)
    assert "tenth" not in markdown_table(read_run(folder))
    result = json.loads((folder / "result.json").read_text())
    ends = {
        "kendall_tau_top": 0.5,
        "kendall_tau_bottom": -0.25,
        "kl_gradient_top": 0.8,
        "kl_gradient_bottom": 0.01,
    }
    result["last"]["test"] |= ends
    (folder / "result.json").write_text(json.dumps(result))
    rows = [line for line in markdown_table(read_run(folder)).splitlines() if "tenth" in line]
    assert [row.split("|")[2].strip() for row in rows] == ["0.500", "−0.250", "80.0", "1.0"]
    assert [row.split("|")[3].strip() for row in rows] == ["–"] * 4


def test_networks_that_were_trained_along_stand_below_the_student(tmp_path, write_run):
    folder = write_run(tmp_path / "run", "DML", 0, 0.9)
    assert "peer" not in markdown_table(read_run(folder))
    result = json.loads((folder / "result.json").read_text())
    result["co_trained"] = {"peer": {"test": result["best"]["test"] | {"accuracy": 0.875}}}
    (folder / "result.json").write_text(json.dumps(result))
    rows = [line for line in markdown_table(read_run(folder)).splitlines() if "peer" in line]
    assert [cell.strip() for cell in rows[0].strip("|").split("|")] == ["accuracy of the peer %", "87.5", "–"]


def test_significance_is_marked_and_survives_markdown(tmp_path, write_comparison):
    methods = {"cross-entropy": [0.800, 0.801, 0.802], "PLD": [0.900, 0.902, 0.901]}
    source = read_comparison(write_comparison(tmp_path, {"few": methods}))
    assert r"+10.0\*" in markdown_table(source)
    assert "+10.0*" in rendered(source)


def test_the_terminal_keeps_every_figure_whole_at_80_columns(comparison):
    text = rendered(comparison)
    row = next(line for line in text.splitlines() if line.startswith("PLD"))
    assert row.split() == [
        "PLD",
        "90.5±0.7",
        "90.5",
        "+9.5*",
        "[3.1,15.9]",
        "90.5",
        "0.190",
        "0.655",
        "78.0",
        "2.4",
        "2",
    ]
    assert max(map(len, text.splitlines())) <= 80


def test_names_are_never_markup(tmp_path, write_comparison):
    methods = {"cross-entropy": [0.8], "[bold]a|b*": [0.9]}
    source = read_comparison(write_comparison(tmp_path, {"few": methods}))
    assert "[bold]a|b*" in rendered(source)
    assert r"| [bold]a\|b\* |" in markdown_table(source)


def test_a_single_run_shows_last_and_best(run_folder):
    text = rendered(read_run(run_folder))
    row = next(line for line in text.splitlines() if line.startswith("accuracy"))
    assert row.split() == ["accuracy", "%", "91.0", "93.0"]
    assert "highest validation accuracy" in text


def test_pooled_bars_weigh_by_examples():
    pooled = pool([Bin(0.61, 0.5, 10), Bin(0.65, 0.8, 20), Bin(1.0, 0.9, 5), Bin(0.1, 0.0, 0)])
    assert [bar.count for bar in pooled] == [30, 5]
    assert pooled[0].accuracy == pytest.approx((0.5 * 10 + 0.8 * 20) / 30)
    assert pooled[0].confidence == pytest.approx((0.61 * 10 + 0.65 * 20) / 30)
