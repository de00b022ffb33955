"""Rows of logits for the tests of the native PLD, and three ways to their results.

The native engine is `run`, the reference in float64 `truth`, the definition in forty digits `spelled_out`.
"""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch.testing import assert_close

from luce.ops import engines
from luce.ops.pld import PldOptions, pld_with_bound

native = pytest.mark.skipif(
    engines.WHY_NOT is not None, reason=f"the native library is not in use: {engines.WHY_NOT}"
)

inf, nan = math.inf, math.nan
VALUE, GRADIENT = 2e-6, 1e-5
"""Relative errors allowed in float32: of a row's value, and of its gradient over the largest entry."""
NOISE = {torch.float32: 1e-11, torch.float64: 1e-15}
"""Absolute errors allowed: a class e**-27 times as likely as another may count as excluded."""


def run(student, teacher, target=None, *, weight=None, order=None, backend="cpu", **options):
    """Return values, the gradient of their sum, and the error bounds."""
    student = student.detach().requires_grad_()
    options = PldOptions(**options)
    values, bound = pld_with_bound(
        student, teacher, target, weight=weight, order=order, options=options, backend=backend
    )
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient, bound


def truth(student, teacher, target=None, *, weight=None, **options):
    """Return values and gradient of the reference in float64."""
    weight = None if weight is None else weight.double()
    options = {name: value for name, value in options.items() if name != "tolerance"}
    student, teacher = student.double(), teacher.double()
    values, gradient, _ = run(student, teacher, target, weight=weight, backend="reference", **options)
    return values, gradient


def assert_right(result, expected, value=VALUE, gradient=GRADIENT):
    """Check each value and each entry of the gradient against its budget, and the places of inf and NaN."""
    (v, g), (v0, g0) = (result[:2], expected)
    noise = NOISE[v.dtype]
    assert_close(v.double(), v0, rtol=value, atol=noise, equal_nan=True)
    defined = ~v0.isnan()
    g, g0 = g.double()[defined], g0[defined]
    largest = g0.abs().amax(1, keepdim=True)
    assert ((g - g0).abs() <= gradient * largest + noise).all(), ((g - g0).abs() / largest).max()


def assert_same(a, b):
    assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def call(student=None, teacher=None, target=None, weight=None, order=None):
    student = torch.randn(3, 4) if student is None else student
    teacher = torch.randn(3, 4) if teacher is None else teacher
    return torch.ops.luce.pld(student, teacher, target, weight, order, 1.0, 2**62, 0.0, 0.0, False, True)


def assert_bounded(values, gradient, bound, expected, tolerance):
    value, slope = expected
    assert ((values - value).abs() <= bound[:, 0] + VALUE * value.abs()).all(), (values - value, bound)
    assert ((gradient - slope).abs().sum(-1) <= bound[:, 1] + VALUE * slope.abs().sum(-1)).all(), (
        (gradient - slope).abs().sum(-1),
        bound,
    )
    assert (bound <= tolerance * (1 + 1e-6)).all()


# Rows


def normal(rows, classes):
    return torch.randn(rows, classes), torch.randn(rows, classes)


def image(rows, classes):
    """A few classes are likely, and the student's logits of them are half as large."""
    teacher = torch.randn(rows, classes) + 8 * (torch.rand(rows, classes) < 3 / classes)
    return 0.5 * teacher + torch.randn(rows, classes), teacher


def language(rows, classes):
    """Zipf's law over randomly ordered classes."""
    rank = torch.rand(rows, classes).argsort(-1) + 1
    teacher = -1.8 * rank.log() + 0.1 * torch.randn(rows, classes)
    return teacher + torch.randn(rows, classes), teacher


KINDS = [normal, image, language]


def labels_of(teacher):
    """In turn the teacher's last class, none, its first, and a random one."""
    target = torch.randint(teacher.shape[1], teacher.shape[:1])
    target[::4] = teacher[::4].argmin(-1)
    target[1::4] = -1
    target[2::4] = teacher[2::4].argmax(-1)
    return target


def rounded_gradients(dtype):
    """Gradients that are any float32 we like, in 16 bits, and PyTorch's rounding of them.

    With two equal student logits and all of the teacher's probability on the label, a row's gradient is minus
    and plus half of its weight.
    """
    every = torch.arange(65536).to(torch.uint16).view(dtype).float()
    every = every[every.isfinite() & (every.abs() < 1e38)]
    upwards = torch.nextafter(every, torch.tensor(inf))
    middle = (every.double() + torch.cat([every[1:], every[-1:]]).double()) / 2
    middle = torch.cat([middle.float(), torch.tensor([65519.0, 65520.0, 65521.0, 1e6])])
    wanted = torch.cat([every, upwards, middle, torch.nextafter(middle, torch.tensor(0.0))])
    wanted = wanted[(wanted != 0) & (wanted.abs() > 2.0**-126)]
    student, teacher = (
        torch.zeros(len(wanted), 2, dtype=dtype),
        torch.tensor([0.0, -1e4]).expand(len(wanted), 2),
    )
    _, gradient, _ = run(student, teacher, torch.zeros(len(wanted), dtype=torch.long), weight=2 * wanted)
    return gradient, torch.stack([-wanted, wanted], 1).to(dtype)


# The definition, spelled out with forty digits and any exponent


def spelled_out(s, t, label, temperature=1.0, places=None, average=False, order=None):
    with localcontext() as context:
        context.prec = 40
        s, t = [Decimal(x) for x in s], [Decimal(x) for x in t]
        alpha = [((x - max(t)) / Decimal(temperature)).exp() for x in t]
        alpha = [a / sum(alpha) for a in alpha]
        worth = [(x - max(s)).exp() for x in s]
        order = sorted(range(len(t)), key=lambda i: (-t[i], i)) if order is None else order
        order = [i for i in order if i != label]
        groups = [[i] for i in order]
        if average:
            groups = [list(tied) for _, tied in itertools.groupby(order, key=lambda i: t[i])]
        if label >= 0:
            groups.insert(0, [label])
        groups = groups[:places]
        loss, gradient = Decimal(0), [Decimal(0)] * len(s)
        left = set(range(len(s)))
        for group in groups:
            left -= set(group)
            behind, own = sum(worth[i] for i in left), sum(worth[i] for i in group)
            half = Decimal(len(group) + 1) / (2 * len(group))
            z = behind + own * half
            mass = sum(alpha[i] for i in group)
            if mass == 0:
                continue
            for i in group:
                if alpha[i] > 0:
                    loss += alpha[i] * (z.ln() + max(s) - s[i]) if s[i].is_finite() else Decimal(inf)
                gradient[i] += mass * half * worth[i] / z - alpha[i]
            for i in left:
                gradient[i] += mass * worth[i] / z
        return float(loss), [float(g) for g in gradient]
