from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from luce import data
from luce.data import InMemory
from luce.data.forms import class_indices
from luce.data.sources import Part, Wrapped, as_source, check_finite
from luce.errors import UserError


class Listed(Dataset):
    """Items as given, nothing else known."""

    def __init__(self, *items):
        self.items = items
        self.reads = 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads += 1
        return self.items[index]


def test_bytes_stay_bytes_and_are_read_as_shares_of_255():
    images = torch.tensor([[[[0, 51, 255]]], [[[102, 1, 2]]]], dtype=torch.uint8)
    source = InMemory(images, torch.tensor([1, 0]))
    assert source.inputs.dtype == torch.uint8
    image, label = source[0]
    torch.testing.assert_close(image, torch.tensor([[[0.0, 0.2, 1.0]]]))
    assert label == 1
    assert isinstance(label, int)
    torch.testing.assert_close(source.batch(torch.tensor([1, 0]))[:, 0, 0, 1], torch.tensor([1 / 255, 0.2]))
    assert images.tolist()[0] == [[[0, 51, 255]]]  # reading leaves the stored bytes alone


@pytest.mark.parametrize(
    ("stored", "read"),
    [(torch.float64, torch.float32), (torch.float32, torch.float32), (torch.int64, torch.int64)],
)
def test_dtypes_as_read(stored, read):
    source = InMemory(torch.ones(2, 3, dtype=stored), torch.tensor([0, 1]))
    assert source[0][0].dtype == source.batch(torch.tensor([0])).dtype == read


