"""Losses and functions as plain values: equal for what computes the same, different for what does not."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import luce
from luce.methods import FeatureMethod, LogitMethod, MutualLearning
from luce.runs.plain import plain


class Own(nn.Module):
    """A user's loss with options of every kind."""

    def __init__(self, alpha: float = 0.5, weight: Tensor | None = None, inner: Any = None) -> None:
        super().__init__()
        self._alpha, self.inner = alpha, inner
        self.register_buffer("weight", torch.ones(3) if weight is None else weight)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return self._alpha * (student - teacher).square().mean()


class Callable:
    """A user's loss that is no module."""

    def __init__(self, power: int) -> None:
        self.power = power

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return (student - teacher).pow(self.power).mean()


def scaled(factor: Any) -> Any:
    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return factor * (student - teacher).square().mean()

    return loss


def feature(weight: float = 1.0, path: str = "0") -> FeatureMethod:
    return FeatureMethod(luce.KDLoss(), {"hint": (weight, luce.FitNetLoss(), [path], ["0"])})


DIFFERENT = {
    "an option": [luce.KDLoss(temperature=4.0), luce.KDLoss(temperature=2.0)],
    "a class": [luce.KDLoss(), luce.ReverseKLLoss(), luce.PLDLoss(), LogitMethod(luce.PLDLoss())],
    "a weight": [luce.WeightedSum({"kd": (weight, luce.KDLoss())}) for weight in (0.5, 1.0)],
    "a warm-up": [luce.WeightedSum({"kd": (1.0, luce.KDLoss())}, {"kd": epochs}) for epochs in (1, 2)],
    "a nested option": [LogitMethod(luce.KDLoss(temperature=float(t))) for t in (1, 2)],
    "a loss of PyTorch": [nn.CrossEntropyLoss(label_smoothing=s) for s in (0.0, 0.1)],
    "class weights": [nn.CrossEntropyLoss(weight=torch.tensor([1.0, w])) for w in (1.0, 2.0)],
    "an option of an own loss": [Own(0.5), Own(0.6)],
    "a buffer of an own loss": [Own(), Own(weight=torch.zeros(3))],
    "a loss in an own loss": [Own(inner=luce.KDLoss()), Own(inner=luce.PLDLoss()), Own()],
    "an own class that is no module": [Callable(2), Callable(4)],
    "a value in a closure": [scaled(1.0), scaled(2.0), scaled(torch.ones(2)), scaled(torch.zeros(2))],
    "a partial": [functools.partial(scaled(1.0), target=t) for t in (None, 1)],
    "code": [lambda s, t, y: s.mean(), lambda s, t, y: s.sum(), lambda s, t, y: (s - t).mean()],
    "a constant in code": [lambda s, t, y: 2 * s.mean(), lambda s, t, y: 3 * s.mean()],
    "a default": [lambda s, t, y, a=1: a * s.mean(), lambda s, t, y, a=2: a * s.mean()],
    "a method": [Callable(2).__call__, Callable(4).__call__],
    "features": [feature(), feature(weight=2.0), feature(path="1")],
    "an optimizer of a peer": [
        MutualLearning(
            LogitMethod(luce.KDLoss()), nn.Linear, optimizer=functools.partial(torch.optim.SGD, lr=r)
        )
        for r in (0.1, 0.2)
    ],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_each_difference_is_seen(name: str) -> None:
    described = [json.dumps(plain(thing)) for thing in DIFFERENT[name]]
    assert len(set(described)) == len(described)


@pytest.mark.parametrize("make", [luce.KDLoss, Own, lambda: scaled(2.0), lambda: Callable(2), feature])
def test_two_of_a_kind_are_equal(make: Any) -> None:
    assert json.loads(json.dumps(plain(make()))) == plain(make())


def test_what_the_loop_sets_is_no_option() -> None:
    loss = luce.WeightedSum({"kd": (1.0, luce.KDLoss())})
    before = plain(loss)
    loss.set_epoch(3)
    assert plain(loss) == before


def test_docstrings_and_places_are_no_code() -> None:
    sources = ["def f(a):\n    'one'\n    return 2 * a", "\n\ndef f(a):\n    'two'\n    return 2 * a"]
    described = []
    for source in sources:
        space: dict[str, Any] = {"__name__": "script"}
        exec(source, space)
        described.append(plain(space["f"]))
    assert described[0] == described[1]
    assert "code" in described[0]


def test_a_global_constant_counts() -> None:
    described = []
    for value in (0.1, 0.9):
        space: dict[str, Any] = {"__name__": "script", "ALPHA": value}
        exec("def f(a):\n    return ALPHA * a", space)
        described.append(plain(space["f"]))
    assert [one.pop("constants") for one in described] == [{"ALPHA": 0.1}, {"ALPHA": 0.9}]
    assert described[0] == described[1]


def test_objects_that_contain_themselves() -> None:
    thing = Own()
    thing.inner = [thing]
    json.dumps(plain(thing))


def test_the_order_of_a_set_in_code_does_not_count() -> None:
    one, two = (
        plain(function) for function in (lambda a: a in {"x", "y", "z"}, lambda a: a in {"z", "y", "x"})
    )
    assert one["code"] == two["code"]
