"""Digests of rows: equal for equal rows, and different for any change that a training could see."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from luce.data import Examples, fingerprint, load
from luce.data.fingerprint import of_files, of_rows, of_source
from luce.data.sources import InMemory, LazyImages, Part, as_source

INPUTS = torch.arange(24.0).reshape(6, 4)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


class Rows(Dataset[Any]):
    """A user's dataset with a transform."""

    def __init__(self, inputs: Tensor, transform: Callable[[Tensor], Tensor] = torch.clone) -> None:
        self.inputs, self.transform, self.targets = inputs, transform, LABELS.repeat(len(inputs) // 6)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> Any:
        self.reads += 1
        return self.transform(self.inputs[row]), int(self.targets[row])


def changed(inputs: Tensor, row: int, column: int) -> Tensor:
    other = inputs.clone()
    other[row, column] += 1
    return other


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_one_value_of_rows_in_memory(dtype: torch.dtype) -> None:
    first, same, other = (
        of_source(InMemory(inputs.to(dtype), LABELS))
        for inputs in (INPUTS, INPUTS.clone(), changed(INPUTS, 5, 3))
    )
    assert first == same != other


def test_the_order_of_rows() -> None:
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    assert of_source(InMemory(INPUTS, LABELS)) != of_source(InMemory(INPUTS[order], LABELS))
    whole = InMemory(INPUTS, LABELS)
    assert of_source(Part(whole, order)) != of_source(Part(whole, order.sort().values))


def test_a_label_and_the_choice_of_rows() -> None:
    rows = Examples(InMemory(INPUTS, LABELS), [0, 1, 2])
    assert of_rows(rows, "x") == of_rows(Examples(InMemory(INPUTS, LABELS), [0, 1, 2]), "x")
    hidden, others = (
        of_rows(Examples(rows.source, *choice), "x") for choice in (([0, 1, 2], [0, 1, -1]), ([0, 1, 5],))
    )
    differing = [
        {key for key, value in of_rows(rows, "x").items() if value != other[key]}
        for other in (hidden, others)
    ]
    assert differing == [{"labels"}, {"order"}]


@pytest.mark.parametrize(
    "wrap",
    [
        Rows,
        lambda inputs: Subset(TensorDataset(inputs, LABELS.repeat(300)), range(1800)),
        lambda inputs: ConcatDataset([TensorDataset(inputs, LABELS.repeat(300))]),
        lambda inputs: [(row, 0) for row in inputs],
        lambda inputs: Subset(Rows(inputs), range(5, 1800)),
    ],
)
def test_one_value_among_many_rows_of_a_wrapped_dataset(wrap: Callable[[Tensor], Any]) -> None:
    inputs = INPUTS.repeat(300, 1)
    first, same, other = (
        of_source(as_source(wrap(values))) for values in (inputs, inputs.clone(), changed(inputs, 1321, 2))
    )
    assert first == same != other


def test_the_indices_of_a_subset() -> None:
    rows = TensorDataset(INPUTS[:1].repeat(6, 1), LABELS)
    first, other = (of_source(as_source(Subset(rows, chosen))) for chosen in ([0, 1, 2], [3, 4, 5]))
    assert first != other


def test_the_transform_of_a_dataset() -> None:
    def twice(values: Tensor) -> Tensor:
        return 2 * values

    assert of_source(as_source(Rows(INPUTS))) != of_source(as_source(Rows(INPUTS, twice)))


def test_a_random_transform_is_read_under_fixed_seeds(caplog: pytest.LogCaptureFixture) -> None:
    def noisy(scale: float) -> Callable[[Tensor], Tensor]:
        return lambda values: values + scale * (torch.rand(()) + np.random.rand() + random.random())

    first = of_source(as_source(Rows(INPUTS, noisy(1.0))))
    source = as_source(Rows(INPUTS, noisy(1.0)))
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    second = of_source(source)
    assert first == second is not None
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert first != of_source(as_source(Rows(INPUTS, noisy(2.0))))
    assert not caplog.text


def test_rows_that_never_repeat_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    own = np.random.default_rng()
    source = as_source(Rows(INPUTS, lambda values: values + own.random()))
    assert of_source(source) is None
    assert of_source(Part(source, torch.tensor([0, 1]))) is None
    assert "rows of Rows differ each time they are read" in caplog.text


def test_few_rows_of_a_large_dataset_are_read() -> None:
    rows = Rows(INPUTS.repeat(10_000, 1))
    source = as_source(rows)
    rows.reads = 0
    of_source(source)
    assert 64 <= rows.reads <= 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 4)):
        for label in "ab":
            (tmp_path / "first" / part / label).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(pixels.integers(0, 255, (8, 8, 3), dtype=np.uint8))
                image.save(tmp_path / "first" / part / label / f"{number}.bmp")
    return tmp_path / "first"


