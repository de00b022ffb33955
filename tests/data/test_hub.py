from __future__ import annotations

import numpy as np
import pytest
import torch

from luce import data
from luce.errors import UserError

datasets = pytest.importorskip("datasets", reason="needs the extra [text]")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

LABELS = datasets.ClassLabel(names=["no", "yes"])


def grey(value, size=(4, 3)):
    return Image.fromarray(np.full(size[::-1], value, np.uint8))


@pytest.fixture
def hub(monkeypatch):
    """Puts splits where `load_dataset` finds them."""

    def put(features, **splits):
        made = datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(columns, features=datasets.Features(features))
                for split, columns in splits.items()
            }
        )
        monkeypatch.setattr(datasets, "load_dataset", lambda name, config, cache_dir: made)

    return put


def test_lists_of_numbers(hub):
    columns = {"x": [[1.0, 2.0], [3.0, 4.0]], "y": [1, 0], "note": ["a", "b"]}
    features = {
        "x": datasets.Sequence(datasets.Value("float64")),
        "y": LABELS,
        "note": datasets.Value("string"),
    }
    hub(features, train=columns, test=columns)
    it = data.load("hf:some/numbers")
    assert it.name == "hf:some/numbers"
    assert it.classes == ("no", "yes")
    assert it.input_shape == (2,)
    assert it.train[1][0].tolist() == [3.0, 4.0]
    assert it.train[1][0].dtype == torch.float32
    assert it.train.targets.tolist() == [1, 0]
    assert it.mean == (2.0, 3.0)
    assert it.std == (1.0, 1.0)


def test_images_of_one_size_are_held_in_memory(hub):
    columns = {"image": [grey(0), grey(51)], "label": [0, 1]}
    hub({"image": datasets.Image(), "label": LABELS}, train=columns, validation=columns)
    it = data.load("hf:some/digits")
    assert it.input_shape == (1, 3, 4)
    assert it.train.inputs.dtype == torch.uint8
    torch.testing.assert_close(it.test[1][0], torch.full((1, 3, 4), 0.2))


def test_images_of_several_sizes_need_a_size(hub, caplog):
    columns = {"image": [grey(0), grey(51, size=(9, 5))], "label": [0, 1]}
    hub({"image": datasets.Image(), "label": LABELS}, train=columns, test=columns)
    with pytest.raises(
        UserError, match=r"train\[0\]\['image'\] \(4 x 3\) and train\[1\]\['image'\] \(9 x 5\)"
    ):
        data.load("hf:some/photos")
    it = data.load("hf:some/photos", image_size=8)
    assert it.input_shape == (3, 8, 8)
    torch.testing.assert_close(it.test[1][0], torch.full((3, 8, 8), 0.2))
    torch.testing.assert_close(it.train[1][0], torch.full((3, 8, 8), 0.2))
    assert it.train.plain is it.train
    # The short side of 3 pixels becomes int(8 / 0.95) = 8.
    assert "short side to 8, centre crop of 8 x 8; smaller images are enlarged, 4 x 3 by 2.67" in caplog.text
    assert (
        "2 test rows, 2 classes; test rows from split `test`; inputs from column `image`, labels from `label`"
        in caplog.text
    )


def test_random_crops_are_asked_for(hub):
    columns = {"image": [grey(0), grey(51)], "label": [0, 1]}
    hub({"image": datasets.Image(), "label": LABELS}, train=columns, test=columns)
    it = data.load("hf:some/photos", image_size=8, random_crop=True)
    assert it.train.plain is not it.train
    assert it.test.plain is it.test


def test_images_of_the_splits_have_one_shape(hub):
    colour = Image.new("RGB", (4, 3), (51, 0, 255))
    features = {"image": datasets.Image(), "label": LABELS}
    train = {"image": [grey(0), grey(51)], "label": [0, 1]}
    hub(features, train=train, test={"image": [grey(51), colour], "label": [0, 1]})
    it = data.load("hf:some/photos")
    assert it.input_shape == (3, 3, 4)
    torch.testing.assert_close(it.train[1][0], torch.full((3, 3, 4), 0.2))
    torch.testing.assert_close(it.test[1][0][:, 0, 0], torch.tensor([0.2, 0.0, 1.0]))
    hub(features, train=train, test={"image": [grey(0, size=(5, 5))], "label": [0]})
    with pytest.raises(UserError, match=r"train\[0\].*4 x 3.*test\[0\].*5 x 5"):
        data.load("hf:some/photos")


def test_images_of_all_modes_look_as_in_a_folder(hub):
    deep = Image.fromarray(np.full((3, 4), 13107, np.uint16))  # 65535 / 5
    clear = Image.new("RGBA", (4, 3), (51, 51, 51, 0))
    columns = {"image": [deep, clear], "label": [0, 1]}
    hub({"image": datasets.Image(), "label": LABELS}, train=columns, test=columns)
    for it in (data.load("hf:some/scans"), data.load("hf:some/scans", image_size=3)):
        torch.testing.assert_close(it.train[0][0][:, 0, 0], torch.full((3,), 0.2))
        torch.testing.assert_close(it.train[1][0][:, 0, 0], torch.ones(3))


def test_missing_and_damaged_images_are_named(hub):
    features = {"image": datasets.Image(), "label": LABELS}
    good = {"image": [grey(0), grey(51)], "label": [0, 1]}
    hub(features, train={"image": [grey(0), None], "label": [0, 1]}, test=good)
    with pytest.raises(UserError, match=r"expected an image in train\[1\]\['image'\], got none"):
        data.load("hf:some/photos")
    hub(features, train=good, test={"image": [{"bytes": b"rubbish", "path": None}], "label": [0]})
    with pytest.raises(
        UserError, match=r"cannot read the image test\[0\]\['image'\] \(its content is no image"
    ):
        data.load("hf:some/photos")


