"""Losses composed in the open: named terms, and their sum."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import luce
from luce import CrossEntropyLoss, DISTLoss, KDLoss, PLDLoss, WeightedSum

from .catalogue import LOSSES, UNLABELLED, batch


@pytest.fixture
def both():
    return WeightedSum({"task": (0.1, CrossEntropyLoss()), "kd": (0.9, KDLoss(temperature=4.0))})


def test_terms_and_their_sum(both):
    student, teacher, target = batch(4)
    terms = both(student, teacher, target)
    assert list(terms) == ["task", "kd", "loss"]
    assert_close(terms["task"], 0.1 * luce.cross_entropy_loss(student, target))
    assert_close(terms["kd"], 0.9 * luce.kd_loss(student, teacher, temperature=4.0))
    assert_close(terms["loss"], terms["task"] + terms["kd"], rtol=0, atol=0)


def test_the_golden_sum(both):
    """A tenth of the cross-entropy and nine tenths of KD at 4, of the batch in `test_golden`."""
    student = torch.tensor([[0.5, -1.0, 2.0, 0.3], [1.2, 0.1, -0.7, 0.4]])
    teacher = torch.tensor([[2.0, 1.0, 0.1, -1.0], [0.2, 2.5, -0.3, 0.9]])
    terms = both(student, teacher, torch.tensor([2, 1]))
    assert terms["loss"].item() == pytest.approx(0.1 * 1.066927 + 0.9 * 1.120407, abs=1e-6)


def test_each_term_has_its_share_of_the_gradient():
    losses = {loss.name: (0.5 + i, loss.module()) for i, loss in enumerate(LOSSES)}
    student, teacher, target = batch(4)
    terms = WeightedSum(losses)(student.requires_grad_(), teacher, target)
    total = torch.zeros_like(student)
    for name in losses:
        (gradient,) = torch.autograd.grad(terms[name], student, retain_graph=True)
        assert gradient.abs().max() > 0, name
        total += gradient
    assert_close(torch.autograd.grad(terms["loss"], student)[0], total)


def test_rows_without_a_label_count_where_they_can(both):
    student, teacher, target = batch(4)
    target[2:] = UNLABELLED
    terms = both(student, teacher, target)
    assert_close(terms["task"], 0.1 * luce.cross_entropy_loss(student[:2], target[:2]))
    assert_close(terms["kd"], 0.9 * luce.kd_loss(student, teacher, temperature=4.0))
    assert both.uses_unlabelled
    assert not WeightedSum({"task": (1.0, CrossEntropyLoss())}).uses_unlabelled
    assert not WeightedSum({"task": (1.0, CrossEntropyLoss()), "kd": (0.0, KDLoss())}).uses_unlabelled


def test_whether_it_looks_at_the_teacher(both):
    assert both.takes_teacher
    task = WeightedSum({"task": (1.0, CrossEntropyLoss())})
    assert not task.takes_teacher
    student, _, target = batch(4)
    assert_close(task(student, None, target)["loss"], luce.cross_entropy_loss(student, target))


def test_other_peoples_losses_are_welcome():
    class Pull(nn.Module):
        def __init__(self):
            super().__init__()
            self.strength = nn.Parameter(torch.tensor(2.0))

        def forward(self, student_logits, teacher_logits, target):
            return self.strength * (student_logits - teacher_logits).abs().mean()

    loss = WeightedSum({"pld": (1.0, PLDLoss()), "pull": (0.5, Pull())})
    student, teacher, target = batch(4)
    assert_close(loss(student, teacher, target)["pull"], (student - teacher).abs().mean())
    assert [name for name, _ in loss.named_parameters()] == ["losses.pull.strength"]
    assert loss.uses_unlabelled  # nothing is known about it, so its rows are kept
    assert loss.takes_teacher


def test_bf16_logits_are_summed_in_float32(both):
    student, teacher, target = batch(4, dtype=torch.bfloat16)
    terms = both(student, teacher, target)
    assert all(term.dtype == torch.float32 for term in terms.values())


def test_copies(both):
    student, teacher, target = batch(4)
    expected = both(student, teacher, target)
    for twin in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert_close(twin(student, teacher, target), expected, rtol=0, atol=0)


def test_its_text_names_terms_and_weights(both):
    text = repr(both)
    for part in ("task: 0.1", "kd: 0.9", "CrossEntropyLoss()", "KDLoss(temperature=4.0)"):
        assert part in text


@pytest.mark.parametrize(
    "terms", [{}, {"loss": (1.0, KDLoss())}, {"kd": (1.0, KDLoss()), "loss": (1.0, KDLoss())}]
)
def test_names_that_cannot_be(terms):
    with pytest.raises(ValueError, match='none of them called "loss"'):
        WeightedSum(terms)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "much"])
def test_weights_that_cannot_be(weight):
    with pytest.raises(ValueError, match="weight of dist") as caught:
        WeightedSum({"dist": (weight, DISTLoss())})
    assert repr(weight) in str(caught.value)


def test_a_loss_that_is_not_reduced():
    with pytest.raises(ValueError, match="expected `reduction` of kd to be 'mean' or 'sum', got 'none'"):
        WeightedSum({"kd": (1.0, KDLoss(reduction="none"))})


def test_a_term_of_weight_zero_is_watched_and_not_felt(both):
    student, teacher, target = batch(4)
    loss = WeightedSum({"kd": (1.0, KDLoss()), "dist": (0.0, DISTLoss())})
    terms = loss(student.requires_grad_(), teacher, target)
    assert terms["dist"] == 0
    gradient = torch.autograd.grad(terms["loss"], student)[0]
    expected = torch.autograd.grad(luce.kd_loss(student, teacher), student)[0]
    assert_close(gradient, expected)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_only_a_term_that_counts_is_prepared(weight):
    one, other = (luce.RKKDLoss(), PLDLoss(teacher_temperature="auto"))
    loss = WeightedSum({"one": (1.0, one), "other": (weight, other)})
    assert loss.needs_preparation == bool(weight)
    found = loss.prepare(batch(4)[1], batch(4)[2])
    assert list(found) == (["other.teacher_temperature"] if weight else [])
    assert loss(*batch(4))["other"].isfinite()


def test_warmup_grows_to_the_full_weight():
    student, teacher, target = batch(4)
    loss = WeightedSum({"task": (1.0, CrossEntropyLoss()), "kd": (0.8, KDLoss())}, warmup={"kd": 4})
    full = loss(student, teacher, target)
    for epoch, share in ((1, 0.25), (2, 0.5), (4, 1.0), (9, 1.0)):
        loss.set_epoch(epoch)
        terms = loss(student, teacher, target)
        assert_close(terms["kd"], share * full["kd"])
        assert_close(terms["task"], full["task"])


@pytest.mark.parametrize(
    ("warmup", "what"), [({"dkd": 2}, "`warmup` to be one of 'kd'"), ({"kd": -1}, "warmup of kd")]
)
def test_warmups_that_make_no_sense(warmup, what):
    with pytest.raises(ValueError, match=what):
        WeightedSum({"kd": (1.0, KDLoss())}, warmup=warmup)
