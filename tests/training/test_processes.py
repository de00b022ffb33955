"""Two processes that train one student."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from luce.cli import main


def test_two_processes_share_the_rows_and_write_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "method": "cross-entropy",
        "data": {"validation": 0.2},
        "student": {"name": "binary:mlp", "options": {"hidden": [16, 16]}},  # parametrised weights too
        "loss": {"task": {"loss": "CrossEntropyLoss"}},
        "training": {"epochs": 3, "batch_size": 32, "lr": 0.01, "ema": 0.9, "cpu": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "luce", "train", "recipe.yaml", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == done.stdout.count("student: ") == 1  # one of the two speaks

    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = 1297 - round(0.2 * 1297)  # of the digits' training rows
    steps = math.ceil(math.ceil(rows / 32) / 2)  # each process takes every other batch
    assert [line["step"] for line in lines] == [steps, 2 * steps, 3 * steps]
    assert lines[-1]["train"]["task"] < lines[0]["train"]["task"]

    result = json.loads((tmp_path / "run/result.json").read_text())
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0  # one process, the same weights, the same figures
    figures = json.loads(capsys.readouterr().out)
    assert figures["accuracy"] == pytest.approx(result["best"]["test"]["accuracy"], abs=1e-6)