def test_empty_splits_are_named(hub):
    features = {"image": datasets.Image(), "label": LABELS}
    hub(features, train={"image": [grey(0)], "label": [0]}, test={"image": [], "label": []})
    with pytest.raises(UserError, match="expected rows in the split `test` of `some/photos`, got none"):
        data.load("hf:some/photos")


def test_arrays_of_bytes_are_images(hub, caplog):
    features = {"image": datasets.Array3D((2, 2, 3), "uint8"), "label": LABELS}
    columns = {"image": [np.full((2, 2, 3), 51, np.uint8)] * 2, "label": [0, 1]}
    hub(features, train=columns, test=columns)
    assert float(data.load("hf:some/arrays").train[0][0].mean()) == pytest.approx(0.2)
    assert "channels last" in caplog.text
    with pytest.raises(UserError, match="column `image` holds none"):
        data.load("hf:some/arrays", image_size=8)


def test_a_folder_of_parquet_files(tmp_path):
    columns = {"image": [grey(0), grey(255)], "label": [0, 1]}
    rows = datasets.Dataset.from_dict(
        columns, features=datasets.Features({"image": datasets.Image(), "label": LABELS})
    )
    for split in ("train", "test"):
        rows.to_parquet(str(tmp_path / "set" / f"{split}.parquet"))
    it = data.load(f"hf:{tmp_path / 'set'}", root=tmp_path / "cache")
    assert it.classes == ("no", "yes")
    assert [int(image.mean()) for image, _ in (it.test[0], it.test[1])] == [0, 1]


def test_columns_that_cannot_be_told(hub):
    numbers = datasets.Sequence(datasets.Value("float32"))
    columns = {"a": [[1.0]], "b": [[2.0]], "fine": [0], "coarse": [0], "text": ["x"]}
    features = {
        "a": numbers,
        "b": numbers,
        "fine": LABELS,
        "coarse": LABELS,
        "text": datasets.Value("string"),
    }
    hub(features, train=columns, test=columns)
    with pytest.raises(UserError, match="`input_column`: 2 columns fit; name one of a, b"):
        data.load("hf:some/set")
    with pytest.raises(UserError, match="`label_column`: 2 columns fit; name one of fine, coarse"):
        data.load("hf:some/set", input_column="b")
    with pytest.raises(UserError, match="unknown `label_column` `fin`; did you mean `fine`"):
        data.load("hf:some/set", input_column="b", label_column="fin")
    with pytest.raises(UserError, match="class indices in column `text`"):
        data.load("hf:some/set", input_column="b", label_column="text")
    it = data.load("hf:some/set", input_column="b", label_column="coarse")
    assert it.train[0][0].tolist() == [2.0]


def test_neither_numbers_nor_texts(hub):
    columns = {"when": [1], "label": [0]}
    hub({"when": datasets.Value("int64"), "label": LABELS}, train=columns, test=columns)
    with pytest.raises(UserError, match="no column has a fitting type; name one of when, label"):
        data.load("hf:some/set")


def test_lists_of_several_lengths_and_missing_splits(hub):
    features = {"x": datasets.Sequence(datasets.Value("float32")), "y": LABELS}
    ragged = {"x": [[1.0], [1.0, 2.0]], "y": [0, 1]}
    hub(features, train=ragged, other=ragged)
    with pytest.raises(UserError, match="expected a split `test` in `some/set`, got train, other"):
        data.load("hf:some/set")
    with pytest.raises(UserError, match="equal length in column `x`"):
        data.load("hf:some/set", test_split="other")


def test_what_datasets_cannot_load(monkeypatch):
    def refuse(name, config, cache_dir):
        raise FileNotFoundError("no such data set\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"could not load `some/set`: no such data set$"):
        data.load("hf:some/set")


def test_labels_of_several_kinds(hub):
    numbers = datasets.Sequence(datasets.Value("float64"))

    def load(kind, labels, test_labels=(0, 1)):
        features = {"x": numbers, "y": datasets.Value(kind)}
        columns = ({"x": [[0.0]] * len(part), "y": list(part)} for part in (labels, test_labels))
        hub(features, **dict(zip(("train", "test"), columns, strict=True)))
        return data.load("hf:some/set", label_column="y")

    assert load("bool", [True, False]).train.targets.tolist() == [1, 0]
    assert load("int8", [1, 0, -1]).train.targets.tolist() == [1, 0, -1]
    with pytest.raises(UserError, match=r"column `y` to be class indices.*give -1 .*\(label 1 is nan\)"):
        load("int64", [1, None, 0])
    with pytest.raises(UserError, match=r"column `y` to be class indices.*`labels.long"):
        load("float32", [1.0, 0.0])
    with pytest.raises(UserError, match="labels in the test part of `hf:some/set`, got none in 2 rows; name"):
        load("int64", [1, 0], [-1, -1])


def test_files_that_datasets_cannot_read_are_named_with_the_cause(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.csv").write_text("x,label\n1,0\n2,1,3,4\n")
    (tmp_path / "set/test.csv").write_text("x,label\n1,0\n")
    with pytest.raises(UserError, match=r"could not load .*Expected 2 fields in line 3, saw 4"):
        data.load(f"hf:{tmp_path / 'set'}", root=tmp_path / "cache")
