"""Folders that another process uses, and what a killed process leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import luce as package
from luce import files
from luce.errors import UserError

from .conftest import Answer

COMPARISON = {
    "title": "",
    "question": "",
    "baseline": "KD",
    "methods": {"KD": {"kd": {"loss": "KDLoss"}}},
    "seeds": [0],
    "settings": {"all": {}},
    "teacher": {"checkpoint": "runs/teacher"},
    "teacher_training": None,
}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Let another thread hold the lock of a folder, which refuses this one as another process would."""
    lock = files.locked(folder)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lock.__enter__).result()
        try:
            yield
        finally:
            pool.submit(lock.__exit__, None, None, None).result()


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_no_command_writes_into_a_folder_where_another_process_works(
    write: Callable[..., str], refuses: Callable[..., str], teacher: Path, place: Path
) -> None:
    recipe = write("student.yaml")
    comparison = {key: value for key, value in COMPARISON.items() if value is not None}
    base = {"data": {"name": "sklearn:iris"}, "student": {"name": "mlp"}, "training": {"epochs": 1}}
    compared = write("compared.yaml", base={**base, **comparison})
    before = {path: path.read_bytes() for path in teacher.iterdir()}
    with held(place / "out"), held(teacher), held(teacher / "spiking"):
        for command in (
            ("train", recipe, "--out", "out"),
            ("distill", recipe, "--teacher.checkpoint", "runs/teacher", "--out", "out"),
            ("compare", compared, "--out", "out"),
            ("diagnose", "runs/teacher", "sklearn:iris", "--out", "out"),
            ("landscape", "PLDLoss", "--points", "3", "--out", "out/picture.png"),
            ("export", "runs/teacher", "--format", "packed"),
            ("spike", "runs/teacher"),
            ("report", "runs/teacher"),
        ):
            assert "another process works in " in refuses(*command), command
        rows = TensorDataset(torch.rand(8, 4), torch.arange(8) % 2)
        with pytest.raises(UserError, match="another process works in out:"):
            package.distill(torch.nn.Linear(4, 2), torch.nn.Linear(4, 2), rows, folder="out", epochs=1)
        assert [path.name for path in (place / "out").iterdir()] == [".lock"]
        assert list((teacher / "spiking").iterdir()) == [teacher / "spiking" / ".lock"]
    shutil.rmtree(teacher / "spiking")
    assert {path: path.read_bytes() for path in teacher.iterdir()} == before


@pytest.mark.parametrize(
    "left", [".writable", ".recipe.yaml.part", ".lock", "environment.json", ".4711.part"]
)
def test_what_a_command_killed_in_its_first_moments_leaves_stops_no_other(
    left: str, write: Callable[..., str], luce: Callable[..., Answer], place: Path
) -> None:
    (place / "out").mkdir()
    (place / "out" / left).write_text("half")
    assert luce("train", write(), "--out", "out", "--training.epochs", "1").status == 0
    assert json.loads((place / "out" / "environment.json").read_text())["python"]
    assert not [path for path in (place / "out").iterdir() if path.name.startswith(".")]


def test_what_a_run_killed_when_it_had_just_finished_leaves_goes(
    write: Callable[..., str], luce: Callable[..., Answer], teacher: Path
) -> None:
    whole = {path.name for path in teacher.iterdir()}
    for left in ("checkpoint-2", ".checkpoint.part"):
        (teacher / left).mkdir()
        (teacher / left / "luce.pt").write_text("")
    assert luce("train", write(), "--out", "runs/teacher").status == 0
    assert {path.name for path in teacher.iterdir()} == whole | {"report.html"}


def test_a_run_that_finished_no_epoch_may_be_changed(
    write: Callable[..., str], refuses: Callable[..., str], luce: Callable[..., Answer], place: Path
) -> None:
    """As after an error in its first batch, whose remedy is another option."""
    recipe = write()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luce.methods.LogitMethod.step", fails)
        assert "lower it" in refuses("train", recipe, "--out", "out")
    assert (place / "out" / "metrics.jsonl").read_text() == ""
    assert luce("train", recipe, "--out", "out", "--training.lr", "0.01").status == 0
    assert "differs in training.lr" in refuses("train", recipe, "--out", "out")


def fails(*_: object) -> None:
    raise UserError("lower it")


def test_a_damaged_image_is_told_alike_by_any_number_of_processes(
    write: Callable[..., str], refuses: Callable[..., str], place: Path
) -> None:
    for part, count in (("train", 6), ("test", 1)):
        for name in "ab":
            (place / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                Image.effect_noise((24, 24), 50).save(place / "images" / part / name / f"{number}.png")
    damaged = place / "images" / "train" / "a" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    base = {
        "data": {"name": "imagefolder:images", "options": {"image_size": 16}, "validation": 0.34},
        "student": {"name": "cnn", "options": {"widths": [4]}},
        "loss": {"task": {"loss": "CrossEntropyLoss"}},
        "training": {"epochs": 1, "batch_size": 4},
    }
    recipe = write(base=base)
    said = {refuses("train", recipe, "--data.workers", workers, "--out", workers) for workers in "02"}
    assert len(said) == 1
    assert "cannot read the image images/train/a/3.png" in said.pop()


def children(group: int) -> list[str]:
    """Processes of a process group that live."""
    living = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                living.append(stat.parent.name)
    return living


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no list of processes")
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_all_processes_stops_a_training_at_any_moment(
    name: str, workers: str, write: Callable[..., str], luce: Callable[..., Answer], place: Path
) -> None:
    """As a terminal sends Ctrl-C: to the reading processes too."""
    recipe = write("recipe.yaml", training={"epochs": 400, "checkpoint_every": 3, "batch_size": 8})
    number, random = signal.Signals[name], Random(0)
    for _ in range(3):
        epoch = (
            len((place / "out" / "metrics.jsonl").read_text().splitlines()) if (place / "out").exists() else 0
        )
        run = subprocess.Popen(
            [sys.executable, "-m", "luce", "train", recipe, "--out", "out", "--data.workers", workers],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not (lines := place / "out" / "metrics.jsonl").exists() or (
            len(lines.read_text().splitlines()) <= epoch
        ):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        os.killpg(run.pid, number)
        _, said = run.communicate(timeout=30)
        again = "run the same command again to resume from the last checkpoint"
        assert (
            said.splitlines(keepends=True)[-1]
            == f"luce: stopped{' by SIGTERM' * (name == 'SIGTERM')}; {again}\n"
        )
        # PyTorch may print, while it ends its processes, that a signal has ended them before.
        assert "Traceback" not in said or "Exception ignored in" in said, said
        assert run.returncode == 128 + number
        assert children(run.pid) == []
        assert not [path for path in (place / "out").iterdir() if path.name.startswith(".")]