def test_labels_must_be_one_index_per_input():
    with pytest.raises(UserError, match="2 inputs and 3 labels"):
        InMemory(torch.zeros(2, 1), torch.tensor([0, 1, 1]))
    with pytest.raises(UserError, match=r"class indices.*float32"):
        InMemory(torch.zeros(2, 1), torch.tensor([0.0, 1.0]))
    with pytest.raises(UserError, match=r"class indices.*\(2, 3\)"):
        InMemory(torch.zeros(2, 1), torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("as_dict", [False, True])
def test_wrapped_reads_pairs_and_dicts(as_dict):
    pairs = [
        (np.array([0, 255], np.uint8), 1),
        (torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor(0)),
    ]
    items = [{"input": x, "target": y} for x, y in pairs] if as_dict else pairs
    source = as_source(Listed(*items))
    assert source.targets.tolist() == [1, 0]
    assert source[0][0].tolist() == [0.0, 1.0]
    assert source[1][0].dtype == torch.float32
    assert source.batch(torch.tensor([1, 0])).tolist() == [[3.0, 4.0], [0.0, 1.0]]


def labelled(targets, labels):
    """A dataset that states ``targets`` and whose items carry ``labels``."""
    dataset = Listed(*((torch.zeros(1), label) for label in labels))
    dataset.targets = targets
    return dataset


def test_wrapped_reads_few_items_where_targets_are_stated():
    dataset = labelled(list(range(300)), range(300))
    assert Wrapped(dataset).targets.tolist() == list(range(300))
    assert dataset.reads == 16


@pytest.mark.parametrize("wrong", [0, 19, 299], ids=["first", "inside", "last"])
def test_items_with_other_labels_than_targets_are_refused(wrong):
    labels = [0] * 300
    labels[wrong] = 3
    with pytest.raises(UserError, match=rf"item {wrong} of .*`Listed`.* label 0 .*`targets`.* got 3.*remove"):
        Wrapped(labelled([0] * 300, labels))


def test_another_label_than_targets_state_is_noticed_when_its_item_is_read():
    labels = [0] * 300
    labels[5] = 2  # not among the sixteen
    source = Wrapped(labelled([0] * 300, labels))
    with pytest.raises(UserError, match=r"item 5 of .* label 0 .* got 2"):
        source.batch(torch.tensor([4, 5]))


def test_a_label_that_is_drawn_anew_on_each_reading_is_refused():
    class Noisy(Listed):
        def __getitem__(self, index):
            value, label = super().__getitem__(index)
            return value, (label + self.reads) % 4

    source = Wrapped(Noisy((torch.zeros(1), 0), (torch.zeros(1), 1)))
    with pytest.raises(UserError, match=r"item 1 of .* to keep its label, which was 3 .* now 0"):
        source[1]


def test_targets_must_be_one_per_item():
    for stated in ([0] * 5, [0, 0]):
        with pytest.raises(UserError, match=f"each of its 4 items, got {len(stated)}; make them agree"):
            Wrapped(labelled(stated, [0] * 4))


def test_a_tensor_dataset_that_changes_labels_as_it_reads_is_wrapped():
    class Swapped(TensorDataset):
        def __getitem__(self, index):
            value, label = super().__getitem__(index)
            return value, 1 - label

    assert as_source(Swapped(torch.zeros(2, 1), torch.tensor([0, 1]))).targets.tolist() == [1, 0]


def test_reading_many_items_for_their_labels_is_announced_once(caplog):
    dataset = Listed(*[(torch.zeros(1), 0)] * 1000)
    as_source(dataset)
    assert dataset.reads == 1000
    assert caplog.text.count("all 1000 items are read once for their labels") == 1


def test_wrapped_distrusts_targets_beside_a_target_transform():
    dataset = Listed((torch.zeros(1), 1), (torch.zeros(1), 0))
    dataset.targets, dataset.target_transform = [0, 1], lambda label: 1 - label
    assert Wrapped(dataset).targets.tolist() == [1, 0]


def test_wrapped_says_what_an_item_should_be():
    with pytest.raises(UserError, match=r"item 0.*\(input, label\).*got str"):
        as_source(Listed("row"))
    with pytest.raises(UserError, match=r"item 0 .*got a tuple of 3"):
        as_source(Listed((torch.zeros(1), 0, 7)))
    with pytest.raises(UserError, match=r"item 0 .*got a dict with `pixel_values`, `labels`"):
        as_source(Listed({"pixel_values": torch.zeros(1), "labels": 0}))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "item 1 to be a tensor or an array, got list"),
        (Image.new("RGB", (2, 2)), "got Image; give the dataset a transform .*ToTensor"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, "got dict; join `a`, `b` into one tensor"),
        (np.array(["x"]), "got ndarray; it holds <U1"),
    ],
    ids=["list", "PIL", "dict", "text"],
)
def test_wrapped_says_what_an_input_should_be(value, message):
    with pytest.raises(UserError, match=message):
        as_source(Listed((torch.zeros(1), 0), (value, 0)))[1]


def test_errors_of_a_datasets_own_code_are_told_as_such():
    class Broken(Listed):
        def __getitem__(self, index):
            if index == 1:
                raise KeyError("scan_007")
            return super().__getitem__(index)

    with pytest.raises(
        UserError, match=r"item 1 of the dataset `Broken` .* raised KeyError: 'scan_007'"
    ) as told:
        as_source(Broken((torch.zeros(1), 0), (torch.zeros(1), 0)))
    assert isinstance(told.value.__cause__, KeyError)


def test_a_dataset_that_overstates_its_length_is_told_so():
    class Short(Listed):
        def __len__(self):
            return 3

    with pytest.raises(UserError, match=r"item 2 of .*3 items.* IndexError: .* make `__len__` and"):
        as_source(Short((torch.zeros(1), 0), (torch.zeros(1), 0)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(1), 0)])


