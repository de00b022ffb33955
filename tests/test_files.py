"""Files are whole or absent, also on a full disk."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import luce
from luce import files
from luce.errors import UserError
from luce.training import checkpoint

fcntl = pytest.importorskip("fcntl")


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
        with files.locked(folder):
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
    with files.locked(folder):
        pass
    assert folder.is_dir()


HOLDER = """
import sys, types
sys.modules["luce"] = types.ModuleType("luce")  # without the time that torch takes
sys.modules["luce"].__path__ = [sys.argv[1]]
from pathlib import Path
from luce import files
with files.locked(Path(sys.argv[2])):
    print("holds", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(Path(luce.__file__).parent), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    with process:
        yield process


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_folder_has_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with holder(folder) as other:
        for act in (lambda: files.locked(folder).__enter__(), lambda: files.write_text(folder / "x", "x")):
            with pytest.raises(UserError) as caught:
                act()
            assert re.fullmatch(
                f"another process works in {folder}: pid {other.pid} on host {socket.gethostname()} since "
                r"\S+; wait until it ends, or choose another folder",
                str(caught.value),
            )
        other.communicate("")
    assert not folder.exists() or not list(folder.iterdir())
    with files.locked(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_lock_ends_with_its_process_and_what_that_left_goes(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        other.kill()
    assert (tmp_path / ".lock").read_text().startswith(f"pid {other.pid} on host ")
    (tmp_path / ".checkpoint.part").mkdir()
    for name in (".writable", ".student.onnx.part", ".report.html.4711", ".checkpoint.part/luce.pt", "mine"):
        (tmp_path / name).write_text("")
    assert files.content(tmp_path) == {"mine"}
    with files.locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"pid {os.getpid()} on host ")
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "mine"}


def test_a_thread_locks_a_folder_again_and_another_thread_does_not(tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(UserError, match=f"pid {os.getpid()} on host") as caught:
            files.write_text(tmp_path / "x", "x")
        return str(caught.value)

    with ThreadPoolExecutor(1) as pool, files.locked(tmp_path), files.locked(tmp_path):
        files.write_text(tmp_path / "a", "a")
        with files.locked(tmp_path):
            assert "another process works" in pool.submit(refused).result()
        assert (tmp_path / ".lock").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_process_does_not_keep_the_lock_of_a_killed_one(tmp_path: Path) -> None:
    fork = "import os, time; os.fork() or print(os.getpid(), flush=True); time.sleep(60)"
    script = HOLDER.replace("sys.stdin.read()", fork)
    arguments = [sys.executable, "-c", script, str(Path(luce.__file__).parent), str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            os.kill(child, 0)  # still lives
            with files.locked(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lock_whose_file_was_removed_meanwhile_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder removes the file between the opening and the locking by the next."""
    flock, calls = fcntl.flock, iter([True, False])

    def late(descriptor: int, how: int) -> None:
        if next(calls):
            (tmp_path / ".lock").unlink()
        flock(descriptor, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with files.locked(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"pid {os.getpid()} ")
    assert next(calls, None) is None


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with files.locked(tmp_path):
        files.write_text(tmp_path / "a", "a")
    assert caplog.messages == [
        f"{tmp_path} cannot be locked (No locks available); start no second process in it"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    for text in ("one", "two"):
        files.write_text(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "file").read_text() == "two"
    assert len(list(tmp_path.rglob("*"))) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_files_have_the_permissions_that_the_user_asks_for(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        files.write_json(tmp_path / "a.json", {})
        checkpoint.export(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
        checkpoint.save(tmp_path, Accelerator(cpu=True), 1, {})
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 3
    for path in written:
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


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
