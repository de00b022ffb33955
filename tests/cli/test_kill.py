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

from benchmarks import kills

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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes of the study of kills, and their teacher."""
    folder = tmp_path_factory.mktemp("kills")
    kills.prepare(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("work", ["metadistil", "mekd", "compare", "onnx"])
def test_a_killed_command_ends_in_the_files_of_an_uninterrupted_one(work: str, prepared: Path) -> None:
    """``python -m benchmarks.kills`` does so at many moments."""
    if work == "onnx":
        pytest.importorskip("onnxscript")
    started = time.perf_counter()
    whole = kills.start(prepared, work, Path("whole") / work)
    _, said = whole.communicate()
    assert whole.returncode == 0, said
    seconds, files = time.perf_counter() - started, kills.content(prepared, Path("whole") / work)
    for share in (0.8, 0.6, 0.4, 0.2):  # the machine may be faster the second time
        outcome = kills.kill(prepared, work, Path(f"cut-{work}-{share}"), share * seconds, files)
        if outcome.kind != "finished before":
            break
    assert outcome == kills.Outcome("equal")
