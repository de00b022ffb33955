from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch

from luce import data
from luce.data.listing import SUFFIXES, list_images
from luce.errors import UserError

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def paint(path, colour=(0, 0, 0), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Images of two sizes in two classes, and a file that is none."""
    for part, count in (("train", 4), ("val", 2)):
        for i in range(count):
            paint(tmp_path / part / "ash" / f"{i}.png", (255, 0, 0))
            paint(tmp_path / part / "beech" / f"{i}.JPEG", (0, 0, 255), size=(30, 50))
    (tmp_path / "train" / "ash" / "notes.txt").write_text("not an image")
    return tmp_path


@pytest.fixture
def small(tmp_path):
    """Images of 6 x 4 pixels, noise, in two classes."""
    noise = np.random.default_rng(0)
    for part, name in ((part, name) for part in ("train", "test") for name in ("ash", "beech")):
        for i in range(3):
            paint(tmp_path / part / name / f"{i}.png")
            pixels = noise.integers(0, 256, (4, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_layout(folder, caplog):
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
    (line,) = caplog.messages
    assert line == (
        f"imagefolder:{folder}: train 8 images in 2 classes, val 4 images in 2 classes; short side to 16, "
        "centre crop of 16 x 16; RGB, mean and std of ImageNet; left out files that are no images: "
        "1 (train/ash/notes.txt)"
    )


def test_a_path_may_be_written_in_several_ways(folder, monkeypatch):
    names = [f"imagefolder:{folder}/", "imagefolder:~/", f"imagefolder:../{folder.name}"]
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    loaded = [data.load(name, image_size=8) for name in names]
    loaded.append(data.load(f"imagefolder:{folder.name}", root=folder.parent, image_size=8))
    for it in loaded:
        assert len(it.train) == 8
        assert it.train[7][0].equal(loaded[0].train[7][0])


# What counts ------------------------------------------------------------------------------------------------


def test_test_comes_before_val(folder, caplog):
    paint(folder / "test" / "beech" / "0.png", (0, 0, 255))
    it = data.load(f"imagefolder:{folder}", image_size=8)
    assert it.test.targets.tolist() == [1]  # numbered as in train though ash is absent
    assert "; val is not used: validation rows come from train;" in caplog.text
    assert "no row in the test part" in caplog.text


def test_a_test_folder_without_classes_is_not_used(folder, caplog):
    paint(folder / "test" / "0.png")
    assert len(data.load(f"imagefolder:{folder}", image_size=8).test) == 4
    assert "test is not used, as no folder in it holds images" in caplog.text


def test_hidden_files_and_folders_are_left_out(small, caplog):
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/0.png", "ash/@eaDir/0.png", "ash/.cache/0.png"):
        paint(small / "train" / name)
    for name in ("ash/._0.png", "ash/.DS_Store", "ash/Thumbs.db", "beech/desktop.ini"):
        (small / "train" / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    it = data.load(f"imagefolder:{small}")
    assert it.classes == ("ash", "beech")
    assert len(it.train) == 6
    hidden = "8 (train/.ipynb_checkpoints, train/__MACOSX, train/ash/.DS_Store, ...)"
    assert f"left out hidden files and folders: {hidden}" in caplog.text


@pytest.mark.parametrize("suffix", ["gif", "jfif", "jpe", "webp", "pgm", "bmp", "TIF", "Png", "tga", "jp2"])
def test_every_raster_format_counts(small, suffix):
    paint(small / "train" / "ash" / f"9.{suffix}", (255, 255, 255), size=(6, 4))
    it = data.load(f"imagefolder:{small}")
    assert len(it.train) == 7
    assert float(it.train[3][0].min()) > 0.98  # the last of ash


def test_pillow_knows_all_suffixes():
    assert set(Image.registered_extensions()) >= SUFFIXES - {".avif", ".avifs"}  # not in every build


def test_nested_folders_belong_to_their_class(small, caplog):
    paint(small / "train" / "ash" / "old" / "deep" / "8.png", (255, 255, 255), size=(6, 4))
    paint(small / "train" / "ash" / "10.png", (51, 51, 51), size=(6, 4))
    it = data.load(f"imagefolder:{small}")
    assert it.train.targets.tolist() == [0] * 5 + [1] * 3
    # In the order of the names: 0, 1, 10, 2, old/deep/8.
    assert float(it.train[2][0].mean()) == pytest.approx(0.2)
    assert float(it.train[4][0].mean()) == 1
    assert "1 of the images lie in folders below that of their class" in caplog.text


def test_the_order_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    for name in ("b/2.png", "b/1.png", "a/x/3.png", "a/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    scandir, names = os.scandir, []

    class Scan:
        def __init__(self, path):
            self.entries = sorted(scandir(path), key=lambda entry: entry.name, reverse=names != [])

        def __enter__(self):
            return self.entries

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Scan)
    names = list_images(tmp_path).names
    assert names == list_images(tmp_path).names == ["a/4.png", "a/x/3.png", "b/1.png", "b/2.png"]


def test_links_are_followed_without_end(small, caplog):
    (small / "elsewhere").mkdir()
    paint(small / "elsewhere" / "9.png", size=(6, 4))
    (small / "train" / "cedar").symlink_to(small / "elsewhere")
    (small / "train" / "ash" / "8.png").symlink_to(small / "elsewhere" / "9.png")
    (small / "train" / "ash" / "round").symlink_to(small / "train")
    (small / "train" / "ash" / "gone.png").symlink_to(small / "nowhere")
    (small / "train" / "ash" / "itself").symlink_to(small / "train" / "ash" / "itself")
    it = data.load(f"imagefolder:{small}")
    assert it.train.targets.tolist() == [0] * 4 + [1] * 3 + [2]
    assert "left out broken links: 2 (train/ash/gone.png, train/ash/itself)" in caplog.text
    assert "left out links that lead back: 1 (train/ash/round)" in caplog.text


def test_names_need_not_be_utf_8(small, caplog):
    place = os.fsencode(small / "train") + b"/caf\xe9"
    try:
        os.mkdir(place)
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    with open(place + b"/\xff.png", "wb") as file:
        Image.new("RGB", (6, 4), (255, 255, 255)).save(file, "PNG")
    it = data.load(f"imagefolder:{small}")
    assert it.classes == ("ash", "beech", "caf\\xe9")
    assert float(it.train[6][0].min()) == 1
    with open(place + b"/\xff.png", "wb") as file:
        file.write(b"rubbish")
    with pytest.raises(UserError, match=r"cannot read the image .*caf\\xe9/\\xff.png"):
        data.load(f"imagefolder:{small}")


def test_messages_stay_on_one_line(small, caplog):
    (small / "train" / "ash" / "Icon\r").touch()
    paint(small / "train" / "two\nlines" / "0.png", size=(6, 4))
    assert data.load(f"imagefolder:{small}").classes == ("ash", "beech", "two\\nlines")
    assert "left out files that are no images: 1 (train/ash/Icon\\r)" in caplog.messages[0]


def test_a_folder_that_cannot_be_read_is_named(small, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("beech"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot read the folder .*train/beech \(Permission denied\)"):
        data.load(f"imagefolder:{small}")


def test_phantom_classes_are_named(small, caplog):
    (small / "train" / "cedar").mkdir()
    (small / "train" / "downloads").mkdir()
    (small / "train" / "downloads" / "list.csv").touch()
    paint(small / "train" / "ash.png")
    it = data.load(f"imagefolder:{small}")
    assert it.classes == ("ash", "beech")
    assert "folders of train without images are no classes: 2 (cedar, downloads)" in caplog.text
    assert "left out images beside the class folders: 1 (train/ash.png)" in caplog.text


def test_a_single_class_is_named(tmp_path, caplog):
    for part in ("train", "test"):
        paint(tmp_path / part / "all" / "0.png")
    data.load(f"imagefolder:{tmp_path}")
    assert "there is only one class, all" in caplog.text


def test_training_images_as_test_images_are_noticed(tmp_path, caplog):
    for name in ("ash", "beech"):
        paint(tmp_path / "train" / name / "0.png")
    (tmp_path / "test").symlink_to("train")
    data.load(f"imagefolder:{tmp_path}")
    assert "test is, or leads by links to, folders of train" in caplog.text


def test_a_link_from_a_class_of_test_to_that_of_train_is_noticed(small, caplog):
    shutil.rmtree(small / "test" / "ash")
    (small / "test" / "ash").symlink_to("../train/ash")
    data.load(f"imagefolder:{small}")
    assert "test is, or leads by links to, folders of train" in caplog.text


def test_names_in_two_forms_of_unicode_are_one_class(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for place in (f"train/{composed}", "train/dog", f"test/{decomposed}", "test/dog"):
        paint(tmp_path / place / "0.png")
    it = data.load(f"imagefolder:{tmp_path}")
    assert it.classes == (composed, "dog")
    assert it.test.targets.tolist() == [0, 1]
    assert it.test[0][0].shape == it.train[0][0].shape


def test_a_name_with_the_word_train_makes_no_warning_of_the_test_part(tmp_path, caplog):
    root = tmp_path / "training"  # not taken for the training part
    for place in ("train/ash", "train/beech", "test/ash"):
        paint(root / place / "0.png")
    data.load(f"imagefolder:{root}")
    assert "1 of 2 classes have no row in the test part" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"expected a folder .*absent/train.* got no folder .*absent"):
        data.load(f"imagefolder:{tmp_path}/absent")
    with pytest.raises(
        UserError, match=r"such as .*ash/train/cat/1.jpg, got only 2 \(0.png, 1.png\) in .*ash"
    ):
        data.load(f"imagefolder:{tmp_path}/val/ash")
    paint(tmp_path / "half" / "train" / "a" / "0.png")
    (tmp_path / "half" / "z").mkdir()
    with pytest.raises(UserError, match=r"half/test or val .*cat/1.jpg, got only 2 \(train, z\)"):
        data.load(f"imagefolder:{tmp_path}/half")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    paint(tmp_path / "flat" / "train" / "0.png")
    with pytest.raises(UserError, match="got 0 class folders, 1 images beside the class folders"):
        data.load(f"imagefolder:{tmp_path}/flat")


def test_a_class_of_the_test_images_must_be_in_train(folder):
    paint(folder / "val" / "cedar" / "0.png", (0, 255, 0))
    with pytest.raises(UserError, match="`cedar` has none"):
        data.load(f"imagefolder:{folder}")


# What images become -----------------------------------------------------------------------------------------


def test_images_of_one_size_stay_as_they_are(small, caplog):
    it = data.load(f"imagefolder:{small}")
    assert it.input_shape == (3, 4, 6)
    pixels = np.asarray(Image.open(small / "train" / "beech" / "1.png"))
    torch.testing.assert_close(it.train[4][0], torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)
    assert it.train.plain is it.train
    assert "6 x 4 as they are; RGB, mean and std of ImageNet" in caplog.text


def test_images_of_several_sizes_need_a_size(folder):
    with pytest.raises(UserError, match=r"`image_size`.*ash/0.png \(40 x 30\).*beech/0.JPEG \(30 x 50\)"):
        data.load(f"imagefolder:{folder}")


def test_another_size_beyond_the_sample_is_found_when_read(small, monkeypatch):
    monkeypatch.setattr("luce.data.headers.MOST", 4)  # of 12 files, those at 0, 3, 6 and 9
    paint(small / "train" / "beech" / "1.png", size=(7, 4))
    it = data.load(f"imagefolder:{small}")
    with pytest.raises(UserError, match=r"`image_size`.*beech/1.png \(7 x 4\) and others \(6 x 4\)"):
        it.train[4]


def test_a_turned_image_has_the_size_that_people_see(small):
    turn = Image.Exif()
    turn[0x0112] = 6
    Image.new("RGB", (4, 6)).save(small / "train" / "ash" / "0.jpg", exif=turn)
    assert data.load(f"imagefolder:{small}").train[0][0].shape == (3, 4, 6)


def test_enlarged_images_are_told(small, caplog):
    data.load(f"imagefolder:{small}", image_size=19)
    # The short side of 4 pixels becomes int(19 / 0.95) = 20.
    assert "short side to 20, centre crop of 19 x 19; smaller images are enlarged, 6 x 4 by 5;" in caplog.text
    caplog.clear()
    data.load(f"imagefolder:{small}", image_size=4)
    assert "are enlarged" not in caplog.text


def test_only_the_first_frame_of_a_file_counts(small, caplog):
    frames = [Image.new("RGB", (6, 4), (shade, shade, shade)) for shade in (51, 255)]
    frames[0].save(small / "train" / "ash" / "3.gif", save_all=True, append_images=frames[1:])
    it = data.load(f"imagefolder:{small}")
    assert float(it.train[3][0].mean()) == pytest.approx(0.2)
    assert "of animated images only the first frame counts: 1 (" in caplog.text


def test_training_rows_vary_only_if_asked(small):
    it = data.load(f"imagefolder:{small}", image_size=16)
    assert it.train[0][0].equal(it.train[0][0])
    assert it.train.plain is it.train
    it = data.load(f"imagefolder:{small}", image_size=16, random_crop=True)
    assert not it.train[0][0].equal(it.train[0][0])
    assert it.train.plain[0][0].equal(it.train.plain[0][0])
    train, validation, _ = data.split(it, validation=2, seed=0)
    assert train.source is it.train
    assert train.plain.indices.equal(train.indices)
    for _ in range(2):  # validation rows are plain, and batches too
        batch = next(iter(data.loader(validation, batch_size=2, seed=None)))
        expected = torch.stack([it.train.plain[i][0] for i in batch["index"].tolist()])
        assert batch["input"].equal(expected)
    kept, held = data.hold_out(train, 0.5, seed=0)
    assert (kept.random, held.random) == (True, False)


@pytest.mark.parametrize("size", [0, -1, 1.5, "224", True, 10**9])
def test_impossible_sizes_are_refused(small, size):
    with pytest.raises(UserError, match="`image_size` to be a positive number of pixels"):
        data.load(f"imagefolder:{small}", image_size=size)


def test_random_crops_need_a_size_and_a_truth_value(small):
    with pytest.raises(UserError, match="`random_crop` to be true or false, got 'no'"):
        data.load(f"imagefolder:{small}", image_size=8, random_crop="no")
    with pytest.raises(UserError, match="`image_size`, the side of the crops, with `random_crop`"):
        data.load(f"imagefolder:{small}", random_crop=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(folder, workers):
    path = folder / "train" / "beech" / "2.JPEG"
    Image.effect_noise((64, 64), 99).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    it = data.load(f"imagefolder:{folder}", image_size=8)
    examples = data.Examples(it.train, [6])
    with pytest.raises(UserError, match="cannot read the image") as caught:
        list(data.loader(examples, batch_size=1, seed=0, workers=workers))
    assert str(path) in str(caught.value)
    assert "replace or delete it" in str(caught.value)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"2.JPEG \(its content is no image that Pillow knows\); replace"):
        data.load(f"imagefolder:{folder}", image_size=8)