def test_a_copy_of_a_folder_is_equal(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "second", copy_function=shutil.copy)  # with another time
    digests = [of_source(load(f"imagefolder:{tmp_path / name}").train) for name in ("first", "second")]
    assert digests[0] == digests[1] is not None


@pytest.mark.parametrize("place", [54, -1])
def test_an_image_replaced_by_one_of_equal_size(place: int, folder: Path) -> None:
    digests = [of_source(load(f"imagefolder:{folder}").train)]
    path = folder / "train" / "a" / "7.bmp"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    digests.append(of_source(load(f"imagefolder:{folder}").train))
    path.rename(path.with_name("70.bmp"))
    digests.append(of_source(load(f"imagefolder:{folder}").train))
    assert len(set(digests)) == 3


def test_the_size_of_images(folder: Path) -> None:
    assert len({of_source(load(f"imagefolder:{folder}", image_size=size).train) for size in (8, 12)}) == 2


def test_the_files_of_a_dataset_of_torchvision(folder: Path, tmp_path: Path) -> None:
    class Files(Dataset[Any]):
        """Like `torchvision.datasets.ImageFolder`."""

        def __init__(self, root: Path) -> None:
            self.samples = [(str(path), 0) for path in sorted(root.rglob("*.bmp"))]
            self.targets = [0] * len(self.samples)

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, row: int) -> Any:
            return torch.zeros(3), 0

    shutil.copytree(folder, tmp_path / "second")
    first, second = (of_source(as_source(Files(tmp_path / name))) for name in ("first", "second"))
    path = tmp_path / "second" / "train" / "a" / "7.bmp"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert first == second != of_source(as_source(Files(tmp_path / "second")))


def test_images_that_are_no_files() -> None:
    def images(scale: int) -> LazyImages:
        def draw(row: int) -> Image.Image:
            return Image.new("RGB", (2, 2), (scale * row, 0, 0))

        return LazyImages(draw, LABELS, lambda image: torch.tensor(image.getpixel((0, 0))))

    assert of_source(images(1)) == of_source(images(1)) != of_source(images(2))


def test_rows_in_memory_are_not_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    source = InMemory(INPUTS, LABELS)
    expected = of_source(source)
    monkeypatch.setattr(InMemory, "read", None)
    monkeypatch.setattr(InMemory, "batch", None)
    assert of_source(source) == expected


def test_of_many_files_only_ends_of_evenly_spaced_ones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number:02}.png" for number in range(40)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 100)
    read: dict[str, int] = {}
    tail = fingerprint._tail

    def counted(path: bytes, size: int, share: int) -> bytes:
        content = tail(path, size, share)
        read[Path(os.fsdecode(path)).name] = len(content)
        return content

    monkeypatch.setattr(fingerprint, "_tail", counted)
    monkeypatch.setattr(fingerprint, "OPENED", 10)
    monkeypatch.setattr(fingerprint, "BYTES", 10 * 300)
    of_files(tmp_path, names)
    assert read == dict.fromkeys(names[::4], 300)
    monkeypatch.setattr(fingerprint, "BYTES", 10)
    of_files(tmp_path, names)
    assert read == dict.fromkeys(names[::4], fingerprint.TAIL)
