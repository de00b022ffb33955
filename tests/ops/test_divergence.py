"""The divergences and DKD: values by hand, the engines against each other and against float64."""

from __future__ import annotations

import decimal
import math
import os
import platform
import subprocess
import sys
from decimal import Decimal
from functools import cache, partial

import pytest
import torch
from torch.testing import assert_close

from luce.ops import engines
from luce.ops.dkd import dkd, weighted_dkd
from luce.ops.kd import forward_kl, jsd, kl_limit, reverse_kl
from luce.ops.kd.reference import KINDS

inf, nan = math.inf, math.nan
native = pytest.mark.skipif(
    engines.WHY_NOT is not None, reason=f"needs the native library: {engines.WHY_NOT}"
)
ENGINES = ["reference", pytest.param("cpu", marks=native)]


def _dkd(student, teacher, temperature, target=None, **options):
    """With the teacher's second choice as label, which is no class that a test of infinities excludes."""
    if target is None:
        place = min(1, teacher.shape[1] - 1)
        target = teacher.argsort(dim=1, descending=True, stable=True).select(1, place)
    return weighted_dkd(student, teacher, target, temperature, **{"alpha": 1.0, "beta": 8.0, **options})


OPS = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": lambda s, t, temperature, **more: jsd(s, t, 0.5, temperature, **more),
    "jsd 0.1": lambda s, t, temperature, **more: jsd(s, t, 0.1, temperature, **more),
    "dkd": _dkd,
    "dkd, the target alone": partial(_dkd, beta=0.0),
    "dkd, the rest alone": partial(_dkd, alpha=0.0, beta=2.0),
    "limit": lambda s, t, temperature, **more: kl_limit(s, t, **more),
}


@pytest.fixture(params=OPS.values(), ids=OPS)
def op(request):
    return request.param


@pytest.fixture(params=["forward_kl", "reverse_kl", "jsd", "limit"])
def kind(request):
    return request.param


def logits(*size, spread=2.0, dtype=torch.float64):
    student, teacher = spread * torch.randn(2, *size, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def value_and_gradient(op, student, teacher, temperature=1.0, upstream=None, **more):
    student = student.detach().requires_grad_()
    values = op(student, teacher, temperature, **more)
    upstream = torch.ones_like(values) if upstream is None else upstream
    return values.detach(), torch.autograd.grad(values, student, upstream)[0]


# By hand

P, Q = (0.5, 0.3, 0.2), (0.2, 0.2, 0.6)
TEACHER, STUDENT = (torch.tensor([[math.log(x) + 7 for x in probs]], dtype=torch.float64) for probs in (P, Q))


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_spelled_out(backend, temperature):
    student, teacher = temperature * STUDENT, temperature * TEACHER
    m = [0.3 * p + 0.7 * q for p, q in zip(P, Q, strict=True)]
    expected = {
        forward_kl(student, teacher, temperature, backend=backend): kl(P, Q),
        reverse_kl(student, teacher, temperature, backend=backend): kl(Q, P),
        jsd(student, teacher, 0.3, temperature, backend=backend): 0.3 * kl(P, m) + 0.7 * kl(Q, m),
        weighted_dkd(
            student, teacher, torch.tensor([1]), temperature, alpha=2.0, beta=5.0, backend=backend
        ): (2 * kl((0.3, 0.7), (0.2, 0.8)) + 5 * kl((5 / 7, 2 / 7), (1 / 4, 3 / 4))),
    }
    for value, by_hand in expected.items():
        assert value.item() == pytest.approx(by_hand, rel=1e-13)


@pytest.mark.parametrize("backend", ENGINES)
def test_gradients_spelled_out(backend):
    gradient = value_and_gradient(forward_kl, STUDENT, TEACHER, 2.0, backend=backend)[1]
    p, q = (TEACHER / 2).softmax(-1), (STUDENT / 2).softmax(-1)
    assert_close(gradient, (q - p) / 2, rtol=1e-12, atol=0)
    gradient = value_and_gradient(reverse_kl, STUDENT, TEACHER, backend=backend)[1]
    by_hand = [[b * (math.log(b / a) - kl(Q, P)) for a, b in zip(P, Q, strict=True)]]
    assert_close(gradient, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ENGINES)
def test_the_two_parts_of_dkd_add_up_to_kd(backend):
    student, teacher = logits(6, 5)
    target = torch.arange(6) % 5
    rest = 1 - teacher.softmax(-1)[torch.arange(6), target]
    parts = [
        weighted_dkd(student, teacher, target, 1.0, alpha=a, beta=b, backend=backend)
        for a, b in ((1.0, 0.0), (0.0, 1.0))
    ]
    assert_close(parts[0] + rest * parts[1], forward_kl(student, teacher, 1.0, backend=backend))
    assert_close(parts, list(dkd(student, teacher, target, 1.0)))


# The native engine against the reference


def agree(op, student, teacher, temperature=1.0, *, rtol=1e-5, **more):
    values, gradient = value_and_gradient(op, student, teacher, temperature, backend="cpu", **more)
    expected, slope = value_and_gradient(op, student, teacher, temperature, backend="reference", **more)
    assert_close(values, expected, rtol=rtol, atol=rtol, equal_nan=True)
    bits = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(student.dtype, 0)
    assert_close(gradient, slope, rtol=rtol + bits, atol=rtol * 10, equal_nan=True)
    return values, gradient


LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 100, 1000, 1001]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Each operator at each length and in each dtype, and each length in each dtype.
PAIRWISE = [
    pytest.param(op, classes, DTYPES[(i + j) % 4], id=f"{name}-{classes}-{DTYPES[(i + j) % 4]}")
    for i, (name, op) in enumerate(OPS.items())
    for j, classes in enumerate(LENGTHS)
]


