"""The suggested temperature, and the PLD loss that takes it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

import luce
from luce import PLDLoss, WeightedSum, suggest_temperature
from luce.losses.temperature import first_place

from .catalogue import UNLABELLED, batch


def test_golden():
    """Two classes at a distance d: sigma(d / tau) = p gives tau = d / log(p / (1 - p))."""
    tau = suggest_temperature(torch.tensor([[5.0, 0.0]]), first_place=0.8)
    assert tau == pytest.approx(5 / math.log(4), rel=1e-5)


def test_several_rows_by_a_second_implementation():
    from scipy.optimize import brentq

    _, teacher, _ = batch(50, classes=20, scale=9.0)
    mean = lambda tau: (teacher / tau).softmax(-1).amax(-1).mean().item() - 0.7  # noqa: E731
    assert suggest_temperature(teacher, first_place=0.7) == pytest.approx(brentq(mean, 1e-2, 1e3), rel=1e-4)


@given(st.floats(0.2, 0.95), st.integers(0, 99), st.floats(0.1, 10))
def test_the_wanted_mean_is_reached_at_every_scale(wanted, seed, scale):
    _, teacher, _ = batch(8, classes=6, seed=seed)
    tau = suggest_temperature(teacher, first_place=wanted)
    assume(min(tau, scale * tau) > 0.02)  # below lies a bound
    assert first_place(teacher, tau) == pytest.approx(wanted, abs=1e-4)
    assert suggest_temperature(scale * teacher, first_place=wanted) == pytest.approx(scale * tau, rel=1e-4)


def test_out_of_reach_is_told_by_the_bounds():
    ties = torch.zeros(3, 4)
    assert suggest_temperature(ties) == pytest.approx(0.01, rel=1e-5)
    sure = torch.tensor([[1e6, 0.0]])
    assert suggest_temperature(sure) == pytest.approx(1000, rel=1e-5)


def test_layouts_and_excluded_classes():
    _, teacher, _ = batch(4, 3, classes=5)
    expected = suggest_temperature(teacher.reshape(12, 5))
    assert suggest_temperature(teacher, class_dim=-1) == expected
    assert suggest_temperature(teacher.movedim(-1, 1)) == expected
    padded = torch.cat([teacher, torch.full((4, 3, 2), -torch.inf)], -1)
    assert suggest_temperature(padded, class_dim=-1) == expected


@pytest.mark.parametrize("wanted", [0.0, 1.0, -1.0, math.nan])
def test_wanted_means_that_are_none(wanted):
    with pytest.raises(ValueError, match=r"`first_place` strictly between 0 and 1"):
        suggest_temperature(torch.zeros(1, 2), first_place=wanted)


@pytest.mark.parametrize(
    "bad", [torch.tensor([[0.0, math.nan]]), torch.zeros(0, 3), torch.full((1, 2), math.inf)]
)
def test_logits_that_say_nothing(bad):
    with pytest.raises(ValueError, match="without NaN"):
        suggest_temperature(bad)


def test_pld_takes_the_suggestion():
    student, teacher, target = batch(16, classes=7, scale=20.0)
    loss = PLDLoss(teacher_temperature="auto")
    assert loss.needs_preparation
    with pytest.raises(RuntimeError, match="prepare"):
        loss(student, teacher, target)
    found = loss.prepare(teacher, target)
    tau = torch.tensor(suggest_temperature(teacher)).item()  # as it is saved
    assert found == {"teacher_temperature": tau}
    assert tau > 1
    assert_close(
        loss(student, teacher, target), luce.pld_loss(student, teacher, target, teacher_temperature=tau)
    )


def test_the_suggestion_is_saved_with_the_module_and_nothing_else_is():
    student, teacher, target = batch(8)
    loss = PLDLoss(teacher_temperature="auto")
    loss.prepare(teacher, target)
    saved = torch.nn.ModuleList([loss]).state_dict()
    assert list(saved) == ["0.suggested_temperature"]
    again = torch.nn.ModuleList([PLDLoss(teacher_temperature="auto")])
    again.load_state_dict(saved)
    assert_close(again[0](student, teacher, target), loss(student, teacher, target))
    assert PLDLoss().state_dict() == {}


def test_a_given_temperature_needs_no_preparation():
    loss = PLDLoss(teacher_temperature=2.0)
    assert not loss.needs_preparation
    assert loss.prepare(torch.zeros(1, 2), torch.zeros(1)) == {}
    with pytest.raises(ValueError, match="teacher_temperature"):
        PLDLoss(teacher_temperature="hot")


def test_a_sum_prepares_its_terms():
    student, teacher, target = batch(16, classes=7, scale=20.0)
    target[0] = UNLABELLED
    both = WeightedSum({"a": (1.0, PLDLoss(teacher_temperature="auto")), "b": (0.5, luce.KDLoss())})
    assert both.needs_preparation
    assert both.prepare(teacher, target) == {
        "a.teacher_temperature": pytest.approx(suggest_temperature(teacher))
    }
    assert both(student, teacher, target)["loss"].isfinite()
    assert not WeightedSum({"b": (0.5, luce.KDLoss())}).needs_preparation
