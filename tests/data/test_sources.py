from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from luce.data import InMemory
from luce.data.sources import Part, Wrapped, as_source
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
    with pytest.raises(UserError, match=r"class indices.*\(2, 1\)"):
        InMemory(torch.zeros(2, 1), torch.tensor([[0], [1]]))


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


def test_wrapped_spares_reading_where_targets_are_stated():
    dataset = Listed((torch.zeros(1), 0), (torch.zeros(1), 1))
    dataset.targets = [0, 1]
    assert Wrapped(dataset).targets.tolist() == [0, 1]
    assert dataset.reads == 0


def test_wrapped_distrusts_targets_beside_a_target_transform():
    dataset = Listed((torch.zeros(1), 1), (torch.zeros(1), 0))
    dataset.targets, dataset.target_transform = [0, 1], lambda label: 1 - label
    assert Wrapped(dataset).targets.tolist() == [1, 0]


def test_wrapped_says_what_an_item_should_be():
    with pytest.raises(UserError, match=r"item 0.*\(input, label\).*got str"):
        as_source(Listed("row"))
    with pytest.raises(UserError, match=r"item 1 to be a tensor or an array, got list"):
        as_source(Listed((torch.zeros(1), 0), ([1.0], 0)))[1]


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