@native
@pytest.mark.parametrize(("op", "classes", "dtype"), PAIRWISE)
def test_engines_agree(op, classes, dtype):
    student, teacher = logits(5, classes, dtype=dtype)
    agree(op, student, teacher, 2.5, rtol=1e-11 if dtype == torch.float64 else 1e-5)


@native
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_mixed_dtypes(op, dtypes):
    student, teacher = (x.to(dtype) for x, dtype in zip(logits(5, 33), dtypes, strict=True))
    values, gradient = agree(op, student, teacher)
    assert values.dtype == torch.promote_types(torch.promote_types(*dtypes), torch.float32)
    assert gradient.dtype == dtypes[0]


def layouts(x):
    """The same numbers, laid out in other ways."""
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.stack([x, torch.full_like(x, nan)], -1)[..., 0]
    yield x.movedim(1, -1).contiguous().movedim(-1, 1)
    yield x[:1].expand(x.shape)


@native
@pytest.mark.parametrize("shape", [(4, 37), (3, 37, 5), (2, 20, 33), (0, 5), (0, 5, 3), (3, 5, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_any_strides(op, shape, dtype):
    student, teacher = logits(*shape, dtype=dtype)
    for s, t in zip(layouts(student), layouts(teacher), strict=True):
        values, _ = agree(op, s, t)
        assert values.shape == shape[:1] + shape[2:]
        agree(op, s, teacher)


@native
def test_rows_of_weight_zero_are_not_looked_at(op):
    student, teacher = logits(4, 9, dtype=torch.float32)
    weight = torch.tensor([2.0, 0.0, 0.5, -1.0])
    values, gradient = value_and_gradient(op, student, teacher, backend="cpu")
    spoilt = student.clone()
    spoilt[1] = nan
    for backend in ("cpu", "reference"):
        weighted, slope = value_and_gradient(op, spoilt, teacher, weight=weight, backend=backend)
        assert_close(weighted, weight * values)
        assert_close(slope, weight[:, None] * gradient)
        assert (slope[1] == 0).all()


@native
def test_what_comes_from_above_is_multiplied(op):
    student, teacher = logits(4, 9)
    upstream = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    agree(op, student, teacher, upstream=upstream, rtol=1e-10)


# Infinities and NaN


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [3, 20])
def test_classes_that_do_not_exist_change_nothing(op, classes, dtype):
    student, teacher = logits(4, classes, dtype=dtype)
    values, gradient = value_and_gradient(op, student, teacher, backend="cpu")
    places = torch.arange(classes) * 2 + 1
    wide = [x.new_full((4, 2 * classes + 5), -inf).index_copy(1, places, x) for x in (student, teacher)]
    agree(op, *wide)
    wide_values, wide_gradient = value_and_gradient(op, *wide, backend="cpu")
    assert_close(wide_values, values)
    assert_close(wide_gradient[:, places], gradient)
    wide_gradient[:, places] = 0
    assert (wide_gradient == 0).all()


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_class_that_one_network_excludes(op, who, dtype):
    student, teacher = logits(3, 20, dtype=dtype)
    (student if who == "student" else teacher)[1, 3] = -inf
    teacher[1, 5] = 9.0  # the label that `_dkd` takes is another
    values, gradient = value_and_gradient(op, student, teacher, backend="cpu")
    expected, slope = value_and_gradient(op, student, teacher, backend="reference")
    assert_close(values, expected)
    if values[1] == inf and op is reverse_kl:
        gradient, slope = gradient[[0, 2]], slope[[0, 2]]  # there is none where q log(q / 0) is infinite
    assert gradient.isfinite().all()
    assert_close(gradient, slope, rtol=1e-5, atol=1e-5)


@native
def test_which_of_them_are_infinite():
    student, teacher = logits(1, 4)
    target = torch.tensor([0])
    less = student.clone(), teacher.clone()
    less[0][0, 2] = less[1][0, 2] = -inf
    assert forward_kl(less[0], teacher, 1.0) == inf > forward_kl(student, less[1], 1.0)
    assert reverse_kl(student, less[1], 1.0) == inf > reverse_kl(less[0], teacher, 1.0)
    assert weighted_dkd(less[0], teacher, target, 1.0, alpha=1.0, beta=1.0) == inf
    assert weighted_dkd(less[0], teacher, target, 1.0, alpha=1.0, beta=0.0) < inf
    assert weighted_dkd(less[0], teacher, target + 2, 1.0, alpha=1.0, beta=0.0) == inf
    assert weighted_dkd(less[0], teacher, target + 2, 1.0, alpha=0.0, beta=1.0) < inf
    apart = torch.tensor([[0.0, -inf]]), torch.tensor([[-inf, 0.0]])
    assert_close(jsd(*apart, 0.5, 1.0).item(), math.log(2), rtol=1e-6, atol=0)


@native
def test_what_underflows_in_the_teacher_is_nothing_to_exclude():
    """As in the reference, whose p is 0 there; in float64 it is not."""
    student, teacher = torch.tensor([[0.0, 1.0, -inf]]), torch.tensor([[0.0, 2.0, -200.0]])
    assert_close(*(forward_kl(student, teacher, 1.0, backend=b) for b in ("cpu", "reference")))
    assert forward_kl(student.double(), teacher.double(), 1.0) == inf
    barely = teacher - torch.tensor([0.0, 0.0, -105.0])  # p is a subnormal number
    assert forward_kl(student, barely, 1.0, backend="cpu") == inf


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dkd_of_networks_that_have_no_rest(backend, dtype):
    bare, full = torch.tensor([[-inf, 1.0, -inf]], dtype=dtype), torch.tensor([[0.5, 1.0, -inf]], dtype=dtype)
    run = partial(weighted_dkd, target=torch.tensor([1]), temperature=1.0, backend=backend)
    assert run(bare, bare, alpha=1.0, beta=8.0) == 0
    # The teacher's rest is empty: the student shall be as sure, and hears nothing about the rest.
    expected = math.log(1 + math.exp(-0.5))
    assert run(full, bare, alpha=1.0, beta=8.0).item() == pytest.approx(expected, rel=1e-6)
    assert run(bare, full, alpha=1.0, beta=0.0) == inf
    assert run(bare, full, alpha=0.0, beta=1.0) == inf
    student = full.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run(student, bare, alpha=1.0, beta=8.0).sum(), student)
    q = 1 / (1 + math.exp(0.5))
    assert_close(gradient, torch.tensor([[q, -q, 0.0]], dtype=dtype))


@native
@pytest.mark.parametrize("junk", [nan, inf])
@pytest.mark.parametrize("classes", [5, 40])
def test_nan_and_infinity_spoil_their_row_and_no_other(op, junk, classes):
    student, teacher = logits(3, classes, dtype=torch.float32)
    expected, slope = value_and_gradient(op, student, teacher, backend="cpu")
    for network in range(2):
        for place in range(classes):
            pair = [student.clone(), teacher.clone()]
            pair[network][1, place] = junk
            values, gradient = value_and_gradient(op, *pair, backend="cpu")
            assert values.isnan().tolist() == [False, True, False]
            assert gradient[1].isnan().all()
            assert_close(values[[0, 2]], expected[[0, 2]], rtol=0, atol=0)
            assert_close(gradient[[0, 2]], slope[[0, 2]], rtol=0, atol=0)


@native
def test_a_network_that_excludes_everything_is_nan(op):
    student, teacher = logits(2, 20, dtype=torch.float32)
    nothing = torch.full_like(student, -inf)
    for pair in ((nothing, teacher), (student, nothing), (nothing, nothing)):
        assert value_and_gradient(op, *pair, backend="cpu")[0].isnan().all()


@pytest.mark.parametrize("backend", ENGINES)
def test_labels_that_name_no_class_spoil_their_row(backend):
    student, teacher = logits(6, 4)
    student[4, 2] = teacher[4, 2] = -inf
    target = torch.tensor([0, -1, 4, -100, 2, 3])
    student.requires_grad_()
    values = weighted_dkd(student, teacher, target, 1.0, alpha=1.0, beta=1.0, backend=backend)
    assert values.isnan().tolist() == [False, True, True, True, True, False]
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    values = weighted_dkd(student, teacher, target, 1.0, alpha=1.0, beta=1.0, weight=weight, backend=backend)
    assert torch.autograd.grad(values.sum(), student)[0].isfinite().all()


# Digits


# Each pair of values of any two parameters.
BUDGETS = [
    (classes, spread, (1.0, 3.0, 1e4)[(i + j) % 3], (None, 1e-3)[(i + j // 2) % 2])
    for i, classes in enumerate((2, 9, 100, 1000))
    for j, spread in enumerate((1.0, 50.0, 1e3, 1e4))
]


@native
@pytest.mark.parametrize(("classes", "spread", "temperature", "noise"), BUDGETS)
def test_error_budget(op, classes, temperature, spread, noise):
    """Relative errors, down to values too small to matter.

    The first part of DKD alone compares two numbers that may agree by chance, known to an epsilon of a nat.
    The gradients of the reverse KL and JSD are differences from a mean that is as large as the value.
    """
    student, teacher = (spread * (x - 0.5) for x in torch.rand(2, 32, classes))
    if noise:
        teacher = student + noise * torch.randn_like(student)
    values, gradient = value_and_gradient(op, student, teacher, temperature, backend="cpu")
    truth, slope = value_and_gradient(op, student.double(), teacher.double(), temperature, backend="cpu")
    chance = 2e-7 if op is OPS["dkd, the target alone"] else 0
    assert ((values - truth).abs() <= 3e-6 * truth + chance * truth.sqrt() + 1e-12).all()
    mean = 0 if op in (forward_kl, OPS["dkd"], OPS["dkd, the rest alone"]) else 1e-7 * truth
    error, size = (gradient - slope).abs().amax(-1), slope.abs().amax(-1)
    assert (temperature * error <= 3e-6 * temperature * size + chance + mean + 1e-12).all()


@native
def test_the_truth_of_the_error_budget(op):
    """The native engine in float64 against the reference, where the latter has the digits."""
    for spread in (1.0, 50.0, 1e3):
        student, teacher = logits(16, 50, spread=spread)
        agree(op, student, teacher, rtol=1e-11)


# Every temperature. The truth is the definition in sixty decimal places, where nothing needs to be clever.


def probabilities(row, temperature):
    exponentials = [(Decimal(x) / Decimal(temperature)).exp() for x in row]
    return [x / sum(exponentials) for x in exponentials]


def spread_of(weights, of):
    """Each weight times the distance from the mean."""
    mean = sum(w * x for w, x in zip(weights, of, strict=True))
    return [w * (x - mean) for w, x in zip(weights, of, strict=True)]


def exact_kl(p, q):
    return sum(a * (a / b).ln() for a, b in zip(p, q, strict=True))


def exact_forward(s, t, _):
    return exact_kl(t, s), [b - a for a, b in zip(t, s, strict=True)]


def exact_reverse(s, t, _):
    return exact_kl(s, t), spread_of(s, [(b / a).ln() for a, b in zip(t, s, strict=True)])


def exact_jsd(s, t, _, beta):
    beta = Decimal(beta)
    m = [beta * a + (1 - beta) * b for a, b in zip(t, s, strict=True)]
    logs = [(b / c).ln() for b, c in zip(s, m, strict=True)]
    value = beta * exact_kl(t, m) + (1 - beta) * exact_kl(s, m)
    return value, [(1 - beta) * x for x in spread_of(s, logs)]


def exact_dkd(s, t, y, alpha, beta):
    halves = [(x[y], 1 - x[y]) for x in (t, s)]
    rest = [[x[i] / (1 - x[y]) if i != y else Decimal(1) for i in range(len(x))] for x in (t, s)]
    gradient = [
        beta * (b - a) - alpha * (s[y] - t[y]) * b if i != y else alpha * (s[y] - t[y])
        for i, (a, b) in enumerate(zip(*rest, strict=True))
    ]
    return alpha * exact_kl(*halves) + beta * exact_kl(*(x[:y] + x[y + 1 :] for x in rest)), gradient


@cache
def exact(kind, temperature):
    """Logits, labels, and of them T^2 times the values and T^2 times their gradients, in float64."""
    torch.manual_seed(0)
    student, teacher = logits(12, 10, dtype=torch.float32)
    target = teacher.argsort(1, descending=True)[:, 1]
    values, gradients = [], []
    with decimal.localcontext(prec=60):
        for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
            value, gradient = EXACT[kind][1](probabilities(s, temperature), probabilities(t, temperature), y)
            values.append(float(value * Decimal(temperature) ** 2))
            gradients.append([float(x * Decimal(temperature)) for x in gradient])
    truth = (torch.tensor(x, dtype=torch.float64) for x in (values, gradients))
    return student, teacher, target, *truth


def jensen_shannon(beta):
    return lambda s, t, temperature, **more: jsd(s, t, beta, temperature, **more)


# For each, the formula above and the largest relative errors in float32: of the values, and of the gradient,
# over its largest entry. The gradients of the last three are differences from a mean.
EXACT = {
    "forward_kl": (forward_kl, exact_forward, 1e-6, 1e-6),
    "dkd": (_dkd, partial(exact_dkd, alpha=1, beta=8), 1e-6, 2e-6),
    "dkd, the rest alone": (
        partial(_dkd, alpha=0.0, beta=2.0),
        partial(exact_dkd, alpha=0, beta=2),
        1e-6,
        1e-6,
    ),
    "reverse_kl": (reverse_kl, exact_reverse, 1e-6, 1e-5),
    "jsd 0.5": (jensen_shannon(0.5), partial(exact_jsd, beta=0.5), 2e-6, 1e-5),
    "jsd 0.1": (jensen_shannon(0.1), partial(exact_jsd, beta=0.1), 2e-6, 1e-5),
}


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("kind", EXACT)
def test_every_temperature(kind, temperature, dtype, backend):
    op, _, most, most_of_gradient = EXACT[kind]
    student, teacher, target, truth, slope = exact(kind, temperature)
    labels = {"target": target} if "dkd" in kind else {}
    s, t = student.to(dtype), teacher.to(dtype)
    values, gradient = value_and_gradient(op, s, t, temperature, backend=backend, **labels)
    unit = 1 if dtype == torch.float32 else 1e-8
    assert_close(values.double() * temperature**2, truth, rtol=most * unit, atol=0)
    error = (gradient.double() * temperature**2 - slope).abs().amax(1) / slope.abs().amax(1)
    assert error.max() <= most_of_gradient * unit


@native
@pytest.mark.slow
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="not an x86-64 processor")
@pytest.mark.parametrize("name", ["x86-64-v2", "x86-64-v3"])
def test_every_instruction_set(name):
    current = engines.describe()["instruction_set"].split()[0]
    if current <= name:
        pytest.skip(f"this processor offers no more than {current}, which all other tests run on")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "cpu and (every_temperature or spelled_out or two_parts)"],
        env={**os.environ, "LUCE_INSTRUCTION_SET": name, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


@native
def test_logits_beyond_the_range_of_their_difference(op):
    """6e38 is no number of float32; a quarter of it is."""
    student, teacher = logits(3, 20, dtype=torch.float32)
    student[0, :3], teacher[0, :3] = torch.tensor([3e38, -3e38, 1.0]), torch.tensor([-3e38, 3e38, 1.0])
    student[1, 4], teacher[1, 4] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    values, gradient = value_and_gradient(op, student, teacher, 4.0, backend="cpu")
    truth, slope = value_and_gradient(op, student.double(), teacher.double(), 4.0, backend="cpu")
    assert_close(values, truth.float(), rtol=1e-5, atol=0)
    assert_close(gradient, slope.float(), rtol=1e-4, atol=1e-6)


# PyTorch


@native
def test_derivatives(op):
    student, teacher = logits(3, 6)
    student.requires_grad_()
    weight = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)
    target = torch.tensor([0, 1, 5])
    more = {"target": target} if op is _dkd or isinstance(op, partial) else {}
    for temperature in (1.0, 3.0):
        run = partial(op, teacher=teacher, temperature=temperature, weight=weight, backend="cpu", **more)
        if not more and op not in (forward_kl, reverse_kl):
            run = lambda s, t=temperature: op(s, teacher, t, weight=weight, backend="cpu")  # noqa: E731
        torch.autograd.gradcheck(lambda s, run=run: run(s), student)
        torch.autograd.gradgradcheck(lambda s, run=run: run(s), student)


@native
def test_opcheck(kind):
    index = KINDS.index(kind)
    for shape in ((4, 9), (2, 9, 3)):
        student, teacher = logits(*shape, dtype=torch.float32)
        target, weight = (
            torch.zeros(shape[:1] + shape[2:], dtype=torch.long),
            torch.ones(shape[:1] + shape[2:]),
        )
        student.requires_grad_()
        torch.library.opcheck(
            torch.ops.luce.divergence.default, (student, teacher, weight, index, 2.0, 0.3, True)
        )
        torch.library.opcheck(
            torch.ops.luce.dkd.default, (student, teacher, target, weight, 2.0, 1.0, 8.0, True)
        )


@native
def test_compiled_is_eager(op):
    torch.compiler.reset()
    student, teacher = logits(4, 9, dtype=torch.float32)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected = value_and_gradient(op, student, teacher, 2.0)
    assert_close(value_and_gradient(compiled, student, teacher, 2.0), expected)


@native
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(2, 3), torch.zeros(3, 3)),
        (torch.zeros(2, 3, 2), torch.zeros(2, 3)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(2, 0), torch.zeros(2, 0)),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)),
    ],
)
def test_bad_input_raises(student, teacher):
    target = torch.zeros(2, dtype=torch.long)
    with pytest.raises(RuntimeError, match="expected"):
        forward_kl(student, teacher, 1.0, backend="cpu")
    with pytest.raises(RuntimeError, match="expected"):
        weighted_dkd(student, teacher, target, 1.0, alpha=1.0, beta=1.0, backend="cpu")


@native
def test_bad_labels_and_weights_raise():
    student, teacher = logits(2, 3)
    for target in (torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="expected `target`"):
            weighted_dkd(student, teacher, target, 1.0, alpha=1.0, beta=1.0, backend="cpu")
    with pytest.raises(RuntimeError, match="expected `weight`"):
        forward_kl(student, teacher, 1.0, weight=torch.ones(2), backend="cpu")  # float32 beside float64
    with pytest.raises(ValueError, match="backend"):
        forward_kl(student, teacher, 1.0, backend="tpu")
