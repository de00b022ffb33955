"""How far float32 and the 16-bit dtypes stay from float64 on the same numbers.

Errors are root mean squares over a batch, in units of float32's epsilon (1.2e-7), relative to the size of the
values or gradients plus the size that one nat has in that loss. So a factor of 1 is what rounding the exact
result would give, about.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import luce
from luce.ops.pld import label_first

from .catalogue import CASES, DEFAULTS, batch

EPS = torch.finfo(torch.float32).eps
CLASSES = 100
SPREADS = (1.0, 50.0, 1e3, 1e4)
OFFSETS = (0.0, 300.0, 1e4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def temperatures(case):
    """All that a case divides logits by."""
    options = case.loss.module(**case.options).options()
    return options.get("temperatures", (options.get("temperature", 1.0),))


# A temperature that is no power of two rounds the logits before anything else, here as in PyTorch: by half an
# epsilon of their size, which says nothing about the loss.
EXACT = [case for case in CASES if {1.0, 2.0, 4.0}.issuperset(temperatures(case))]


def allowed(case, spread: float) -> tuple[float, float]:
    """Factors for values and gradients. No common offset may cost anything.

    Values are sums of a hundred terms, accurate to a few epsilons. A divergence near 0 is a small difference
    of terms of size one, and its gradient, T (q - p), even more so. A ranking's gradient is exp of a
    difference of logits that the scan carries in float32: a relative error of epsilon times their size. That
    of the reverse KL divergence holds log p of that size, times a q that may be small; DKD's is a sum of two.
    """
    value, gradient = 4.0, 16.0
    if case.loss.ranks:
        gradient = max(gradient, spread / 4)
    elif case.loss.function in (luce.reverse_kl_loss, luce.dkd_loss):
        gradient = 64.0
    return value, gradient


def units(case) -> tuple[float, float]:
    """What one nat is in this loss, and the gradient that belongs to it."""
    options = case.loss.module(**case.options).options()
    temperature = options.get("temperature", 1.0)
    nat = temperature**2 if options.get("scale_by_temperature") else 1.0
    if case.loss.function is luce.dkd_loss:
        nat *= options["alpha"] + options["beta"]
    return nat, nat / temperature


def logits(spread: float, offset: float, dtype: torch.dtype, rows: int = 48):
    """Evenly spread, in 16 bits with ties; in every other row the label is the student's last choice."""
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.rand(2, rows, CLASSES, generator=random, dtype=torch.float64) - 0.5
    target = torch.randint(CLASSES, (rows,), generator=random)
    student, teacher = ((spread * x + offset).to(dtype) for x in (student, teacher))
    target[::2] = student[::2].float().argmin(-1)
    return student, teacher, target


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def errors(case, student, teacher, target) -> tuple[float, float]:
    exact = student.double(), teacher.double(), target
    value, truth = (case(*data, reduction="none").double() for data in ((student, teacher, target), exact))
    nat, slope = units(case)
    error = rms(value - truth) / (rms(truth) + nat)
    gradient, truth = (
        case.grad(*data, reduction="none").double() for data in ((student, teacher, target), exact)
    )
    row = math.sqrt(student.shape[-1])  # from the root mean square of the entries to the norm of a row
    return error / EPS, row * rms(gradient - truth) / (row * rms(truth) + 0.01 * slope) / EPS


def holds_gradients(case, dtype):
    """Unscaled, the weights of P-ListMLE and so its gradients reach 2^99, which is no number of float16."""
    return case.options.get("normalize", True) or dtype != torch.float16


@pytest.mark.parametrize("exact", EXACT, ids=str)
def test_error_budget(exact):
    dtypes = [dtype for dtype in DTYPES if holds_gradients(exact, dtype)]
    for dtype, spread, offset in itertools.product(dtypes, SPREADS, OFFSETS):
        data = logits(spread, offset, dtype)
        value, gradient = errors(exact, *data)
        most_value, most_gradient = allowed(exact, spread)
        if dtype != torch.float32:  # the gradient is rounded to the dtype of the logits
            most_gradient += torch.finfo(dtype).eps / EPS
        assert value <= most_value, (dtype, spread, offset)
        assert gradient <= most_gradient, (dtype, spread, offset)


def test_the_budget_is_not_met_by_a_suffix_sum_without_its_own_scale():
    """One maximum for the whole row is the textbook mistake: the suffixes far below it are lost."""
    student, teacher, target = logits(1e3, 0.0, torch.float32)
    order = label_first(teacher.argsort(descending=True), target)
    u = (student - student.amax(-1, keepdim=True)).gather(-1, order)
    naive = (u.exp().flip(-1).cumsum(-1).flip(-1) + 1e-10).log() - u
    truth = luce.listmle_loss(student.double(), teacher.double(), target, reduction="none")
    assert rms(naive.sum(-1).double() - truth) / rms(truth) / EPS > 1e4


@pytest.mark.only(lambda case: case.options.get("normalize", True))
def test_huge_logits_stay_finite(by_row):
    """All option sets in float32; the dtype only rounds the logits, which each loss shows by its default."""
    dtypes = DTYPES if by_row in DEFAULTS else (torch.float32,)
    for spread, dtype in itertools.product(SPREADS, dtypes):
        student, teacher, target = logits(spread, 0.0, dtype)
        tied = torch.zeros_like(teacher)
        for s, t in (
            (student, teacher),
            (teacher, student),
            (student, tied),
            (tied, teacher),
            (student, student),
        ):
            assert by_row(s, t, target).isfinite(), (spread, dtype)
            assert by_row.grad(s, t, target).isfinite().all(), (spread, dtype)


def leaves_masked_classes_alone(case):
    """Not what gives such classes a share, or counts them in a spread that they then make up."""
    share = case.loss.function in (luce.tfkd_loss, luce.partial_kd_loss)
    share = share or bool({"label_smoothing", "smooth_weight"} & case.options.keys())
    return not share and not case.loss.scale_blind


@pytest.mark.only.with_args(leaves_masked_classes_alone)
def test_classes_masked_by_a_large_finite_number(case):
    """As many models do it, with -1e9 or the lowest number there is, also where these are the majority."""
    for mask, masked in itertools.product((-1e4, -1e9, torch.finfo(torch.float32).min), (2, 5, 12)):
        student, teacher, target = batch(6, classes=5 + masked, dtype=torch.float32)
        student[:, 5:], teacher[:, 5:] = mask, mask
        target = target % 5
        data = (student, teacher, target), (student.double(), teacher.double(), target)
        values = [case(*x).double() for x in data]
        gradients = [case.grad(*x).double() for x in data]
        if case.loss.function in (luce.listmle_loss, luce.p_listmle_loss):
            # These ask for an order among the masked classes too: log 2 has no digits beside 1e9.
            assert values[0].isfinite()
            assert gradients[0].isfinite().all()
            continue
        assert_close(values[0], values[1], rtol=1e-4, atol=1e-5)
        assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("place", range(9))
def test_an_outlier_does_not_spoil_the_others(place):
    """Wherever the teacher ranks the class that the student is sure of: the scan knows it to 1e4 epsilons."""
    random = torch.Generator().manual_seed(1)
    student = torch.randn(1, 9, generator=random)
    teacher = torch.arange(9.0, 0.0, -1.0)[None] / 4
    student[0, place] = 1e4
    (case,) = (case for case in DEFAULTS if case.loss.function is luce.pld_loss)
    truth = case.grad(student.double(), teacher.double())
    assert_close(
        case.grad(student, teacher).double(), truth, rtol=0, atol=1e4 * EPS * float(truth.abs().max())
    )
