"""KD as its temperature grows: where it tends, how fast, and what is left of its digits on the way."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch.testing import assert_close

import luce

from .catalogue import batch

inf, mean = math.inf, statistics.fmean
S = [2.0, -0.5, 0.5, 1.0]
T = [4.0, 1.0, -1.0, 2.0]
T_OF_EQUAL_MEAN = [3.0, 1.0, -1.0, 0.0]

BETA = 0.3
DIVERGENCES = {
    "kd": (luce.kd_loss, {}, 1.0),
    "reverse_kl": (luce.reverse_kl_loss, {}, 1.0),
    "jsd": (luce.jsd_loss, {"beta": BETA}, BETA * (1 - BETA)),
}
each_divergence = pytest.mark.parametrize(("loss", "options", "share"), DIVERGENCES.values(), ids=DIVERGENCES)
each_backend = pytest.mark.parametrize("backend", ["auto", "reference"])


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def value_and_gradient(loss, student, teacher, **options):
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, **options)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


def of_row(loss, s, t, **options):
    value, gradient = value_and_gradient(loss, tensor([s]), tensor([t]), **options)
    return value.item(), gradient[0].tolist()


def digits(x):
    """Equal to six decimal places."""
    return pytest.approx(x, rel=0, abs=0.51e-6)


def centred(x):
    return [v - mean(x) for v in x]


def variance_of_difference(s, t):
    return statistics.pvariance([a - b for a, b in zip(s, t, strict=True)])


# The values


@each_backend
@pytest.mark.parametrize(
    ("temperature", "expected", "slope"),
    [
        (1.0, 0.184937, [-0.241330, 0.007289, 0.127710, 0.106330]),
        (4.0, 0.689045, [-0.358312, -0.085432, 0.431481, 0.012263]),
        (10.0, 0.825082, [-0.337085, -0.142555, 0.512682, -0.033041]),
        (100.0, 0.898680, [-0.315280, -0.182828, 0.557779, -0.059671]),
        (1000.0, 0.905499, [-0.312781, -0.187031, 0.562031, -0.062219]),
        (inf, 0.906250, [-0.312500, -0.187500, 0.562500, -0.062500]),
    ],
)
def test_kd_of_unequal_means(temperature, expected, slope, backend):
    value, gradient = of_row(luce.kd_loss, S, T, temperature=temperature, backend=backend)
    assert value == digits(expected)
    assert gradient == digits(slope)


@each_backend
@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, 0.264931),
        (4.0, 0.716458),
        (10.0, 0.782907),
        (100.0, 0.810095),
        (1000.0, 0.812265),
        (inf, 0.812500),
    ],
)
def test_kd_of_equal_means(temperature, expected, backend):
    value, _ = of_row(luce.kd_loss, S, T_OF_EQUAL_MEAN, temperature=temperature, backend=backend)
    assert value == digits(expected)


@each_backend
@each_divergence
def test_the_limit_spelled_out(loss, options, share, backend):
    value, gradient = of_row(loss, S, T, temperature=inf, backend=backend, **options)
    assert value == pytest.approx(share * variance_of_difference(S, T) / 2, rel=1e-14)
    expected = [share * (a - b) / 4 for a, b in zip(centred(S), centred(T), strict=True)]
    assert gradient == pytest.approx(expected, rel=1e-14)


def test_without_its_square_the_limit_is_refused():
    for loss, options, _ in DIVERGENCES.values():
        with pytest.raises(ValueError, match="`temperature` to be finite with `scale_by_temperature=False`"):
            loss(tensor([S]), tensor([T]), temperature=inf, scale_by_temperature=False, **options)
    with pytest.raises(ValueError, match="finite"):
        luce.KDLoss(temperature=inf, scale_by_temperature=False)


# The way there


@each_divergence
def test_the_limit_is_approached_as_one_over_the_temperature(loss, options, share):
    def remainders(temperature):
        at, there = (of_row(loss, S, T, temperature=x, **options) for x in (temperature, inf))
        return abs(at[0] - there[0]), math.dist(at[1], there[1])

    for early, late in zip(remainders(1e2), remainders(1e4), strict=True):
        assert math.log(late / early) / math.log(1e4 / 1e2) == pytest.approx(-1, abs=0.05)


@pytest.mark.parametrize("t", [T, T_OF_EQUAL_MEAN], ids=["unequal means", "equal means"])
def test_what_is_left_out_at_a_finite_temperature(t):
    """The third moments over the temperature; for the reverse KL the networks exchange their parts."""

    def moments(a, b):
        return mean(x**3 / 6 + y**3 / 3 - x * y**2 / 2 for x, y in zip(centred(a), centred(b), strict=True))

    temperature = 1e6
    for loss, expected in ((luce.kd_loss, moments(S, t)), (luce.reverse_kl_loss, moments(t, S))):
        rest = of_row(loss, S, t, temperature=temperature)[0] - of_row(loss, S, t, temperature=inf)[0]
        assert temperature * rest == pytest.approx(expected, rel=1e-4)
    assert moments(S, T) == pytest.approx(-0.75)
    assert moments(S, T_OF_EQUAL_MEAN) == pytest.approx(-0.234375)

    at, there = (of_row(luce.kd_loss, S, t, temperature=x)[1] for x in (temperature, inf))
    squares = [[x**2 for x in centred(row)] for row in (S, t)]
    expected = [(a - b) / 8 for a, b in zip(*(centred(x) for x in squares), strict=True)]
    rest = [temperature * (a - b) for a, b in zip(at, there, strict=True)]
    assert rest == pytest.approx(expected, rel=1e-4)
    if t is T:
        assert expected == digits([-0.281250, 0.468750, -0.468750, 0.281250])


@each_backend
@pytest.mark.parametrize("temperature", [1.0, 4.0, 30.0, 300.0, 1e4, 1e6, 1e9, inf])
@pytest.mark.parametrize("classes", [5, 100, 1000])
def test_no_temperature_costs_digits(classes, temperature, backend):
    student, teacher, _ = batch(32, classes=classes, dtype=torch.float32)
    options = {"temperature": temperature, "reduction": "none", "backend": backend}
    value, gradient = value_and_gradient(luce.kd_loss, student, teacher, **options)
    truth, slope = value_and_gradient(luce.kd_loss, student.double(), teacher.double(), **options)
    assert_close(value.double(), truth, rtol=1e-6, atol=0)
    error, size = (x.abs().amax(-1) for x in (gradient.double() - slope, slope))
    assert (error <= 1e-6 * size).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [100.0, 1e6, inf])
def test_dtypes_at_high_temperatures(temperature, dtype):
    """The engines agree; 16-bit logits lose digits where the gradient is written down, and nowhere else."""
    student, teacher, _ = batch(16, classes=50, dtype=dtype)
    options = {"temperature": temperature, "reduction": "none"}
    value, gradient = value_and_gradient(luce.kd_loss, student, teacher, **options)
    truth, slope = value_and_gradient(
        luce.kd_loss, student.double(), teacher.double(), backend="reference", **options
    )
    exact = dtype == torch.float64
    assert_close(value.double(), truth, rtol=1e-12 if exact else 1e-6, atol=0)
    assert gradient.dtype == dtype
    # Float16 has no numbers between its multiples of 6e-8.
    assert_close(
        gradient.double(),
        slope,
        rtol=1e-9 if exact else torch.finfo(dtype).eps,
        atol=1e-12 if exact else 1e-7,
    )


@each_backend
@pytest.mark.parametrize("temperature", [1.0, 4.0, 1e3, 1e6])
@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_no_offset_of_one_network_costs_digits(offset, temperature, backend):
    student, teacher, _ = batch(32, classes=50, dtype=torch.float32)
    student = student + offset  # what is rounded here is rounded for both
    options = {"temperature": temperature, "reduction": "none", "backend": backend}
    value, gradient = value_and_gradient(luce.kd_loss, student, teacher, **options)
    truth, slope = value_and_gradient(luce.kd_loss, student.double(), teacher.double(), **options)
    assert_close(value.double(), truth, rtol=1e-6, atol=0)
    error, size = (x.abs().amax(-1) for x in (gradient.double() - slope, slope))
    assert (error <= 1e-6 * size).all()


@each_backend
@pytest.mark.parametrize("temperature", [1.0, 1e2, 1e4, 1e6])
def test_a_student_far_away_does_not_overflow(temperature, backend):
    """Whichever network is sure, and however much: log q or log p of 1e4 nats at a temperature of 1."""
    sure, even = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[0.0, 1.0, 2.0]])
    options = {"temperature": temperature, "backend": backend}
    for student, teacher in ((sure, even), (even, sure), (sure, -sure)):
        value, gradient = value_and_gradient(luce.kd_loss, student, teacher, **options)
        truth, slope = value_and_gradient(luce.kd_loss, student.double(), teacher.double(), **options)
        assert value.item() == pytest.approx(truth.item(), rel=1e-6)
        assert_close(gradient.double(), slope, rtol=0, atol=1e-6 * slope.abs().max().item())


# Classes that do not exist


@each_backend
@each_divergence
def test_classes_that_both_networks_exclude_do_not_count(loss, options, share, backend):
    gap = [S[0], -inf, *S[1:]], [T[0], -inf, *T[1:]]
    value, gradient = of_row(loss, *gap, temperature=inf, backend=backend, **options)
    expected, slope = of_row(loss, S, T, temperature=inf, backend=backend, **options)
    assert value == pytest.approx(expected, rel=1e-14)
    assert gradient == pytest.approx([slope[0], 0.0, *slope[1:]], rel=1e-14)


@each_backend
@each_divergence
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_class_that_one_network_excludes_is_infinite_in_the_limit(loss, options, share, who, backend):
    """A finite temperature leaves uniform distributions of 4 and of 3 classes apart, however high it is."""
    s, t = ([-inf, *S[1:]], T) if who == "student" else (S, [-inf, *T[1:]])
    options = {**options, "backend": backend}
    value, gradient = of_row(loss, s, t, temperature=inf, **options)
    assert value == inf
    assert all(math.isfinite(x) for x in gradient)
    assert of_row(loss, s, t, temperature=1e8, **options)[0] > 1e12
    kept = value_and_gradient(
        loss, tensor([s, S]), tensor([t, T]), temperature=inf, reduction="none", **options
    )
    assert kept[0][1].item() == pytest.approx(of_row(loss, S, T, temperature=inf, **options)[0])


@each_backend
def test_networks_that_exclude_every_class(backend):
    nothing, apart = [-inf] * 4, [-inf, -inf, 0.0, 1.0]
    options = {"temperature": inf, "backend": backend}
    for s, t in ((nothing, T), (S, nothing), (nothing, nothing)):
        assert math.isnan(of_row(luce.kd_loss, s, t, **options)[0])
    assert of_row(luce.kd_loss, apart, apart[::-1], **options)[0] == inf  # no class in common, but some each


# Logit matching


def test_centred_matching_is_the_limit_twice():
    student, teacher, _ = batch(6, classes=7)
    options = {"reduction": "none"}
    limit, slope = value_and_gradient(luce.kd_loss, student, teacher, temperature=inf, **options)
    value, gradient = value_and_gradient(luce.logit_matching_loss, student, teacher, center=True, **options)
    assert_close(value, 2 * limit, rtol=1e-13, atol=0)
    assert_close(gradient, 2 * slope, rtol=1e-12, atol=1e-15)
    by_hand = ((student - teacher) - (student - teacher).mean(-1, keepdim=True)).square().mean(-1)
    assert_close(value, by_hand, rtol=1e-13, atol=0)


def test_what_infinite_temperature_leaves_out_of_matching_is_the_gap_of_the_means():
    """Half of matching minus the limit is half the gap's square; its gradient is the same on every class."""
    value, gradient = (of_row(luce.logit_matching_loss, S, T)[i] for i in (0, 1))
    limit, slope = of_row(luce.kd_loss, S, T, temperature=inf)
    gap = mean(S) - mean(T)
    assert value / 2 - limit == pytest.approx(gap**2 / 2, rel=1e-13) == pytest.approx(0.28125)
    assert [a / 2 - b for a, b in zip(gradient, slope, strict=True)] == pytest.approx([gap / 4] * 4)
    # Of equal means nothing is left out.
    value, gradient = of_row(luce.logit_matching_loss, S, T_OF_EQUAL_MEAN)
    limit, slope = of_row(luce.kd_loss, S, T_OF_EQUAL_MEAN, temperature=inf)
    assert value / 2 == pytest.approx(limit) == pytest.approx(0.8125)
    assert gradient == pytest.approx([2 * x for x in slope])


@pytest.mark.parametrize(("center", "end"), [(False, T), (True, [3.25, 0.25, -1.75, 1.25])])
def test_where_descent_in_the_logits_ends(center, end):
    """KD keeps the mean that the student began with; matching takes the teacher's."""
    ends = []
    for loss, options in (
        (luce.logit_matching_loss, {"center": center}),
        (luce.kd_loss, {"temperature": inf}),
    ):
        student = tensor([S])
        for _ in range(200):
            scale = 0.5 if loss is luce.logit_matching_loss else 1.0
            student -= scale * value_and_gradient(loss, student, tensor([T]), **options)[1]
        ends.append(student[0].tolist())
    assert ends[0] == pytest.approx(end, abs=1e-9)
    assert ends[1] == pytest.approx([3.25, 0.25, -1.75, 1.25], abs=1e-9)
