"""Copies of networks that `copy.deepcopy` refuses."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

from luce.errors import UserError
from luce.models import Classifier
from luce.models.copies import copy_of


def test_a_weight_normed_layer_after_a_pass() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Linear(3, 2))
    inputs = torch.randn(4, 3)
    before = layer(inputs)
    with pytest.raises(RuntimeError):  # the reason for all this
        copy.deepcopy(layer)
    other = copy_of(layer, "a test")
    other.weight_g.data *= 2
    torch.testing.assert_close(other(inputs) - other.bias, 2 * (before - layer.bias))
    torch.testing.assert_close(layer(inputs), before)
    other(inputs).sum().backward()
    assert layer.weight_g.grad is None


def test_shared_weights_stay_shared() -> None:
    layer = nn.Linear(2, 2)
    other = copy_of(nn.Sequential(layer, layer), "a test")
    assert other[0] is other[1]
    assert other[0].weight is not layer.weight


def test_what_cannot_be_copied_is_named() -> None:
    body = nn.Linear(2, 2)
    body.lock = threading.Lock()
    with pytest.raises(UserError, match=r"can copy for `training\.ema`, got Linear \(cannot pickle .*lock"):
        copy_of(Classifier(body), "`training.ema`")