def frame():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"x": [1.0, 2.0], "y": [0, 1]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(Listed((torch.zeros(1), 0))), "got DataLoader; give .*`loader.dataset`"),
        (Stream, "got Stream; .*collect them in a list"),
        (lambda: iter([(torch.zeros(1), 0)]), "got list_iterator; .*collect them in a list"),
        (lambda: "digits.csv", "got str; read it first"),
        (lambda: Path("digits"), "got PosixPath; read it first"),
        (lambda: np.zeros((4, 2)), r"got ndarray; give labels too, as \(inputs, labels\)"),
        (lambda: torch.zeros(4, 2), "got Tensor; give labels too"),
        (lambda: {"train": Listed(), "test": Listed()}, "got dict; give one of its values.* `train`, `test`"),
        (frame, r"got DataFrame; give .*to_numpy\(\)"),
        (lambda: Listed, "got Listed; make an instance"),
        (lambda: data.load("sklearn:iris"), "got Data; give its `train`"),
        (lambda: (np.zeros((4, 2)), np.zeros(4), np.zeros(4)), "pair of arrays, .* got 3 arrays"),
        (lambda: TensorDataset(torch.zeros(4, 2)), "pair of arrays, .* got 1 arrays"),
        (lambda: (torch.zeros(4, 2).to_sparse(), [0] * 4), "got Tensor; make it dense"),
        (lambda: (torch.zeros(4, 2, device="meta"), [0] * 4), "got Tensor; it has no values"),
        (lambda: (np.zeros((2, 2)), np.array([0, 2**64 - 1], np.uint64)), r"some are above 2\*\*63 - 1"),
        (
            lambda: (np.ma.masked_equal(np.arange(4.0)[:, None], 2), [0] * 4),
            "values are masked: fill them in",
        ),
        (
            lambda: (np.zeros((2, 2)), np.ma.masked_equal([0, 1], 1)),
            "got 0, None; .*give -1 where there is",
        ),
        (lambda: None, "got NoneType; give it `__len__` and `__getitem__`"),
    ],
)
def test_other_forms_of_data_are_refused_with_a_way_out(make, message):
    with pytest.raises(UserError, match=message):
        as_source(make())


@pytest.mark.parametrize("kind", [torch.tensor, np.array], ids=["tensor", "array"])
def test_a_pair_of_arrays_is_held_in_memory(kind):
    source = as_source((kind([[1.0, 2.0], [3.0, 4.0]]), kind([1, 0])))
    assert isinstance(source, InMemory)
    assert source.batch(torch.tensor([1])).tolist() == [[3.0, 4.0]]
    assert source.targets.tolist() == [1, 0]


def test_pandas_columns_and_lists_of_labels_make_a_pair():
    rows = frame()
    for labels in (rows["y"], rows["y"].tolist()):
        source = as_source((rows[["x"]], labels))
        assert source.inputs.tolist() == [[1.0], [2.0]]
        assert source.targets.tolist() == [0, 1]


def test_a_list_of_pairs_is_a_dataset():
    source = as_source([(torch.tensor([float(i)]), i % 2) for i in range(3)])
    assert source.targets.tolist() == [0, 1, 0]
    assert source.batch(torch.tensor([2, 0])).tolist() == [[2.0], [0.0]]


