"""Generated images with the teacher's answers, and accuracy against queries."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest

from luce.errors import UserError
from luce.reports import plots, write_html
from luce.reports.runs import read_comparison, read_run


def write_samples(folder, images: np.ndarray) -> None:
    content = {
        "shape": list(images.shape),
        "pixels": base64.b64encode(images.astype(np.uint8).tobytes()).decode(),
        "classes": [f"class <{index}>" for index in range(len(images))],
        "confidence": [1 / (index + 1) for index in range(len(images))],
    }
    (folder / "samples.json").write_text(json.dumps(content))


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (14, 3, 5, 9), (3, 2, 4, 4)], ids=str)
def test_samples_are_shown_with_what_the_teacher_said(run_folder, shape) -> None:
    images = np.arange(np.prod(shape)).reshape(shape) % 256
    write_samples(run_folder, images)
    run = read_run(run_folder)
    assert np.array_equal(np.stack([sample.pixels for sample in run.samples]), images)
    (plot,) = plots.samples(run)
    assert plot.svg.count("data:image/png") == len(images)
    assert "class <0> (100.0%)" in plot.alt


def test_the_page_shows_samples_with_escaped_names(run_folder) -> None:
    write_samples(run_folder, np.arange(2 * 64).reshape(2, 1, 8, 8))
    page = write_html(run_folder).read_text()
    assert "Generated images and the teacher&#39;s answers" in page
    assert "class &lt;0&gt;" in page
    assert "class <0>" not in page


def test_a_run_that_made_no_images_shows_none(run_folder) -> None:
    assert plots.samples(read_run(run_folder)) == []
    assert "Generated images and the teacher&#39;s answers" not in write_html(run_folder).read_text()


@pytest.mark.parametrize(
    "change", [{"shape": [2, 1, 8, 8]}, {"pixels": "%"}, {"classes": None}, {"confidence": []}], ids=str
)
def test_damaged_samples_are_named(run_folder, change) -> None:
    write_samples(run_folder, np.zeros((1, 1, 8, 8)))
    path = run_folder / "samples.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=r"samples\.json"):
        read_run(run_folder)


def with_queries(folder, asked: dict[str, float]) -> None:
    for path in folder.glob("*/*/seed-*/result.json"):
        queries = asked.get(path.parts[-3])
        if queries is not None:
            path.write_text(json.dumps({**json.loads(path.read_text()), "prepared": {"queries": queries}}))


def test_accuracy_against_queries(tmp_path, write_comparison) -> None:
    accuracies = {
        "soft": {
            "KD, 100": [0.5, 0.7],
            "KD, 1000": [0.8, 0.8],
            "noise 100": [0.1, 0.1],
            "cross-entropy": [0.9, 0.9],
            "width 32": [0.2, 0.2],
            "width 64": [0.3, 0.3],
        },
        "hard": {
            "KD, 100": [0.4, 0.4],
            "KD, 1000": [0.6, 0.8],
            "noise 100": [0.1, 0.1],
            "cross-entropy": [0.9, 0.9],
            "width 32": [0.2, 0.2],
            "width 64": [0.3, 0.3],
        },
    }
    folder = write_comparison(tmp_path / "comparison", accuracies)
    comparison = read_comparison(folder)
    assert plots.queries(comparison) == []
    asked = {"KD, 100": 100, "KD, 1000": 1000, "noise 100": 100, "width 32": 100, "width 64": 100}
    with_queries(folder, asked)
    soft, hard = plots.queries(read_comparison(folder))
    assert "KD: 60.0% at 100, 80.0% at 1,000; noise: 10.0% at 100; " in soft.alt
    assert "width 32: 20.0% at 100; width 64: 30.0% at 100." in soft.alt  # of these the number is no query
    assert "KD: 40.0% at 100, 70.0% at 1,000" in hard.alt
    assert "cross-entropy" not in soft.alt
    page = write_html(folder).read_text()
    assert len(re.findall("Accuracy against queries", page)) == 1


def test_one_number_of_queries_is_no_curve(tmp_path, write_comparison) -> None:
    folder = write_comparison(tmp_path / "comparison", {"all": {"KD": [0.5], "cross-entropy": [0.6]}})
    with_queries(folder, {"KD": 100})
    assert plots.queries(read_comparison(folder)) == []
