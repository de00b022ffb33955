"""The report of a diagnosis: complete, plain, and the same in every form."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
import torch

from luce.analysis import diagnose, limits, page, plots
from luce.reports import terminal_table
from luce.reports.runs import Bin


def report(
    classes: int = 4, *, held_out: bool = True, factor: float = 1.0, noise: float = 1.0
) -> page.DiagnosisReport:
    random = torch.Generator().manual_seed(0)
    target = torch.arange(10 * classes) % classes
    teacher, student = torch.randn(2, len(target), classes, generator=random)
    teacher = factor * (noise * teacher + 3 * torch.nn.functional.one_hot(target, classes))
    found = diagnose(teacher, target, temperature=2.0, student_logits=student)
    return page.DiagnosisReport(
        teacher="runs/<b>teacher</b>",
        data="toy",
        classes=tuple(f"class {index} & <co>" for index in range(classes)),
        student="a student",
        train=found,
        held_out=found if held_out else None,
        held_out_rows="validation rows",
        sweep=tuple(diagnose(teacher, target, temperature=t, references=False) for t in (0.5, 1.0, 2.0, 8.0)),
        limits=limits(student, teacher, temperature=2.0),
        suggested_temperature=3.25,
        reliability={"training": [Bin(0.5, 0.4, 3), Bin(0.9, 1.0, 20)]},
        command="luce diagnose teacher toy",
        facts=(("luce", "1"),),
    )


def html(found: page.DiagnosisReport, tmp_path: Path) -> str:
    text = page.write_html(found, tmp_path / "diagnose.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["diagnose.html"]  # nothing is left beside it
    return text


def test_the_page_tells_everything_and_needs_nothing(tmp_path: Path) -> None:
    found = report()
    text = html(found, tmp_path)
    for heading in (
        "Knowledge beyond the labels",
        "Class relations",
        "Calibration",
        "Effect on a student",
        "Knowledge over temperatures",
        "Between KD and logit matching",
    ):
        assert heading in text
    assert "<b>teacher</b>" not in text
    assert "<co>" not in text
    assert "luce diagnose teacher toy" in text
    assert "Suggested teacher temperature for PLD: 3.25;" in text
    # shares, two heat maps, a reliability plot, three on the student, two sweeps, two of the limit
    assert len(re.findall(r'<svg [^>]*role="img" aria-label="[^"]{20,}', text)) == 11
    assert not re.search(r"<script|@import|url\((?!#)|(src|href)=\"(?!#|data:)", text)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    for sentence in page.answers(found):
        assert sentence in unescape(text)


def test_findings_are_on_the_page(tmp_path: Path) -> None:
    found = report(factor=0.01)
    assert len(found.findings) == 2
    text = html(found, tmp_path)
    assert all(finding.title in text for finding in found.findings)
    assert [finding["title"] for finding in page.as_json(found)["findings"]] == [
        f.title for f in found.findings
    ]


@pytest.mark.parametrize(("classes", "held_out"), [(2, False), (13, True), (40, False)])
def test_any_number_of_classes_with_or_without_held_out_rows(
    classes: int, held_out: bool, tmp_path: Path
) -> None:
    found = report(classes, held_out=held_out)
    text = html(found, tmp_path)
    assert ("Classes are ordered by similarity" in text) == (classes > plots.MOST_NAMES)
    assert ("held out" in page.table(found).headers) == held_out
    content = json.loads(json.dumps(page.as_json(found), allow_nan=False))
    assert (content["held_out"] is None) == (not held_out)
    assert len(content["training"]["teacher"]["relations"]) == classes


def test_a_teacher_that_only_repeats_the_labels(tmp_path: Path) -> None:
    """Nothing to divide by anywhere."""
    found = report(factor=1e5, noise=0.1)
    assert found.train.teacher.departure == 0
    html(found, tmp_path)
    json.dumps(page.as_json(found), allow_nan=False)
    assert page.strongest(found) == "none"
    assert ">100%<" in plots.relations("r", "", found.train.teacher, found.classes).svg  # no scale of 1e-10


def test_table_and_json_say_the_same() -> None:
    found = report()
    table, content = page.table(found), page.as_json(found)
    assert table.headers == ("", "training", "held out", "label smoothing", "class_mean", "true_prob")
    rows = {row[0]: row[1:] for section in table.sections for row in section.rows}
    assert all(len(row) == 5 for row in rows.values())
    training = content["training"]
    assert rows["total"][0] == f"{training['teacher']['departure']:.4f}"
    assert rows["smoothing (universe) %"][2] == "100.0"
    assert rows["class relations %"][4] == rows["instance relations %"][4] == "0.0"
    mean = training["references"]["class_mean"]["pull"]["mean"]
    assert rows["weight, mean"][3] == f"{mean:.3f}"
    assert training["teacher"]["shares"] == pytest.approx(found.train.teacher.terms.shares, rel=1e-5)
    assert content["limits"]["chosen"]["temperature"] == 2
    assert [point["temperature"] for point in content["over_temperatures"]] == [0.5, 1, 2, 8]


def test_the_table_fits_a_terminal() -> None:
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as capture:
        console.print(terminal_table(page.table(report())))
    assert max(map(len, capture.get().splitlines())) <= 80
    assert "…" not in capture.get()


def test_strongest_relations_are_named() -> None:
    found = report()
    flat = found.train.teacher.relations
    row, column = divmod(int(flat.argmax()), 4)
    assert page.strongest(found, 1).startswith(
        f"class {row} & <co> as class {column} & <co> {100 * flat.max():.1f}%"
    )
