from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from luce import data
from luce.data.dataset import channel_statistics, stratified
from luce.errors import UserError


def pairs(*labels: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(len(labels)))[:, None], torch.tensor(labels))


def test_channel_statistics_by_hand():
    # Channel 0 holds the shares 0, 0.2, 0.4 and 1: mean 0.4, squares about it 0.16 + 0.04 + 0 + 0.36.
    images = torch.tensor([[[[0, 51]], [[9, 9]]], [[[102, 255]], [[9, 9]]]], dtype=torch.uint8)
    mean, std = channel_statistics(images)
    assert mean == pytest.approx((0.4, 9 / 255))
    assert std == pytest.approx((math.sqrt(0.56 / 4), 1.0))  # a constant channel can be divided by


def test_channel_statistics_across_chunks_agree_with_numpy():
    features = torch.randn(5000, 3, dtype=torch.float64) + torch.tensor([0.0, 1e4, -3.0])
    mean, std = channel_statistics(features)
    assert mean == pytest.approx(tuple(np.mean(features.numpy(), 0)), rel=1e-12, abs=1e-12)
    assert std == pytest.approx(tuple(np.std(features.numpy(), 0)), rel=1e-9)


def test_token_ids_have_no_statistics():
    assert channel_statistics(torch.tensor([[5, 6]])) == ((0.0,), (1.0,))


def test_stratified_keeps_the_shares_of_the_classes():
    targets = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    kept, held_out = stratified(targets, 0.2, seed=3)
    assert targets[held_out].bincount().tolist() == [12, 6, 2]
    assert sorted(kept.tolist() + held_out.tolist()) == list(range(100))
    again, other = stratified(targets, 20, seed=3)[1], stratified(targets, 20, seed=4)[1]
    assert held_out.equal(again)
    assert not held_out.equal(other)


@pytest.mark.parametrize(
    ("labels", "size"),
    [([0, 0, 1, 1, 2, 2], 2), ([0, 0, 1, 1, 2, 2], 4), ([0, 0, 0, 1], 2), ([0] * 99 + [1] * 2, 3)],
    ids=["fewer rows than classes", "too few left", "a class of one", "a rare class"],
)
def test_stratified_refuses_to_lose_a_class(labels, size):
    with pytest.raises(UserError, match=f"cannot hold out {size} of {len(labels)} rows"):
        stratified(torch.tensor(labels), size, seed=0)


def test_from_datasets_describes_what_it_was_given():
    it = data.from_datasets(pairs(0, 1, 2), pairs(2, 0))
    assert (it.classes, it.input_shape, len(it.train), len(it.test)) == (("0", "1", "2"), (1,), 3, 2)
    assert it.mean == (1.0,)
    assert it.std == pytest.approx((math.sqrt(2 / 3),))


def test_from_datasets_holds_out_a_quarter_where_there_is_no_test():
    class Squares(Dataset):
        classes = ("even", "odd")

        def __len__(self):
            return 40

        def __getitem__(self, index):
            return torch.tensor([float(index)]), index % 2

    for train in (Squares(), TensorDataset(torch.arange(40.0)[:, None], torch.arange(40) % 2)):
        it = data.from_datasets(train)
        rows = [[int(x) for x, _ in part] for part in (it.train, it.test)]
        assert [len(part) for part in rows] == [30, 10]
        assert sorted(rows[0] + rows[1]) == list(range(40))
        assert all(int(x) % 2 == label for x, label in it.test)
        assert sum(label for _, label in it.test) == 5
    assert data.from_datasets(Squares()).classes == ("even", "odd")
    assert data.from_datasets(Squares()).std == (1.0,)


