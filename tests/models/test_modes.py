"""Modules that stay in evaluation mode in training."""

from __future__ import annotations

import pytest
from torch import nn

from luce.models import Classifier
from luce.models.modes import in_evaluation, rest, resting


def network() -> nn.Sequential:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    return nn.Sequential(backbone, nn.BatchNorm1d(4, affine=False), nn.Dropout(0.5), nn.Linear(4, 2))


def names(body: nn.Module) -> set[str]:
    found = set(resting(Classifier(body)))
    return {name for name, module in body.named_modules() if module in found}


def test_a_network_in_evaluation_mode_is_trained_whole() -> None:
    assert names(network()) == names(network().eval()) == set()


@pytest.mark.parametrize("rest_too", [True, False])
def test_a_frozen_part_rests_with_its_dropout(rest_too: bool) -> None:
    body = network()
    body[0].requires_grad_(False).eval()
    if rest_too:
        body.eval()
    assert names(body) == {"0", "0.0", "0.1", "0.2"}


def test_a_frozen_part_in_training_mode_keeps_its_mode() -> None:
    body = network()
    body[0].requires_grad_(False)
    assert names(body) == set()


def test_statistics_without_parameters_rest_where_the_rest_trains() -> None:
    body = network()
    body[1].eval()
    assert names(body) == {"1"}


def test_trainable_and_stateless_modules_do_not_rest() -> None:
    body = network()
    body[0].eval()
    body[2].eval()
    assert names(body) == set()


def test_rest_undoes_train_for_these_modules_alone() -> None:
    body = network()
    body[0].requires_grad_(False).eval()
    still = resting(body)
    body.train()
    rest(still)
    assert not any(module.training for module in body[0].modules())
    assert all(body[place].training for place in (1, 2, 3))


def test_a_block_in_evaluation_mode_restores_each_mode() -> None:
    body = network()
    body[0].eval()
    modes = [module.training for module in body.modules()]
    with in_evaluation(body):
        assert not any(module.training for module in body.modules())
    assert [module.training for module in body.modules()] == modes
