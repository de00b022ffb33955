from __future__ import annotations

import gzip
import os
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from luce import data
from luce.data import loaders
from luce.errors import UserError


def test_names_can_be_loaded():
    assert data.names() == (
        "sklearn:breast_cancer",
        "sklearn:digits",
        "sklearn:iris",
        "sklearn:wine",
        "fashion-mnist",
        "torchvision:NAME",
        "imagefolder:PATH",
        "hf:NAME",
        "python:MODULE.FUNCTION",
    )
    for name in data.names()[:4]:
        assert data.load(name).name == name


@pytest.mark.parametrize("name", ["digits", "sklearn", "sklearn:", "fashion-mnist:x", "", "nowhere:x"])
def test_unknown_data_is_refused(name):
    with pytest.raises(UserError, match="unknown data"):
        data.load(name)


def test_unknown_data_is_answered_with_a_near_name():
    with pytest.raises(UserError, match="did you mean `sklearn:digits`"):
        data.load("sklearn:digit")


def test_unknown_options_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="`imagefolder:x` has no option `size`; it has: image_size"):
        data.load("imagefolder:x", size=3)
    with pytest.raises(UserError, match="no option `split`; it has: none"):
        data.load("sklearn:digits", split=3)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    digits, bunch = data.load("sklearn:digits"), load_digits()
    assert (len(digits.train), len(digits.test)) == (1297, 500)
    images = torch.cat([digits.train.inputs, digits.test.inputs])
    labels = torch.cat([digits.train.targets, digits.test.targets])
    assert images.shape == (1797, 1, 8, 8)
    assert float(images.min()) == 0
    assert float(images.max()) == 1

    def rows(images, labels):
        return sorted((*image, label) for image, label in zip(images.tolist(), labels.tolist(), strict=True))

    assert rows(images.flatten(1) * 16, labels) == rows(bunch.data, bunch.target)
    # Shares of the classes within one row of those of all 1,797.
    assert np.abs(digits.test.targets.bincount().numpy() - np.bincount(bunch.target) * 500 / 1797).max() < 1
    assert digits.mean == pytest.approx((float(digits.train.inputs.mean()),), rel=1e-5)
    assert digits.test.inputs.equal(data.load("sklearn:digits").test.inputs)


def test_features_are_raw_and_described():
    wine = data.load("sklearn:wine")
    assert wine.input_shape == (13,)
    assert len(wine.mean) == len(wine.std) == 13
    assert (len(wine.train), len(wine.test)) == (134, 44)  # round(178 / 4) = 44
    assert wine.classes == ("class_0", "class_1", "class_2")
    assert wine.mean[0] == pytest.approx(float(wine.train.inputs[:, 0].mean()), rel=1e-5)


def write_idx(folder, part, images, labels, suffix=".gz"):
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
        content = header + values.astype(np.uint8).tobytes()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{part}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(content) if suffix else content)


@pytest.mark.parametrize(
    ("below", "suffix"), [("", ".gz"), ("FashionMNIST/raw", ""), ("usr/share/datasets/fashion-mnist", ".gz")]
)
def test_fashion_mnist_from_a_folder(tmp_path, below, suffix):
    images = np.arange(2 * 4 * 4).reshape(2, 4, 4)
    write_idx(tmp_path / below, "train", images, np.array([9, 0]), suffix)
    write_idx(tmp_path / below, "t10k", images[:1], np.array([3]), suffix)
    fashion = data.load("fashion-mnist", root=tmp_path)
    assert fashion.input_shape == (1, 4, 4)
    assert fashion.licence == "MIT"
    assert len(fashion.classes) == 10
    image, label = fashion.train[1]
    torch.testing.assert_close(image, torch.arange(16.0, 32.0).reshape(1, 4, 4) / 255)
    assert fashion.classes[label] == "T-shirt/top"
    assert fashion.classes[fashion.train[0][1]] == "Ankle boot"
    assert len(fashion.test) == 1
    assert fashion.test[0][1] == 3


def test_fashion_mnist_from_elsewhere_is_told(tmp_path, monkeypatch, caplog):
    write_idx(tmp_path / "debian", "train", np.zeros((2, 4, 4)), np.array([9, 0]))
    write_idx(tmp_path / "debian", "t10k", np.zeros((1, 4, 4)), np.array([3]))
    monkeypatch.setattr(loaders, "DEBIAN", tmp_path / "debian")
    data.load("fashion-mnist")
    assert "read from" not in caplog.text
    monkeypatch.setattr(loaders, "DEBIAN", Path(os.path.relpath(tmp_path / "debian", "/")))
    data.load("fashion-mnist", root=tmp_path)
    assert f"read from {tmp_path / 'debian'}, as {tmp_path} has none of its files" in caplog.text


def test_fashion_mnist_names_what_does_not_fit(tmp_path):
    write_idx(tmp_path, "train", np.zeros((2, 4, 4)), np.array([0, 1, 2]))
    with pytest.raises(UserError, match="2 images and 3 labels"):
        data.load("fashion-mnist", root=tmp_path)
    write_idx(tmp_path, "train", np.zeros((2, 4, 4)), np.array([0, 10]))
    with pytest.raises(UserError, match="t10k-images"):
        data.load("fashion-mnist", root=tmp_path)
    write_idx(tmp_path, "t10k", np.zeros((1, 4, 4)), np.array([0]))
    with pytest.raises(UserError, match=r"labels 0 \.\. 9 .* got 0 \.\. 10"):
        data.load("fashion-mnist", root=tmp_path)
    write_idx(tmp_path, "train", np.zeros((0, 4, 4)), np.zeros(0))
    with pytest.raises(UserError, match="train part of `fashion-mnist` is empty"):
        data.load("fashion-mnist", root=tmp_path)


