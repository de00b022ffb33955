"""One changed byte of any file with a digest is noticed and named."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from luce import manifest, models
from luce.errors import UserError
from luce.runs.export import read_packed, write_packed
from luce.training import checkpoint

SAMPLE = 60
"""Bytes of a file that are changed one at a time; smaller files are changed everywhere."""


def changes(path: Path, sample: int = SAMPLE) -> dict[int, bytes]:
    """The content with one bit flipped, by the place, of a sample that holds the first and the last."""
    content, draw = path.read_bytes(), random.Random(0)
    places = draw.sample(range(len(content)), min(sample, len(content)))
    return {
        at: content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
        for at in {0, len(content) - 1, *places}
    }


def test_a_pipe_and_a_device_in_the_list_of_a_stranger_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/zero"):
        (tmp_path / manifest.NAME).write_text(json.dumps({name: "0" * 64}))
        with pytest.raises(UserError, match=f"{name} is damaged"):
            manifest.check(tmp_path)


def test_a_digest_belongs_to_each_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    manifest.write(tmp_path, ["a", "b"])
    manifest.check(tmp_path)
    (tmp_path / "b").write_bytes(b"abc")
    manifest.check(tmp_path, ["a"])
    (tmp_path / "c").touch()
    with pytest.raises(UserError, match=r"digests\.json has no digest of c"):
        manifest.check(tmp_path, ["c"])
    with pytest.raises(UserError, match=r"b is damaged.*; start again"):
        manifest.check(tmp_path, remedy="start again")
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match=r"cannot read .*b "):
        manifest.check(tmp_path)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A folder with an exported student of a few numbers."""
    network = models.build("mlp", classes=2, input_shape=(2,), hidden=[2])
    for name in (checkpoint.BEST, checkpoint.LAST):
        checkpoint.export(tmp_path / name, network.state_dict())
    described = checkpoint.describe("mlp", {"hidden": [2]}, ("a", "b"), (2,), [0.5, 0.5], [1.0, 1.0])
    checkpoint.seal(tmp_path, described)
    return tmp_path


@pytest.mark.parametrize("name", ["student.json", "student.safetensors", "digests.json"])
def test_every_byte_of_a_student(name: str, student: Path) -> None:
    checkpoint.load_student(student)
    path, last = student / name, b'"student-last.safetensors"'
    entry = path.read_bytes().find(last)  # of a file that is not read here; its digest follows
    unread = range(entry, entry + len(last) + 36) if name == manifest.NAME else ()
    for at, content in changes(path, 10**6).items():
        path.write_bytes(content)
        if at not in unread:
            with pytest.raises(UserError, match=re.escape(str(student))):
                checkpoint.load_student(student)


def test_weights_by_the_name_of_their_file_are_compared_too(student: Path) -> None:
    shape = {"classes": 2, "input_shape": (2,), "weights": student / checkpoint.LAST}
    checkpoint.build("mlp", {"hidden": [2]}, **shape)
    for content in changes(student / checkpoint.LAST).values():
        (student / checkpoint.LAST).write_bytes(content)
        with pytest.raises(UserError, match=r"student-last\.safetensors is damaged"):
            checkpoint.build("mlp", {"hidden": [2]}, **shape)


def test_an_older_student_has_no_digest(student: Path, caplog: pytest.LogCaptureFixture) -> None:
    (student / manifest.NAME).unlink()
    checkpoint.load_student(student)
    assert "without digests.json, so its files are not checked for damage" in caplog.text


def test_a_packed_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"widths": [2, 2], "hidden": [2]}
    network = models.build("binary:vgg_pool", classes=2, input_shape=(1, 4, 4), **options).eval()
    described = checkpoint.describe("binary:vgg_pool", options, ("a", "b"), (1, 4, 4), [0.5], [1.0])
    path = tmp_path / "packed.safetensors"
    write_packed(path, models.Classifier(network, [0.5], [1.0]), described)
    read_packed(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for content in changes(path).values():
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"packed\.safetensors"):
            read_packed(path)
    path.write_bytes(whole[:header].replace(b'"version":"2"', b'"version":"1"') + whole[header:])
    assert "packed without a digest" not in caplog.text
    read_packed(path)


class Trained:
    """An accelerator with a network that has taken a step, and its optimizer."""

    def __init__(self) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.network = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(self.network.parameters())
        self.network, optimizer = self.accelerator.prepare(self.network, optimizer)
        self.network(torch.ones(1, 2)).sum().backward()
        optimizer.step()


def test_a_checkpoint(tmp_path: Path) -> None:
    accelerator = Trained().accelerator
    checkpoint.save(tmp_path, accelerator, 3, {"epoch": 3, "numbers": torch.arange(3)})
    extra = checkpoint.restore(tmp_path, accelerator)
    assert extra is not None
    assert extra["epoch"] == 3
    names = sorted(path.name for path in (tmp_path / "checkpoint-3").iterdir())
    assert names == ["digests.json", "luce.pt", "model.safetensors", "optimizer.bin", "random_states_0.pkl"]
    for name in names:
        path = tmp_path / "checkpoint-3" / name
        whole = path.read_bytes()
        for content in changes(path).values():
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"cannot resume from .*checkpoint-3 .*; delete this folder"):
                checkpoint.restore(tmp_path, accelerator)
        path.write_bytes(whole)
    checkpoint.restore(tmp_path, accelerator)


def test_an_older_checkpoint_has_no_digest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Trained().accelerator
    checkpoint.save(tmp_path, accelerator, 1, {"epoch": 1})
    (tmp_path / "checkpoint-1" / manifest.NAME).unlink()
    assert checkpoint.restore(tmp_path, accelerator) == {"epoch": 1}
    assert "not checked for damage" in caplog.text