def test_data_refuses_empty_parts_and_labels_that_no_class_has():
    with pytest.raises(UserError, match="empty"):
        data.from_datasets(TensorDataset(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(UserError, match="test part of `datasets` is empty"):
        data.from_datasets(pairs(0, 1), TensorDataset(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(
        UserError, match=r"labels 0 \.\. 1 for 2 classes in the test part of `datasets`, got 1 \.\. 2"
    ):
        data.from_datasets(pairs(0, 1), pairs(1, 2))
    with pytest.raises(UserError, match=r"got -2 \.\. 1; number the classes"):
        data.from_datasets(pairs(-2, 0, 1), pairs(0, 1))


def test_rows_without_a_label_stay_in_training_and_out_of_the_split(caplog):
    labels = torch.tensor([0, 1] * 20 + [-1] * 8 + [-100] * 4)
    it = data.from_datasets(TensorDataset(torch.arange(52.0)[:, None], labels))
    assert it.classes == ("0", "1")
    assert it.test.targets.bincount().tolist() == [5, 5]  # a quarter of the labelled rows
    assert [(it.train.targets == label).sum().item() for label in (-1, -100, 0, 1)] == [8, 4, 15, 15]
    assert "the train part of `datasets`: 12 of 42 rows have no label" in caplog.text
    train, validation, _ = data.split(it, validation=0.2, seed=0)
    assert validation.targets.tolist().count(0) == validation.targets.tolist().count(1) == 3
    assert len(train) == 36


def test_a_part_without_any_label_is_refused():
    with pytest.raises(UserError, match="expected labels in the test part of `datasets`, got none in 2 rows"):
        data.from_datasets(pairs(0, 1), pairs(-1, -100))
    with pytest.raises(UserError, match="expected labelled rows to hold out from, got none in 3 rows"):
        data.from_datasets(pairs(-1, -1, -1))


@pytest.mark.parametrize("largest", [2**31, 10**9, 2**62])
def test_large_ids_make_no_classes(largest):
    with pytest.raises(UserError, match=rf"got 3 classes in 4 .*up to {largest}; .*torch.unique"):
        data.from_datasets(pairs(0, 1, 1, largest), pairs(0, 1))
    with pytest.raises(UserError, match=rf"got 0 \.\. {largest}; number"):
        data.from_datasets(pairs(0, 1, 1, largest), pairs(0, 1), classes=["a", "b"])


def test_rows_and_classes_are_told(caplog):
    data.from_datasets(pairs(0, 1, 2), pairs(2, 0))
    assert "`datasets`: 3 training rows, 2 test rows, 3 classes" in caplog.text
    assert "1 of 3 classes have no row in the test part of `datasets`: `1` (1)" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_classes_without_a_training_row_are_named_in_a_warning(caplog):
    data.from_datasets(pairs(1, 2, 2, 5, 1, 5), pairs(1, 2, 5), classes=list("abcdef"))
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [
        "3 of 6 classes have no row in the train part of `datasets`: `a` (0), `d` (3), `e` (4); check the "
        "numbers of the classes, which begin at 0"
    ]


@pytest.mark.parametrize("classes", [2, "ab"])
def test_classes_are_names(classes):
    with pytest.raises(UserError, match="`classes` as a list of names, got"):
        data.from_datasets(pairs(0, 1), pairs(0, 1), classes=classes)


def test_train_and_test_rows_are_alike():
    def rows(*shape, dtype=torch.float32):
        return TensorDataset(torch.ones(2, *shape).to(dtype), torch.tensor([0, 1]))

    data.from_datasets(rows(3, 8, 8), rows(3, 9, 9))
    data.from_datasets(rows(5, dtype=torch.int64), rows(7, dtype=torch.int64))  # token ids
    for other in (rows(1, 8, 8), rows(3, 8), rows(3, 8, 8, dtype=torch.int64)):
        with pytest.raises(
            UserError, match=r"test rows like the training rows, torch.float32 of shape \(3, 8,"
        ):
            data.from_datasets(rows(3, 8, 8), other)


# Names of classes -------------------------------------------------------------------------------------------


class Named(TensorDataset):
    """Rows of two classes with their names, as torchvision's `ImageFolder` states them."""

    def __init__(self, *classes, **stated):
        super().__init__(torch.zeros(8, 1), torch.arange(8) % 2)
        self.classes = list(classes)
        vars(self).update(stated)


def test_datasets_that_number_classes_differently_are_refused():
    with pytest.raises(UserError, match=r"`train` and `test` .* alike, got `ant` and `bee` for class 0"):
        data.from_datasets(Named("ant", "bee"), Named("bee", "cat"))
    with pytest.raises(UserError, match=r"got `bee` and `cat` for class 1"):
        data.from_datasets(Named("ant", "bee"), Subset(Named("ant", "cat"), range(4)))
    with pytest.raises(UserError, match=r"the parts of a dataset .* got `ant` and `bee`"):
        data.from_datasets(ConcatDataset([Named("ant", "bee"), Named("bee", "ant")]))


def test_datasets_of_the_same_classes_fit():
    longer = Named("ant", "bee", "cat")
    longer.tensors = torch.zeros(9, 1), torch.arange(9) % 3
    for test in (Named("ant", "bee"), TensorDataset(torch.zeros(4, 1), torch.arange(4) % 2)):
        assert data.from_datasets(longer, test).classes == ("ant", "bee", "cat")
    mapped = Named("bee", "ant", target_transform=lambda label: 1 - label)
    assert data.from_datasets(Named("ant", "bee"), mapped).classes == ("ant", "bee")


def test_a_subset_has_the_names_of_the_whole():
    whole = Named("ant", "bee")
    assert data.from_datasets(Subset(whole, range(8))).classes == ("ant", "bee")
    assert data.from_datasets(ConcatDataset([whole, whole])).classes == ("ant", "bee")


def test_the_numbers_of_classes_come_before_their_order():
    names = Named("ant", "bee", class_to_idx={"ant": 1, "bee": 0})
    assert data.from_datasets(names).classes == ("bee", "ant")


def test_training_rows_as_test_rows_are_noticed(caplog):
    rows = pairs(0, 1, 0, 1)
    data.from_datasets(rows, rows)
    assert "`test` is `train`: no row is held out" in caplog.text
