"""Texts of a foreign run folder stay text on its page."""

from __future__ import annotations

import json
from pathlib import Path

HOSTILE = "<script>alert(1)</script>\"'&$\\frac{$\x1b[31m"


def test_texts_of_a_run_folder_are_escaped(teacher: Path, luce) -> None:
    for name in ("result.json", "environment.json"):
        content = json.loads((teacher / name).read_text())
        content |= {key: HOSTILE for key, value in content.items() if isinstance(value, str)}
        if "student" in content:
            content["student"]["model"] = HOSTILE
        (teacher / name).write_text(json.dumps(content))
    samples = {"shape": [1, 1, 2, 2], "pixels": "AAAAAA==", "classes": [HOSTILE], "confidence": [0.5]}
    (teacher / "samples.json").write_text(json.dumps(samples))
    assert luce("report", "runs/teacher").status == 0
    page = (teacher / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
