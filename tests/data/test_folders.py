from __future__ import annotations

import numpy as np
import pytest
import torch

from luce import data
from luce.errors import UserError

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def paint(path, colour, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        for i in range(count):
            paint(tmp_path / part / "ash" / f"{i}.png", (255, 0, 0))
            paint(tmp_path / part / "beech" / f"{i}.JPEG", (0, 0, 255), size=(30, 50))
    (tmp_path / "train" / "ash" / "notes.txt").write_text("not an image")
    return tmp_path


def test_layout(folder):
    it = data.load(f"imagefolder:{folder}", image_size=16)
    assert it.classes == ("ash", "beech")
    assert it.input_shape == (3, 16, 16)
    assert it.train.targets.tolist() == [0] * 4 + [1] * 4
    assert it.test.targets.tolist() == [0, 0, 1, 1]
    for part in (it.train, it.test):
        for image, label in (part[i] for i in range(len(part))):
            colour = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]][label])
            # JPEG is lossy; a plain colour moves by a few steps of 255.
            torch.testing.assert_close(image.mean((1, 2)), colour, atol=0.02, rtol=0)


def test_a_path_may_be_relative_to_root(folder):
    assert len(data.load(f"imagefolder:{folder.name}", root=folder.parent, image_size=8).train) == 8


def test_test_comes_before_val(folder):
    paint(folder / "test" / "beech" / "0.png", (0, 0, 255))
    it = data.load(f"imagefolder:{folder}", image_size=8)
    assert it.test.targets.tolist() == [1]  # numbered as in train though ash is absent


def test_training_rows_vary_and_plain_ones_do_not(folder):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "train" / "ash" / "0.png")
    it = data.load(f"imagefolder:{folder}", image_size=16)
    assert not it.train[0][0].equal(it.train[0][0])
    assert it.train.plain[0][0].equal(it.train.plain[0][0])
    train, validation, _ = data.split(it, validation=2, seed=0)
    assert train.source is it.train
    assert train.plain.indices.equal(train.indices)
    for _ in range(2):  # validation rows are plain, and batches too
        batch = next(iter(data.loader(validation, batch_size=2, seed=None)))
        expected = torch.stack([it.train.plain[i][0] for i in batch["index"].tolist()])
        assert batch["input"].equal(expected)
    kept, held = data.hold_out(train, 0.4, seed=0)
    assert (kept.random, held.random) == (True, False)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(folder, workers):
    path = folder / "train" / "beech" / "2.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    it = data.load(f"imagefolder:{folder}", image_size=8)
    examples = data.Examples(it.train, [6])
    with pytest.raises(UserError, match="cannot read the image") as caught:
        list(data.loader(examples, batch_size=1, seed=0, workers=workers))
    assert str(path) in str(caught.value)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"expected a folder .*absent/train"):
        data.load(f"imagefolder:{tmp_path}/absent")
    (folder / "train" / "cedar").mkdir()
    with pytest.raises(UserError, match=r"expected images .*cedar, got none"):
        data.load(f"imagefolder:{folder}")
    (folder / "train" / "cedar").rmdir()
    paint(folder / "val" / "cedar" / "0.png", (0, 255, 0))
    with pytest.raises(UserError, match="`cedar` is not"):
        data.load(f"imagefolder:{folder}")
