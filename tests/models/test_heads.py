"""Heads without a mean, and what keeps it at zero."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import luce
from luce.errors import UserError
from luce.models import build, center_head_, equal_mean_head

INPUTS = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(40) % 5


def teacher_logits() -> Tensor:
    return 3 * torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 300, temperature: float = 4.0
) -> list[float]:
    """KD and cross-entropy; the largest mean logit before each step."""
    teacher, means = teacher_logits(), []
    for _ in range(steps):
        logits = model(INPUTS)
        means.append(logits.mean(-1).abs().max().item())
        loss = luce.kd_loss(logits, teacher, temperature=temperature) + luce.cross_entropy_loss(
            logits, LABELS
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return means


def mean_of(head: nn.Linear) -> Tensor:
    return torch.cat([head.weight.mean(0), head.bias.mean()[None]]).detach().clone()


# The heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_centred_head_says_the_same_less_its_mean(bias: bool) -> None:
    head = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    before = head(INPUTS).detach()
    old = copy.deepcopy(head.state_dict())
    parameters = [id(parameter) for parameter in head.parameters()]
    row, offset = center_head_(head)
    after = head(INPUTS)
    assert after.mean(-1).abs().max() < 1e-14
    torch.testing.assert_close(after.softmax(-1), before.softmax(-1))
    assert [id(parameter) for parameter in head.parameters()] == parameters  # an optimizer still has them
    torch.testing.assert_close(head.weight + row, old["weight"])
    if offset is None:
        assert not bias
    else:
        torch.testing.assert_close(head.bias + offset, old["bias"])
    assert not row.requires_grad
    assert center_head_(head)[0].abs().max() < 1e-15


def test_an_equal_mean_head_is_an_ordinary_one_but_for_its_mean() -> None:
    torch.manual_seed(3)
    ordinary = nn.Linear(6, 5)
    torch.manual_seed(3)
    head = equal_mean_head(6, 5)
    torch.testing.assert_close(head.weight, ordinary.weight - ordinary.weight.mean(0))
    assert equal_mean_head(6, 5, bias=False).bias is None


def test_the_networks_heads_can_be_centred() -> None:
    network = build("mlp", classes=3, input_shape=(4,))
    center_head_(network.head)
    assert network(torch.randn(5, 4)).mean(-1).abs().max() < 1e-6
    with pytest.raises(UserError, match=r"torch.nn.Linear, got Network; .* `.head`"):
        center_head_(network)


# What training does to them ---------------------------------------------------------------------------------


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 5, dtype=torch.float64)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_keeps_the_mean(momentum: float) -> None:
    head = linear()
    before = mean_of(head)
    assert before.abs().max() > 0.05
    train(head, torch.optim.SGD(head.parameters(), lr=0.1, momentum=momentum))
    torch.testing.assert_close(mean_of(head), before, atol=1e-12, rtol=0)


def test_weight_decay_shrinks_the_mean_by_the_known_factor() -> None:
    head = linear()
    before = mean_of(head)
    train(head, torch.optim.SGD(head.parameters(), lr=0.1, weight_decay=5e-4))
    factor = (1 - 0.1 * 5e-4) ** 300
    assert factor == pytest.approx(0.985112, abs=5e-7)
    torch.testing.assert_close(mean_of(head), factor * before, atol=1e-9, rtol=0)


def test_momentum_and_decay_move_the_mean_as_if_it_had_no_gradient() -> None:
    head = linear()
    mean = mean_of(head)
    velocity = torch.zeros_like(mean)
    train(head, torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3), steps=100)
    for _ in range(100):
        velocity = 0.9 * velocity + 5e-3 * mean
        mean = mean - 0.1 * velocity
    torch.testing.assert_close(mean_of(head), mean, atol=1e-12, rtol=0)


def test_adam_does_not_keep_it() -> None:
    head = linear()
    before = mean_of(head)
    train(head, torch.optim.Adam(head.parameters(), lr=0.01))
    assert (mean_of(head) - before).abs().max() > 1e-3


def test_behind_a_network_only_a_head_that_starts_without_a_mean_keeps_it() -> None:
    torch.manual_seed(0)
    ordinary = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)).double()
    centred = copy.deepcopy(ordinary)
    center_head_(centred[-1])
    means = {}
    for name, network in (("ordinary", ordinary), ("centred", centred)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        means[name] = train(network, optimizer, steps=300, temperature=1000.0)
    assert max(means["centred"]) < 1e-12
    assert abs(means["ordinary"][-1] - means["ordinary"][0]) > 0.1
