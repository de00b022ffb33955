"""Losses on features that a positive factor leaves alone do so in float32 at any size of the features."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import luce
from luce.losses import functional, linear_cka

MAPS, VECTORS = (4, 3, 4, 4), (4, 6)
EXTRA = {
    "vid_loss": {"variance": torch.ones(3)},
    "ofd_loss": {"margin": -torch.ones(3)},
    "mgd_loss": {"generate": torch.nn.Identity(), "mask_ratio": 0.0},
    "nst_loss": {"form": "linear"},
    "inheritance_loss": {"form": "cosine"},
}
BLIND = {
    *("at_loss", "nst_loss", "ickd_loss", "sp_loss", "pkt_loss", "rkd_loss", "cc_loss"),
    *("inheritance_loss", "exploration_loss", "linear_cka", "lipschitz_loss"),
}


def pair(shape):
    random = torch.Generator().manual_seed(0)
    return torch.randn(2, *shape, generator=random, dtype=torch.float64)


def functions():
    """Each loss on features as a function of two tensors, with the shape that it takes."""
    found = {"linear_cka": (linear_cka, VECTORS)}
    for name in functional.__all__:
        function = getattr(functional, name)
        if next(iter(inspect.signature(function).parameters)) != "student_features":
            continue
        function = partial(function, **EXTRA.get(name, {}))
        if name == "fsp_loss":
            found[name] = (lambda s, t, f=function: f((s, s), (t, t)), MAPS)
        elif name == "lipschitz_loss":  # only relative to the teacher, and then to the fourth power
            found[name] = (lambda s, t, f=function: f([s, s], [t, t], relative=True), MAPS)
        else:
            vectors = name in ("pkt_loss", "rkd_loss", "cc_loss", "inheritance_loss", "exploration_loss")
            found[name] = (function, VECTORS if vectors else MAPS)
    return found


def test_the_losses_below_are_all_that_are_blind_to_a_factor():
    blind = set()
    for name, (function, shape) in functions().items():
        student, teacher = pair(shape)
        if torch.allclose(function(3 * student, 3 * teacher), function(student, teacher), rtol=1e-9):
            blind.add(name)
    assert blind == BLIND


@pytest.mark.parametrize("factor", [1e19, 1e-21, 1e30, 1e-30])
@pytest.mark.parametrize("name", sorted(BLIND - {"lipschitz_loss"}))
def test_any_size_of_the_features_gives_the_value_and_the_gradient_of_size_one(name, factor):
    function, shape = functions()[name]
    student, teacher = pair(shape).float()

    def value_and_gradient(factor):
        scaled = (factor * student).requires_grad_()
        value = function(scaled, factor * teacher)
        (gradient,) = torch.autograd.grad(value, scaled)
        return value.detach(), gradient * factor

    value, gradient = value_and_gradient(1.0)
    found, slope = value_and_gradient(factor)
    assert_close(found, value, rtol=1e-4, atol=1e-6)
    assert_close(slope, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dist_does_not_drown_classes_of_low_probability(dtype):
    rows = [[12.0, 0.0, 0.0], [12.0, 1.0, -1.0]]
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    loss = luce.dist_loss(logits, logits.detach(), temperature=1.0)
    assert abs(loss.item()) < 1e-5
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-3


def test_dist_counts_a_class_that_is_constant_but_for_rounding_as_uncorrelated():
    """Two rows of equal probabilities from logits that differ by a constant: a rounding apart at most."""
    logits = torch.tensor([[0.1, 0.2, 0.3], [7.1, 7.2, 7.3]])
    assert (logits.softmax(1)[0] != logits.softmax(1)[1]).any()
    teacher = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    across = luce.dist_loss(logits, teacher, beta=0.0, gamma=1.0, temperature=1.0)
    assert across.item() == 1.0
