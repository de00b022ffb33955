"""Classes of networks and data are matched by their names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from luce.errors import UserError
from luce.models import Classifier
from luce.models.classes import align


def matched(own: list[str] | int, wanted: list[str], **options: str) -> list[str] | None:
    """The network's names in the order that was found; None for the order as it is."""
    order = align(own, wanted, source="runs/t", data="pets", **options)
    return None if order is None else [own[place] for place in order.tolist()]


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        (["a", "b", "c"], ["c", "a", "b"]),
        (["0", "1", "10", "2"], ["0", "1", "2", "10"]),  # folders sort as text
        (["Yes", "yes"], ["yes", "Yes"]),
        (["-1", "1"], ["1", "-1"]),
    ],
)
def test_the_same_names_in_another_order(
    own: list[str], wanted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert matched(own, wanted) == wanted
    assert "runs/t numbers the classes of `pets` differently: its logits are reordered by name" in caplog.text
    assert matched(own, wanted, match="position") is None


def test_spellings_of_a_name() -> None:
    own = ["T-shirt/top", "Ankle_boot", " hot  dog", "caf\u00e9", "Stra\u00dfe"]
    wanted = ["strasse", "cafe\u0301", "Hot-Dog", "ankle boot", "t shirt/top"]
    assert matched(own, wanted) == own[::-1]
    assert matched(own, wanted[::-1]) is None


@pytest.mark.parametrize(
    ("own", "wanted"), [(["a", "b"], ["a", "b"]), (["crane", "crane", "cat"], ["crane", "crane", "cat"])]
)
def test_equal_lists_need_no_word(
    own: list[str], wanted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert matched(own, wanted) is None
    assert not caplog.text


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        (2, ["a", "b"]),
        (["LABEL_0", "LABEL_1"], ["cat", "dog"]),
        (["cat", "dog"], ["class 1", "class 2"]),
        (["LABEL_0", "LABEL_1"], ["0", "1"]),
        (["cat", "dog"], ["0", "1"]),
        (["3", "7"], ["cat", "dog"]),
    ],
)
def test_classes_without_names_are_taken_in_order(
    own: list[str] | int, wanted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert matched(own, wanted) is None
    assert "runs/t and of `pets` cannot be compared by name: the same order is assumed" in caplog.text
    caplog.clear()
    assert matched(own, wanted, match="position") is None
    assert not caplog.text


@pytest.mark.parametrize(
    ("own", "wanted", "got"),
    [
        (["cat", "dog"], ["cat", "cow"], "`dog` in place of `cow` from runs/t"),
        (list("abcdef"), list("uvwxyz"), "`a`, `b`, `c` and 3 more in place of `u`, `v`, `w` and 3 more"),
        (["0", "1", "2"], ["1", "2", "3"], "`0` in place of `3`"),  # the same numbers mean other places
        (["0", "2", "1"], ["cat", "dog", "cow"], "`0`, `2`, `1` in place of"),  # these numbers are no order
        (["crane", "cat", "crane"], ["crane", "crane", "cat"], "crane more than once from runs/t"),
        (["a", "a", "b"], ["a", "b", "c"], "none in place of `c`"),
        (["x" * 99, "b"], ["a", "b"], f"`{'x' * 24}` in"),
    ],
)
def test_other_names_are_refused(own: list[str], wanted: list[str], got: str) -> None:
    with pytest.raises(UserError, match=r"name them alike, or set `match_classes: position`") as caught:
        matched(own, wanted)
    assert got in str(caught.value)
    assert matched(own, wanted, match="position") is None


@pytest.mark.parametrize("match", ["name", "position"])
def test_the_number_of_classes_always_counts(match: str) -> None:
    for own in (3, ["x", "y", "z"]):
        with pytest.raises(UserError, match=r"for the 2 classes of `pets`, got one for 3 from runs/t$"):
            matched(own, ["a", "b"], match=match)
    with pytest.raises(UserError, match="got one for 3 from runs/t, which has these and others"):
        matched(["B", "c", "a"], ["a", "b"], match=match)


def test_a_classifier_answers_in_its_order() -> None:
    network = Classifier(nn.Linear(2, 3))
    names, inputs = set(network.state_dict()), torch.randn(4, 2)
    plain = network(inputs)
    network.order = torch.tensor([2, 0, 1])
    assert torch.equal(network(inputs), torch.stack([plain[:, 2], plain[:, 0], plain[:, 1]], 1))
    assert torch.equal(copy.deepcopy(network)(inputs), network(inputs))
    assert set(network.state_dict()) == names
    network(inputs)[:, 0].sum().backward()
    assert network.body.bias.grad.tolist() == [0.0, 0.0, 4.0]


def test_an_average_of_weights_keeps_the_order() -> None:
    """As a buffer it would be averaged: 0.7 * 3 + 0.3 * 3 is below 3 in floating point, and becomes 2."""
    network = Classifier(nn.Linear(2, 5))
    network.order = torch.tensor([4, 3, 2, 1, 0])
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    for _ in range(20):
        average.update_parameters(network)
    torch.testing.assert_close(average(torch.eye(2)), network(torch.eye(2)))


def test_statistics_that_are_no_numbers_are_refused() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="expected a finite `mean` and a positive `std`"):
            Classifier(nn.Linear(2, 3), mean=[0.0, value], std=[1.0, 1.0])
