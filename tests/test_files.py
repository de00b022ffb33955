"""Files are whole or absent, also on a full disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from luce import files
from luce.errors import UserError


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    files.write_json(path, {"a": [1.5, "ü"]})
    assert path.read_text() == '{\n  "a": [\n    1.5,\n    "\\u00fc"\n  ]\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("moment", ["while filling", "while renaming"])
def test_a_failed_write_leaves_what_was_there(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with monkeypatch.context() as patch:
        if moment == "while renaming":
            patch.setattr(os, "replace", full)
        with pytest.raises(UserError) as caught:
            files.write(path, lambda aside: (aside.write_text("ne"), moment == "while filling" and full()))
    assert str(caught.value) == (
        f"cannot write {path} (No space left on device); free some space or choose another folder"
    )
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_stop_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    def stopped(aside: Path) -> None:
        aside.write_text("ne")
        raise KeyboardInterrupt

    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "a.txt", stopped)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_went_away(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "gone" / "a.txt", tmp_path / "file" / "a.txt"):
        with pytest.raises(UserError, match=r"cannot write .*a\.txt"):
            files.write_text(path, "x")


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"expected a folder that can be written to, got .*file"):
            files.make_folder(folder)
    assert files.make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert files.make_folder(tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())


def test_a_folder_goes_with_the_work_that_failed(tmp_path: Path) -> None:
    def stopped(folder: Path, leaves: Path | None = None) -> None:
        with files.folder_for_work(folder):
            assert folder.is_dir()
            if leaves is not None:
                leaves.write_text("")
            raise KeyboardInterrupt

    folder, kept = tmp_path / "a" / "b", tmp_path / "kept"
    kept.mkdir()
    for place in (folder, kept):
        with pytest.raises(KeyboardInterrupt):
            stopped(place)
    assert list(tmp_path.iterdir()) == [kept]
    with pytest.raises(KeyboardInterrupt):
        stopped(folder, leaves=tmp_path / "a" / "mine")
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "mine"]
    with files.folder_for_work(folder):
        pass
    assert folder.is_dir()


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from luce.errors import UserError
from luce import files
from luce.training import checkpoint

folder = Path(sys.argv[1])
model = torch.nn.Linear(100, 100)
accelerator = Accelerator(cpu=True)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), momentum=0.9))
checkpoint.save(folder, accelerator, 1, {"best": model.state_dict()})
model(torch.zeros(1, 100)).sum().backward()
optimizer.step()
# From here on a file may not grow beyond a few kilobytes: as with a full disk, writing fails half-way.
for limit in (%s):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for write in (
        lambda: checkpoint.save(folder, accelerator, 2, {"best": model.state_dict()}),
        lambda: checkpoint.export(folder / "student.safetensors", model.state_dict()),
        lambda: files.write_text(folder / "text", "x" * 100_000),
    ):
        try:
            write()
        except UserError as error:
            print(error)
        else:
            print("written")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    """Python, PyTorch and safetensors each fail in a way of their own."""
    script = textwrap.dedent(LIMITED % "2000, 42_000")  # too little for the weights; enough, but not for all
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for checkpoint_error, export_error, text_error in (lines[:3], lines[3:]):
        assert checkpoint_error.startswith(f"cannot write a checkpoint to {tmp_path} (")
        assert export_error.startswith(f"cannot write {tmp_path / 'student.safetensors'} (") or (
            export_error == "written"
        )
        assert text_error.startswith(f"cannot write {tmp_path / 'text'} (File too large)")
    assert lines[1] != "written"
    names = {path.name for path in tmp_path.iterdir()}
    assert "checkpoint-1" in names  # the last whole one is kept
    assert not names & {"checkpoint-2", "text"}
    assert not [name for name in names if name.endswith(".part")]
