"""A killed run resumes to the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

RECIPE: dict[str, Any] = {
    "method": "PLD",
    "data": {"name": "sklearn:digits", "validation": 0.2},
    "student": {"name": "mlp", "options": {"hidden": [16]}},
    "teacher": {"checkpoint": "runs/teacher"},
    "loss": {"pld": {"loss": "PLDLoss"}},
    "training": {"epochs": 12, "batch_size": 64, "lr": 0.01, "ema": 0.9},
}


def outcome(folder: Path) -> Any:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    for record in (*lines, result):
        del record["seconds"]
    return lines, result, (folder / "student.safetensors").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_goes_on_to_the_same_numbers(write, luce, place: Path) -> None:
    teacher = write("teacher.yaml", data=RECIPE["data"], training={"epochs": 1})
    assert luce("train", teacher).status == 0
    recipe = write("student.yaml", base=RECIPE)
    assert luce("distill", recipe, "--out", "whole").status == 0

    run = subprocess.Popen(
        [sys.executable, "-m", "luce", "distill", recipe, "--out", "cut"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 60
    while not list((place / "cut").glob("checkpoint-[3-9]*")):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait(timeout=10) == -signal.SIGKILL
    assert not (place / "cut" / "result.json").exists()
    assert len((place / "cut" / "metrics.jsonl").read_text().splitlines()) < 12

    assert luce("distill", recipe, "--out", "cut").status == 0
    assert outcome(place / "cut") == outcome(place / "whole")
    assert not list((place / "cut").glob("*checkpoint*"))
