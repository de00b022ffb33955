from __future__ import annotations

import gzip
import struct
import tracemalloc

import pytest
import torch

from luce.data.idx import read_idx
from luce.errors import UserError

IMAGES = struct.pack(">BBBBIII", 0, 0, 8, 3, 2, 1, 3) + bytes([0, 1, 2, 253, 254, 255])


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_header_and_values(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(IMAGES) if name.endswith(".gz") else IMAGES)
    values = read_idx(path, dims=3)
    assert values.dtype == torch.uint8
    assert values.tolist() == [[[0, 1, 2]], [[253, 254, 255]]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (IMAGES[:3] + b"\x01" + IMAGES[4:], r"3 dimension.*00000803, got 00000801"),
        (IMAGES[:2] + b"\x0d" + IMAGES[3:], r"unsigned bytes.*got 00000d03"),
        (IMAGES[:9], r"header of 16 bytes, got 9"),
        (IMAGES[:-1], r"expected 6 bytes .* shape \(2, 1, 3\), got 5"),
        (IMAGES + b"\x00", r"expected 6 bytes .* got more"),
        (
            struct.pack(">BBBBIII", 0, 0, 8, 3, 1, 1, 2**30 + 1),
            "at most 1,073,741,824 .* promises 1,073,741,825",
        ),
        (struct.pack(">BBBBIII", 0, 0, 8, 3, *[2**32 - 1] * 3), "its header promises"),
        (struct.pack(">BBBBIII", 0, 0, 8, 3, 2**10, 2**10, 2**10), "got 0"),
    ],
    ids=["empty", "dimensions", "type", "header", "short", "long", "large", "huge", "promise"],
)
def test_damage_is_named(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_idx(path, dims=3)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [gzip.compress(IMAGES, mtime=0)[:-9], IMAGES, b"\x1f\x8b\x08\x00" + b"\xff" * 20],
    ids=["cut short", "not compressed", "rubbish"],  # compressed bytes hold the time: no name for a test
)
def test_damaged_gzip_is_named(tmp_path, content):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="gzip") as caught:
        read_idx(path, dims=3)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 1, 3), "got more"), ((2**10, 2**10, 2**11), "its header promises")],
    ids=["more than it says", "more than is sane"],
)
def test_a_small_file_costs_little_memory(tmp_path, shape, message):
    # 64 MiB of zeros in 65 kB of gzip.
    path = tmp_path / "images.gz"
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">BBBBIII", 0, 0, 8, 3, *shape))
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(UserError, match=message):
        read_idx(path, dims=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*Is a directory"):
        read_idx(tmp_path, dims=1)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none") as caught:
        read_idx(tmp_path / "labels.gz", dims=1)
    assert str(tmp_path / "labels.gz") in str(caught.value)
