"""Tables and the plot."""

from __future__ import annotations

from pathlib import Path

from benchmarks import report, results


def cells(page: str, start: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_shows_goals_and_values(figures) -> None:
    records = [figures(times=4.0), figures(times=1.5, threads=2)]
    page = report.markdown(records, "r.jsonl.gz")
    assert "6 goals: 5 met, 1 of them with the aim; 1 missed, 0 not measured." in page
    assert "- toy/pld/8x16/float32, threads 2: missed 1.50 (eager KD ≥ 2, aim 4)" in page
    assert cells(page, "case") == ["case", "threads", "time", "over eager KD", "memory", "goals", "row"]
    case, threads, time, ratio, memory, goals, row = cells(page, "8x16/float32")
    assert (case, threads, row) == ("8x16/float32", "1", "r-1")
    assert (time, ratio) == ("10 µs [10 µs, 10 µs]", "4.00 [4.00, 4.00]")
    assert memory == "1.25, eager KD 5.00"
    assert goals.split("; ")[:2] == [
        "aim reached 4.00 (eager KD ≥ 2, aim 4)",
        "met 1.25 (memory ≤ 1.5, aim 1)",
    ]
    assert "- scipy: not installed" in page
    assert "Copy: 20.0 GB/s (threads 1), 20.0 GB/s (threads 2). Load before the run: 0.10. Tests" in page
    assert "not quiet" not in page


def test_noise_and_skipped_tests_are_said(figures) -> None:
    run = {"id": "r", "load": None, "quiet": False, "tests": "skipped", "environment": {}}
    page = report.markdown([figures(run="r") | {"run": run}], "r.jsonl.gz")
    assert "Load before the run: unknown (**not quiet" in page
    assert "Tests: skipped." in page


def test_the_terminal_marks_verdicts(figures) -> None:
    text = report.text([figures(times=4.0), figures(times=1.5, threads=2)])
    lines = [line.split() for line in text.splitlines()]
    assert ["8x16/float32", "1", "10", "µs", "✓", "4.00", "★", "1.25", "✓"] in lines
    assert ["8x16/float32", "2", "10", "µs", "✓", "1.50", "✗", "1.25", "✓"] in lines


def test_a_case_that_failed_keeps_its_row(figures) -> None:
    failed = figures(seconds={}, ratios={}, memory={}, goals=[], failed={"PLD": "not in this Luce"})
    page = report.markdown([failed], "r.jsonl.gz")
    assert cells(page, "8x16/float32")[2:5] == ["–", "–", "–"]
    assert "- PLD: not in this Luce" in page
    assert report.PLOT not in page


def test_pages_are_written_beside_the_results(figures, tmp_path: Path) -> None:
    for added in (figures(run="one"), figures(run="two"), figures(run="two", threads=2)):
        results.append(tmp_path / "r.jsonl.gz", added)
    report.write_pages(tmp_path / "r.jsonl.gz")
    assert {path.name for path in tmp_path.iterdir()} == {"r.jsonl.gz", "README.md", report.PLOT}
    page = (tmp_path / "README.md").read_text()
    assert "two-1" in page
    assert "one-1" not in page
    assert (tmp_path / report.PLOT).read_bytes().startswith(b"\x89PNG")


def test_a_round_duration_has_no_exponent() -> None:
    assert [report.duration(s) for s in (0.9996e-3, 0.99951, 0.999e-3)] == ["1 ms", "1 s", "999 µs"]
