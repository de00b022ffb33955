from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from luce import data
from luce.data import UNLABELLED, Examples
from luce.errors import UserError


@pytest.fixture
def examples() -> Examples:
    """Rows 5, 3, 1 of six; the input is ten times the row, the label its remainder by three."""
    source = TensorDataset(10 * torch.arange(6.0)[:, None], torch.arange(6) % 3)
    return Examples(source, [5, 3, 1])


def test_items_know_their_place_in_the_source(examples):
    item = examples[1]
    assert item["input"].tolist() == [30.0]
    assert item["target"].dtype == torch.int64
    assert item["target"].tolist() == 0
    assert item["index"] == 3


def test_a_batch_is_its_items(examples):
    batch = examples.batch([2, 0, 2])
    assert batch["input"].tolist() == [[10.0], [50.0], [10.0]]
    assert batch["target"].tolist() == [1, 2, 1]
    assert batch["index"].tolist() == [1, 5, 1]


def test_other_collate_functions_see_a_list_of_items(examples):
    rows = examples.__getitems__([0, 2])
    assert [item["index"] for item in rows] == [5, 1]
    assert len(rows) == 2
    batch = next(iter(DataLoader(examples, batch_size=3)))  # PyTorch's own collate
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input": [[50.0], [30.0], [10.0]],
        "target": [2, 0, 1],
        "index": [5, 3, 1],
    }


def test_given_targets_replace_the_sources(examples):
    relabelled = Examples(examples.source, [5, 3], [UNLABELLED, 1])
    assert relabelled.batch([0, 1])["target"].tolist() == [-1, 1]
    assert [item["index"] for item in relabelled.labelled] == [3]


def test_repeats_cycle(examples):
    assert examples.repeat_to(7).indices.tolist() == [5, 3, 1, 5, 3, 1, 5]
    assert examples.repeat_to(7).targets.tolist() == [2, 0, 1, 2, 0, 1, 2]
    with pytest.raises(UserError, match="at least the 3 examples, got 2"):
        examples.repeat_to(2)


def test_examples_refuse_what_they_cannot_show(examples):
    with pytest.raises(UserError, match="at least one example"):
        Examples(examples.source, [])
    with pytest.raises(UserError, match=r"indices 0 \.\. 5 .* got 2 \.\. 6"):
        Examples(examples.source, [2, 6])
    with pytest.raises(UserError, match="2 targets like `indices`, got 1"):
        Examples(examples.source, [2, 3], [0])


def test_split_parts_are_distinct_and_test_stays_whole():
    digits = data.load("sklearn:digits")
    train, validation, test = data.split(digits, validation=0.2, seed=1)
    assert sorted(train.indices.tolist() + validation.indices.tolist()) == list(range(1297))
    assert len(validation) == 259  # round(0.2 * 1297)
    assert test.source is digits.test
    assert test.indices.tolist() == list(range(500))
    shares = validation.targets.bincount() / digits.train.targets.bincount()
    assert float((shares - 0.2).abs().max()) < 1 / 100  # a row of about 130 either way
    same, other = (data.split(digits, validation=259, seed=seed)[1] for seed in (1, 2))
    assert validation.indices.equal(same.indices)
    assert not validation.indices.equal(other.indices)


@pytest.mark.parametrize("validation", [0.0, 1.0, -0.1, 0, 9, 1297])
def test_split_refuses_sizes_without_every_class(validation):
    with pytest.raises(UserError, match=r"validation|hold out"):
        data.split(data.load("sklearn:digits"), validation=validation, seed=0)


def test_keep_labels_keeps_so_many_of_each_class():
    train, _, _ = data.split(data.load("sklearn:digits"), validation=0.1, seed=0)
    few = data.keep_labels(train, per_class=7, seed=0)
    assert few.indices.equal(train.indices)
    assert few.labelled.targets.bincount().tolist() == [7] * 10
    kept = few.targets != UNLABELLED
    assert few.targets[kept].equal(train.targets[kept])
    assert not few.targets.equal(data.keep_labels(train, per_class=7, seed=1).targets)
    assert few.targets.equal(data.keep_labels(train, per_class=7, seed=0).targets)
    fewer = data.keep_labels(few, per_class=2, seed=5)  # chosen among the labels still there
    assert set(fewer.labelled.indices.tolist()) <= set(few.labelled.indices.tolist())


def test_keep_labels_refuses_more_than_there_are(examples):
    with pytest.raises(UserError, match="at least 2 labels of each class, class 0 has 1"):
        data.keep_labels(examples, per_class=2, seed=0)
    with pytest.raises(UserError, match="`per_class` to be at least 1"):
        data.keep_labels(examples, per_class=0, seed=0)
    with pytest.raises(UserError, match="at least one example"):
        data.keep_labels(Examples(examples.source, [0], [UNLABELLED]), per_class=1, seed=0)
    with pytest.raises(UserError, match="`seed`"):
        data.keep_labels(examples, per_class=1, seed=-1)


def test_keep_labels_leaves_ignored_rows_alone():
    source = TensorDataset(torch.rand(8, 1), torch.tensor([0, 0, 1, 1, -100, -1, 0, 1]))
    few = data.keep_labels(Examples(source, range(8)), per_class=1, seed=0)
    assert few.targets[[4, 5]].tolist() == [-100, -1]
    assert sorted(few.labelled.targets.tolist()) == [0, 1]


def test_indices_are_numbers_of_rows(examples):
    for wrong in (torch.tensor([True, False]), [0.5, 1.0]):
        with pytest.raises(UserError, match="numbers of rows as `indices`, got"):
            Examples(examples.source, wrong)
    with pytest.raises(UserError, match=r"`targets` to be class indices, got torch.float64"):
        Examples(examples.source, [0, 1], [0.5, 1.0])


def test_rows_that_losses_skip_are_not_counted(examples):
    some = Examples(examples.source, [5, 3, 1], [-100, -1, 1])
    assert [item["index"] for item in some.counted] == [3, 1]
    assert [item["index"] for item in some.labelled] == [1]
    assert examples.counted is examples