@pytest.mark.parametrize(
    "label",
    [1, True, np.int64(1), np.bool_(True), np.uint16(1), torch.tensor(1), torch.tensor([1]), np.array([1]),
     torch.tensor(True), torch.tensor(1, dtype=torch.uint8)],
)  # fmt: skip
def test_labels_of_items_may_be_any_one_integer(label):
    assert as_source([(torch.zeros(1), label)])[0][1] == 1


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([], []),
        ([1, 0], [1, 0]),
        ([torch.tensor(1), torch.tensor(0)], [1, 0]),
        ((True, False), [1, 0]),
        (np.array([[1], [0]], dtype=">i4"), [1, 0]),
        (np.array([3, 2], dtype=np.uint64), [3, 2]),
        (np.arange(3)[::-1], [2, 1, 0]),
        (torch.tensor([[1], [0]]), [1, 0]),
        (torch.tensor([-1, -100, 2**31]), [-1, -100, 2**31]),
    ],
)
def test_labels_in_many_forms(labels, expected):
    found = class_indices(labels)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog"], "got 'cat', 'dog'; number the classes"),
        ([1, None], "got 1, None; .* give -1 where there is no label"),
        ([[1], [1, 2]], r"got \[1\], \[1, 2\]"),
        ([2**70], "got 1180591620717411303424"),
        (torch.eye(3), r"shape \(3, 3\); one-hot and soft labels .*`labels.argmax\(1\)`"),
        (torch.tensor([[0.9, 0.1], [0.5, 0.5]]), r"`labels.argmax\(1\)`"),
        (torch.tensor([[1, 1], [0, 1]]), "one class index for each row"),
        (torch.tensor([0.0, 2.0]), r"float32 .*`labels.long\(\)`"),
        (np.array([0.0, 0.25]), r"float64 .*0\.25 is no class"),
        (torch.tensor([0.0, math.nan]), r"give -1 where there is no label \(label 1 is nan\)"),
        (torch.tensor(3), "one class index for each row"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused_with_a_way_out(labels, message):
    with pytest.raises(UserError, match=message):
        class_indices(labels)


@pytest.mark.parametrize("label", ["cat", None, 0.0, 1.5, math.nan, torch.eye(2)[0], [1, 0], 2**70, 1j])
def test_a_label_of_an_item_that_is_no_class_index_is_named(label):
    with pytest.raises(UserError, match="the label of item 1 to be a class index, got"):
        as_source([(torch.zeros(1), 0), (torch.zeros(1), label)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_are_named_by_their_row(value):
    inputs = torch.zeros(6, 2)
    inputs[4, 1] = value
    with pytest.raises(UserError, match=rf"row 4 holds {value:g}; remove the row, or fill in"):
        InMemory(inputs, torch.zeros(6, dtype=torch.int64))
    source = Part(as_source([(row, 0) for row in inputs]), torch.tensor([4, 3]))
    assert source.batch(torch.tensor([1])).tolist() == [[0.0, 0.0]]
    with pytest.raises(UserError, match=f"row 4 holds {value:g}"):
        source.batch(torch.tensor([1, 0]))


def test_large_finite_inputs_are_finite():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check_finite(torch.full((50, 20), torch.finfo(dtype).max, dtype=dtype))


def test_rows_of_different_shape_are_named():
    source = as_source([(torch.zeros(2), 0), (torch.zeros(2), 0), (torch.zeros(3), 0)])
    with pytest.raises(UserError, match=r"row 1 has \(2,\) .* and row 2 \(3,\)"):
        source.batch(torch.tensor([1, 2]))
    mixed = as_source([(torch.zeros(2), 0), (torch.zeros(2, dtype=torch.int64), 0)])
    with pytest.raises(UserError, match=r"row 0 has .*float32 and row 1 .*int64"):
        mixed.batch(torch.tensor([0, 1]))


def test_inputs_without_a_dimension_of_their_own_are_refused():
    with pytest.raises(UserError, match=r"got \(4,\); .*unsqueeze\(1\)"):
        InMemory(torch.zeros(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match=r"with values in each row, got \(4, 0\)"):
        InMemory(torch.zeros(4, 0), torch.zeros(4, dtype=torch.int64))


def test_tensor_datasets_are_held_in_memory_and_sources_kept():
    source = as_source(TensorDataset(torch.zeros(2, 1), torch.tensor([0, 1])))
    assert isinstance(source, InMemory)
    assert as_source(source) is source


def test_part_numbers_rows_anew():
    part = Part(InMemory(torch.arange(4.0)[:, None], torch.tensor([0, 1, 2, 3])), torch.tensor([3, 1]))
    assert len(part) == 2
    assert part.targets.tolist() == [3, 1]
    assert part[0][0].tolist() == [3.0]
    assert part.batch(torch.tensor([1, 0])).tolist() == [[1.0], [3.0]]
    assert part.plain.batch(torch.tensor([1, 0])).tolist() == [[1.0], [3.0]]