def test_fashion_mnist_missing_names_three_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # as if not installed
    with pytest.raises(UserError) as caught:
        data.load("fashion-mnist", root=tmp_path)
    for way in ("apt-get install dataset-fashion-mnist", "`root`", "pip install 'luce[vision]'"):
        assert way in str(caught.value)


def test_real_fashion_mnist():
    if not ("/" / loaders.DEBIAN).is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    fashion = data.load("fashion-mnist")
    assert fashion.train.inputs.shape == (60_000, 1, 28, 28)
    assert len(fashion.test) == 10_000
    assert fashion.train.targets.bincount().tolist() == [6000] * 10
    assert fashion.train.targets[:4].tolist() == [9, 0, 0, 3]  # the file's first: a boot, two shirts, a dress
    assert fashion.mean == pytest.approx((0.2860,), abs=5e-5)  # as published for the training set
    assert fashion.std == pytest.approx((0.3530,), abs=5e-5)


class CIFAR:
    """The shape of torchvision's CIFAR classes: bytes with the channels last, and a list of labels."""

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        rows = 6 if train else 4
        self.data = np.zeros((rows, 32, 32, 3), np.uint8)
        self.data[:, 0, 1] = [51, 102, 255]
        self.targets = [row % 2 for row in range(rows)]
        self.classes = ["apple", "bear"]
        self.asked = (root, download)


class SVHN:
    """Chosen by `split`, channels first, labels as an array."""

    def __init__(self, root, split="train", download=False):
        self.data = np.full((3, 3, 32, 32), 255, np.uint8)
        self.labels = np.array([0, 1, 2])


class MNIST:
    def __init__(self, root, train=True, download=False):
        self.data = torch.zeros(2, 28, 28, dtype=torch.uint8)
        self.targets = torch.tensor([0, 1])


class Flowers:
    def __init__(self, root, split="train", download=False):
        self.files = ["a.jpg"]


class Down:
    def __init__(self, root, train=True, download=False):
        raise RuntimeError("File not found or corrupted.")


@pytest.fixture
def torchvision(monkeypatch):
    module = types.ModuleType("torchvision.datasets")
    module.CIFAR100, module.SVHN, module.MNIST, module.FashionMNIST = CIFAR, SVHN, MNIST, MNIST
    module.Flowers102, module.EMNIST = Flowers, Down
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


@pytest.mark.usefixtures("torchvision")
class TestTorchvision:
    def test_channels_last(self, tmp_path):
        cifar = data.load("torchvision:CIFAR100", root=tmp_path)
        assert (cifar.name, cifar.input_shape, cifar.classes) == (
            "torchvision:CIFAR100",
            (3, 32, 32),
            ("apple", "bear"),
        )
        assert (len(cifar.train), len(cifar.test)) == (6, 4)
        assert cifar.train.inputs.dtype == torch.uint8
        torch.testing.assert_close(cifar.train[1][0][:, 0, 1], torch.tensor([0.2, 0.4, 1.0]))
        assert cifar.train[1][1] == 1
        assert cifar.mean == pytest.approx((0.2 / 1024, 0.4 / 1024, 1 / 1024))

    def test_channels_first(self):
        svhn = data.load("torchvision:SVHN")
        assert svhn.input_shape == (3, 32, 32)
        assert svhn.classes == ("0", "1", "2")

    def test_without_channels(self):
        assert data.load("torchvision:MNIST").input_shape == (1, 28, 28)

    def test_fashion_mnist_falls_back_on_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(loaders, "DEBIAN", tmp_path)
        fashion = data.load("fashion-mnist")
        assert (fashion.name, fashion.licence) == ("fashion-mnist", "MIT")

    def test_what_it_cannot_give(self):
        with pytest.raises(
            UserError, match=r"unknown torchvision data set `CIFAR99`; did you mean `CIFAR100`"
        ):
            data.load("torchvision:CIFAR99")
        with pytest.raises(UserError, match="Flowers102 does not hold its images in memory"):
            data.load("torchvision:Flowers102")
        with pytest.raises(UserError, match="train split of EMNIST: File not found or corrupted"):
            data.load("torchvision:EMNIST")


def test_torchvision_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(UserError, match=r"luce\[vision\]"):
        data.load("torchvision:CIFAR10")


def test_python_functions_get_options_and_root(monkeypatch, tmp_path):
    module = types.ModuleType("mine")

    def pairs(size, root=None):
        rows = TensorDataset(torch.zeros(size, 1), torch.zeros(size, dtype=torch.int64))
        module.root = root
        return data.from_datasets(rows, rows)

    module.pairs, module.nothing = pairs, lambda: None
    monkeypatch.setitem(sys.modules, "mine", module)
    assert len(data.load("python:mine.pairs", size=3).train) == 3
    assert module.root is None
    data.load("python:mine.pairs", size=3, root=str(tmp_path))
    assert module.root == tmp_path
    with pytest.raises(UserError, match=r"`python:mine.nothing` to return luce.data.Data, got NoneType"):
        data.load("python:mine.nothing")
    for path in ("mine.absent", "absent.pairs", "pairs"):
        with pytest.raises(UserError, match="to name a function"):
            data.load(f"python:{path}")
