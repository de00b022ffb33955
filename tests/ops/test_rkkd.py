"""RKKD's differentiable Kendall tau: golden values, laws, and the native engine against float64."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from luce.ops._pairs import PAIRS
from luce.ops.engines import WHY_NOT
from luce.ops.rkkd import FORMS
from luce.ops.rkkd import rkkd as public
from luce.ops.rkkd.reference import rkkd as naive
from luce.ops.rkkd.reference import rkkd_in_blocks, rkkd_rows

needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=f"needs the native library: {WHY_NOT}")
native = functools.partial(public, backend="cpu")
every_form = pytest.mark.parametrize("form", FORMS)
inf, nan = math.inf, math.nan

T = [2.0, 0.5, -1.0, 0.3]
S = [1.2, 0.7, -0.4, 0.9]


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_native)])
def rkkd(request):
    return functools.partial(public, backend=request.param)


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def with_gradient(loss, student, teacher, **options):
    student = student.detach().clone().requires_grad_()
    values = loss(student, teacher, **options)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


def sign(x):
    return (x > 0) - (x < 0)


def clip(x):
    return max(-1.0, min(1.0, x))


def sech2(x):
    return 1 / math.cosh(x) ** 2


# A pair's agreement and its derivative by d_s, in the paper's words.
AGREEMENT = {
    "tanh": lambda s, t, k: math.tanh(k * t) * math.tanh(k * s),
    "sign_tanh": lambda s, t, k: sign(t) * math.tanh(k * s),
    "product": lambda s, t, k: math.tanh(k * t * s),
    "sigmoid": lambda s, t, k: (2 / (1 + math.exp(-k * t)) - 1) * (2 / (1 + math.exp(-k * s)) - 1),
    "clip": lambda s, t, k: sign(t) * clip(k * s),
}
SLOPE = {
    "tanh": lambda s, t, k: k * math.tanh(k * t) * sech2(k * s),
    "sign_tanh": lambda s, t, k: k * sign(t) * sech2(k * s),
    "product": lambda s, t, k: k * t * sech2(k * t * s),
    "sigmoid": lambda s, t, k: k / 2 * math.tanh(k / 2 * t) * sech2(k / 2 * s),
    "clip": lambda s, t, k: k * sign(t) * (abs(k * s) < 1),
}


# Values


@pytest.mark.parametrize(
    ("form", "k", "loss", "gradient"),  # the figures of an independent computation, to six places
    [
        ("tanh", 1, 0.493988, [-0.286277, 0.032839, 0.116125, 0.137313]),
        ("tanh", 2, 0.317486, [-0.378172, 0.015037, 0.025299, 0.337836]),
        ("tanh", 10, 0.322398, [-0.016746, -0.113213, 0.000000, 0.129959]),
        ("sign_tanh", 1, 0.476676, [-0.308685, -0.088966, 0.127860, 0.269791]),
        ("sign_tanh", 2, 0.353309, [-0.379392, -0.161197, 0.025458, 0.515131]),
        ("product", 1, 0.345336, [-0.370041, 0.081561, 0.062038, 0.226443]),
        ("product", 2, 0.234975, [-0.321160, 0.021398, 0.004718, 0.295044]),
        ("sigmoid", 1, 0.750953, [-0.148236, 0.001862, 0.113909, 0.032465]),
        ("sigmoid", 2, 0.493988, [-0.286277, 0.032839, 0.116125, 0.137313]),
        ("clip", 1, 0.4, [-2 / 6, 0.0, 0.0, 2 / 6]),
        ("clip", 1.5, 0.35, [-3 / 6, 0.0, 0.0, 3 / 6]),
    ],
)
def test_golden_values(rkkd, form, k, loss, gradient):
    value, slope = with_gradient(rkkd, tensor([S]), tensor([T]), form=form, steepness=k)
    assert value.item() == pytest.approx(loss, abs=6e-7)
    assert_close(slope, tensor([gradient]), rtol=0, atol=6e-7)
    pairs = list(itertools.combinations(range(4), 2))
    agreement = sum(AGREEMENT[form](S[i] - S[j], T[i] - T[j], k) for i, j in pairs)
    assert value.item() == pytest.approx(1 - agreement / 6, rel=1e-13)
    for i in range(4):
        gain = sum(SLOPE[form](S[i] - S[j], T[i] - T[j], k) for j in range(4) if j != i)
        assert slope[0, i].item() == pytest.approx(-gain / 6, rel=1e-12, abs=1e-15)


def test_values_of_special_students(rkkd):
    t = tensor([T])
    differences = [a - b for a, b in itertools.combinations(T, 2)]
    for k in (1, 2, 10):
        equal = 1 - sum(math.tanh(k * d) ** 2 for d in differences) / 6
        assert rkkd(t, t, steepness=k).item() == pytest.approx(equal, rel=1e-12)
        lowest = 1 - sum(abs(math.tanh(k * d)) for d in differences) / 6
        assert rkkd(1000 * t, t, steepness=k).item() == pytest.approx(lowest, rel=1e-12)
    value, gradient = with_gradient(rkkd, tensor([[0.0] * 4]), t)
    assert value == 1
    expected = [-sum(math.tanh(a - b) for b in T) / 6 for a in T]
    assert_close(gradient, tensor([expected]))


def test_two_classes_are_one_pair(rkkd):
    value = rkkd(tensor([[0.3, -0.1]]), tensor([[-1.0, 1.0]]))
    assert value.item() == pytest.approx(1 + math.tanh(2) * math.tanh(0.4), rel=1e-14)


# Laws, on logits without ties


def logits(rows=5, classes=9, scale=1.0):
    return scale * torch.randn(2, rows, classes, dtype=torch.float64)


@every_form
@pytest.mark.parametrize("k", [0.3, 2.0, 50.0])
def test_the_range_and_the_reverse(rkkd, form, k):
    s, t = logits()
    value = rkkd(s, t, form=form, steepness=k)
    assert ((value >= 0) & (value <= 2)).all()
    assert_close(value + rkkd(-s, t, form=form, steepness=k), torch.full((5,), 2.0, dtype=torch.float64))


@every_form
def test_shifts_do_not_matter(rkkd, form):
    s, t = logits()
    value, gradient = with_gradient(rkkd, s, t, form=form)
    assert_close(rkkd(s + 3, t, form=form), value)
    assert_close(rkkd(s, t - 7, form=form), value)
    assert_close(gradient.sum(-1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (gradient.abs().amax(-1) > 1e-3).all()


@every_form
def test_classes_have_no_numbers(rkkd, form):
    s, t = logits()
    shuffled = torch.randperm(9)
    value, gradient = with_gradient(rkkd, s, t, form=form)
    other, other_gradient = with_gradient(rkkd, s[:, shuffled], t[:, shuffled], form=form)
    assert_close(other, value)
    assert_close(other_gradient, gradient[:, shuffled])


@pytest.mark.parametrize("form", ["tanh", "sign_tanh", "product", "sigmoid", "clip"])
def test_steep_is_kendall(rkkd, form):
    s, t = logits()
    expected = [1 - scipy.stats.kendalltau(a, b).statistic for a, b in zip(s, t, strict=True)]
    assert_close(rkkd(s, t, form=form, steepness=1e9), tensor(expected))


@pytest.mark.parametrize("k", [0.5, 3.0])
def test_forms_that_are_related(rkkd, k):
    s, t = logits()
    assert_close(rkkd(s, t, form="sigmoid", steepness=k), rkkd(s, t, steepness=k / 2))
    assert_close(rkkd(2.5 * s, 2.5 * t, steepness=k / 2.5), rkkd(s, t, steepness=k))
    for form in ("tanh", "product"):
        assert_close(rkkd(s, t, form=form), rkkd(t, s, form=form))
    assert not torch.allclose(rkkd(s, t, form="sign_tanh"), rkkd(t, s, form="sign_tanh"), rtol=1e-3)


@pytest.mark.parametrize("form", ["tanh", "sign_tanh", "clip"])
def test_the_gradient_is_bounded(rkkd, form):
    s, t = logits(scale=0.01)
    _, gradient = with_gradient(rkkd, s, 1000 * t, form=form, steepness=3.0)
    assert 0.8 * 2 * 3 / 9 < gradient.abs().max() <= 2 * 3 / 9 + 1e-12


def test_a_teacher_that_needs_a_gradient_gets_it_from_the_reference_alone():
    s, t = logits()
    assert torch.autograd.gradcheck(
        lambda s, t: public(s, t, form="product"), (s.requires_grad_(), t.requires_grad_())
    )
    with pytest.raises(RuntimeError, match="no gradient for the teacher"):
        public(s, t, backend="cpu")
    with torch.no_grad():
        public(s, t, backend="cpu")


@pytest.mark.parametrize("form", ["tanh", "sign_tanh", "product", "sigmoid"])
def test_gradcheck(rkkd, form):
    s, t = logits(2, 5)
    weight = tensor([2.0, 0.5])

    def values(s):
        return rkkd(s, t, form=form, steepness=0.7, weight=weight)

    assert torch.autograd.gradcheck(values, s.requires_grad_())
    assert torch.autograd.gradgradcheck(values, s)


def test_gradcheck_of_clip(rkkd):
    s = tensor([[0.0, 0.3, 1.7, -0.4]])  # no difference near the corner at 1
    assert torch.autograd.gradcheck(lambda s: rkkd(s, tensor([T]), form="clip"), s.requires_grad_())


# Special values


@every_form
def test_ties_agree_with_nothing(rkkd, form):
    options = {"form": form, "steepness": 1e6}
    assert rkkd(tensor([[1.0, 1.0, 0.0]]), tensor([[3.0, 2.0, 1.0]]), **options).item() == pytest.approx(
        1 - 2 / 3
    )
    assert rkkd(tensor([[3.0, 2.0, 1.0]]), tensor([[1.0, 1.0, 0.0]]), **options).item() == pytest.approx(
        1 - 2 / 3
    )
    assert rkkd(tensor([[1.0, 1.0, 1.0]]), tensor([[3.0, 2.0, 1.0]]), **options) == 1
    assert rkkd(tensor([[3.0, 2.0, 1.0]]), tensor([[1.0, 1.0, 1.0]]), **options) == 1


@every_form
def test_absent_classes_do_not_exist(rkkd, form):
    s, t = logits(3, 20)
    absent = torch.tensor([0, 4, 5, 19])
    present = torch.tensor([i for i in range(20) if i not in absent])
    expected, expected_gradient = with_gradient(rkkd, s[:, present], t[:, present], form=form)
    s[:, absent] = t[:, absent] = -inf
    value, gradient = with_gradient(rkkd, s, t, form=form)
    assert_close(value, expected)
    assert_close(gradient[:, present], expected_gradient)
    assert (gradient[:, absent] == 0).all()


@every_form
def test_excluded_by_one_network(rkkd, form):
    """An infinite difference has a sign and no slope; two excluded classes are tied."""

    def agreement(s, t):
        if s == 0 or t == 0:
            return 0
        if form == "tanh" or form == "sigmoid":
            k = 1 if form == "tanh" else 0.5
            return math.tanh(k * t) * math.tanh(k * s)
        if form == "product":
            return math.tanh(s * t)
        return sign(t) * (math.tanh(s) if form == "sign_tanh" else clip(s))

    def difference(x, i, j):
        return 0 if x[i] == x[j] else x[i] - x[j]

    for s, t in [
        ([0.5, -inf, 0.2, -0.3], [1.0, 0.0, -1.0, 0.4]),
        ([0.5, -inf, 0.2, -inf], [1.0, 0.0, -1.0, 1.5]),
        ([0.5, 0.1, 0.2, -0.3], [1.0, -inf, -inf, 0.4]),
        ([-inf, 0.1, 0.2, -0.3], [1.0, -inf, 0.2, 0.2]),
        ([0.5, -inf, 0.2, -0.3], [1.0, 0.4, -1.0, 0.4]),
        ([0.5, 0.2, 0.2, -0.3], [1.0, -inf, -1.0, 0.4]),
    ]:
        value, gradient = with_gradient(rkkd, tensor([s]), tensor([t]), form=form)
        pairs = itertools.combinations(range(4), 2)
        expected = 1 - sum(agreement(difference(s, i, j), difference(t, i, j)) for i, j in pairs) / 6
        assert value.item() == pytest.approx(expected, rel=1e-13)
        gains = [
            sum(
                SLOPE[form](s[i] - s[j], difference(t, i, j), 1.0)
                for j in range(4)
                if j != i
                and math.isfinite(s[i] - s[j])
                and (form != "product" or math.isfinite(difference(t, i, j)))
            )
            for i in range(4)
        ]
        assert_close(gradient, -tensor([gains]) / 6)


def test_rows_of_fewer_than_two_classes_cost_nothing(rkkd):
    s, t = tensor([[1.0, -inf, -inf], [-inf] * 3]), tensor([[2.0, -inf, -inf], [-inf] * 3])
    value, gradient = with_gradient(rkkd, s, t)
    assert value.tolist() == [0, 0]
    assert (gradient == 0).all()


@every_form
@pytest.mark.parametrize("bad", [nan, inf])
def test_undefined_rows_stay_alone(rkkd, form, bad):
    s, t = logits(4, 6)
    clean, clean_gradient = with_gradient(rkkd, s, t, form=form)
    s[1, 2] = t[2, 5] = bad
    value, gradient = with_gradient(rkkd, s, t, form=form)
    assert value.isnan().tolist() == [False, True, True, False]
    assert_close(value[[0, 3]], clean[[0, 3]])
    assert_close(gradient[[0, 3]], clean_gradient[[0, 3]])
    assert gradient[1, 3:].isnan().all()
    alone = rkkd(tensor([[nan, -inf]]), tensor([[0.0, -inf]]), form=form)
    assert alone.isnan()


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_finite_values(rkkd, form, dtype):
    largest = torch.finfo(dtype).max
    s = torch.tensor([[largest, -largest, 0.0]], dtype=dtype)
    for t, loss in ((s, 0), (-s, 2), (torch.tensor([[3.0, 1.0, 2.0]], dtype=dtype), None)):
        value, gradient = with_gradient(rkkd, s, t, form=form)
        assert gradient.tolist() == [[0, 0, 0]]
        assert loss is None or value == loss
        assert 0 <= value <= 2


def test_rows_of_weight_zero_are_not_looked_at(rkkd):
    s, t = logits(3, 6)
    plain, plain_gradient = with_gradient(rkkd, s, t)
    s[1] = nan
    value, gradient = with_gradient(rkkd, s, t, weight=tensor([2.0, 0.0, 0.5]))
    assert_close(value, torch.stack([2 * plain[0], 0 * plain[0], plain[2] / 2]))
    expected = torch.stack([2 * plain_gradient[0], 0 * plain_gradient[0], plain_gradient[2] / 2])
    assert_close(gradient, expected)


# Layouts


@pytest.mark.parametrize(
    "dtypes", list(itertools.product([torch.float32, torch.bfloat16, torch.float16, torch.float64], repeat=2))
)
def test_dtypes(rkkd, dtypes):
    s, t = torch.randn(5, 11).to(dtypes[0]), torch.randn(5, 11).to(dtypes[1])
    value, gradient = with_gradient(rkkd, s, t)
    expected, expected_gradient = with_gradient(naive, s.double(), t.double(), form="tanh", steepness=1.0)
    assert value.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert gradient.dtype == dtypes[0]
    assert_close(value.double(), expected, rtol=1e-6, atol=0)
    eps = max(1e-6, torch.finfo(dtypes[0]).eps)
    assert_close(gradient.double(), expected_gradient, rtol=eps, atol=1e-7)


@every_form
def test_layouts(rkkd, form):
    s, t = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    weight = torch.rand(4, 5, dtype=torch.float64)
    value, gradient = with_gradient(rkkd, s, t, form=form, weight=weight)
    for m in range(5):
        one, one_gradient = with_gradient(rkkd, s[..., m], t[..., m], form=form, weight=weight[:, m])
        assert_close(value[:, m], one)
        assert_close(gradient[..., m], one_gradient)
    s, t = torch.randn(2, 14, 4, dtype=torch.float64)
    expected = rkkd(s.T[:, ::2].contiguous(), t.T[:, ::2].contiguous(), form=form)
    assert_close(rkkd(s.T[:, ::2], t.T[:, ::2], form=form), expected)
    assert_close(rkkd(s[:1].expand(3, 4), t[:3], form=form), rkkd(s[:1].repeat(3, 1), t[:3], form=form))
    assert rkkd(s[:0], t[:0], form=form).shape == (0,)


@pytest.mark.parametrize("weight", [torch.rand(6, dtype=torch.float64), torch.rand(1).expand(6)])
def test_weights_of_any_kind(rkkd, weight):
    s, t = torch.randn(2, 6, 5)
    value = rkkd(s, t, weight=weight)
    assert value.dtype == torch.float32
    assert_close(value, rkkd(s, t) * weight.float())


# Errors


def test_errors(rkkd):
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="two classes or more"):
        rkkd(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 4\)"):
        rkkd(x, torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        rkkd(x[0], x[0])
    with pytest.raises(ValueError, match="weight"):
        rkkd(x, x, weight=torch.ones(4))
    with pytest.raises(TypeError, match=r"teacher.*int64"):
        rkkd(x, x.long())
    with pytest.raises(ValueError, match="'kendall'"):
        rkkd(x, x, form="kendall")
    for k in (0, -1, inf, nan):
        with pytest.raises(ValueError, match="steepness"):
            rkkd(x, x, steepness=k)


def test_unknown_backend():
    with pytest.raises(ValueError, match="'fast'"):
        public(torch.zeros(3, 4), torch.zeros(3, 4), backend="fast")


@needs_native
def test_bad_input_of_the_operator_itself():
    x, op = torch.zeros(3, 4), torch.ops.luce.rkkd
    for arguments in (
        (x, x[:, :3], None, 0, 1.0, True),
        (x, x.long(), None, 0, 1.0, True),
        (x, x, torch.ones(2), 0, 1.0, True),
        (x, x, None, 4, 1.0, True),
        (x, x, None, -1, 1.0, True),
        (x, x, None, 0, -1.0, True),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            op(*arguments)


# Blocks in plain PyTorch


@every_form
@pytest.mark.parametrize("width", [1, 2, 4, 7, 10, 11])
def test_blocks_of_every_width(form, width):
    s, t = logits(3, 10)
    value, gradient = with_gradient(naive, s, t, form=form, steepness=1.5)
    blocked, blocked_gradient = with_gradient(rkkd_in_blocks, s, t, form=form, steepness=1.5, width=width)
    assert_close(blocked, value, rtol=1e-14, atol=1e-15)
    assert_close(blocked_gradient, gradient, rtol=1e-13, atol=1e-15)


def test_blocks_keep_no_array_of_pairs():
    s, t = logits(2, 60)

    def largest_kept(block):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            rkkd_rows(s.requires_grad_(), t, None, FORMS.index("tanh"), 1.0, block)
        return max(sizes)

    assert largest_kept(5) == 2 * 60
    assert largest_kept(60) == 2 * 60 * 60


def test_blocks_can_be_differentiated_twice():
    s, t = logits(2, 4)
    assert torch.autograd.gradgradcheck(
        lambda s: rkkd_rows(s, t, None, FORMS.index("tanh"), 1.0, block=3), s.requires_grad_()
    )


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
def test_memory_is_that_of_a_block_of_pairs(backend):
    """An array of all pairs of these rows would have 8 million numbers, nearly four times as many."""
    s, t = torch.randn(2, 2, 2000)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            made = [x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
            largest = max(largest, *made, 0)
            return result

    with Watch():
        _, gradient = with_gradient(public, s, t, backend=backend)
    assert largest <= (PAIRS if backend == "reference" else s.numel())
    assert gradient.isfinite().all()


# The native engine


def exactly(s, t, form, k):
    """Loss and gradient where nothing cancels, by 1 - tanh a tanh b = cosh(a - b) / (cosh a cosh b)."""
    if form == "sigmoid":
        return exactly(s, t, "tanh", k / 2)
    s, t = s.double(), t.double()
    n = s.shape[-1]
    ds, dt = s[:, :, None] - s[:, None], t[:, :, None] - t[:, None]
    a, b = k * ds, k * dt

    def scaled_cosh(x):  # 2 cosh(x) e^-|x|
        return 1 + (-2 * x.abs()).exp()

    def minus_tanh(x):  # 1 - tanh x = e^-x / cosh x
        return 2 * (-2 * x.clamp(min=0)).exp() / scaled_cosh(x)

    def sech2(x):
        return 4 * (-2 * x.abs()).exp() / scaled_cosh(x) ** 2

    if form == "tanh":
        exponent = torch.where(a.sign() == b.sign(), -2 * torch.minimum(a.abs(), b.abs()), 0)
        cost = 2 * exponent.exp() * scaled_cosh(a - b) / (scaled_cosh(a) * scaled_cosh(b))
        slope = b.tanh() * sech2(a)
    elif form == "sign_tanh":
        cost = torch.where(dt == 0, 1, minus_tanh(a * dt.sign()))
        slope = dt.sign() * sech2(a)
    elif form == "product":
        cost = minus_tanh(a * dt)
        slope = dt * sech2(a * dt)
    else:
        cost = 1 - dt.sign() * a.clamp(-1, 1)
        slope = dt.sign() * (a.abs() < 1)
    pairs = n * (n - 1)
    off_diagonal = ~torch.eye(n, dtype=torch.bool)
    return torch.where(off_diagonal, cost, 0).sum((1, 2)) / pairs, -2 * k / pairs * slope.sum(-1)


@needs_native
@every_form
@pytest.mark.parametrize("classes", [2, 3, 7, 8, 9, 31, 100, 257])
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float64, 2e-14), (torch.float32, 2e-6)])
def test_error_of_the_native_engine(form, classes, dtype, budget):
    """At any spread and steepness; gradients to a part of the row's largest."""
    for spread, k in itertools.product([1e-3, 1.0, 50.0, 1e3, 1e4], [0.01, 1.0, 10.0, 100.0]):
        s = (spread * torch.randn(4, classes, dtype=torch.float64)).to(dtype)
        t = (spread * torch.randn(4, classes, dtype=torch.float64) + s).to(dtype)
        if classes > 8:
            s[:, 3], t[:, 4] = s[:, 6], t[:, 5]
        value, gradient = with_gradient(native, s, t, form=form, steepness=k)
        expected, expected_gradient = exactly(s, t, form, k)
        assert_close(value.double(), expected, rtol=budget, atol=1e-3 * budget)
        largest = expected_gradient.abs().amax(-1, keepdim=True)
        # A slope of e^-20 stems from a difference of logits that both have their own rounding behind them.
        faint = 1e-6 * 2 * k / classes * (t.double().amax(-1) - t.double().amin(-1))[:, None].clamp(min=1)
        assert ((gradient.double() - expected_gradient).abs() <= budget * (largest + faint)).all(), (
            spread,
            k,
        )


@needs_native
def test_a_teacher_of_small_differences_keeps_its_digits():
    """tanh of a small number, as 1 - e^-x, cancels in a careless float32."""
    s, t = torch.randn(4, 50), 1e-5 * torch.randn(4, 50)
    _, gradient = with_gradient(native, s, t)
    _, expected = exactly(s, t, "tanh", 1.0)
    assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def clipped(s, t, k):
    """The clipped form by all pairs, in float64 but for the differences, as the native engine takes them."""
    d = s[:, :, None] - s[:, None]
    excluded = d.isnan()
    x = d.masked_fill(excluded, 0) * torch.tensor(k, dtype=s.dtype)
    sign = (t[:, :, None] > t[:, None]).double() - (t[:, :, None] < t[:, None]).double()
    exists = (s > -inf) | (t > -inf)
    both = exists[:, :, None] & exists[:, None]
    n = exists.sum(-1).double()
    total = torch.where(both, sign * x.double().clamp(-1, 1), 0).sum((1, 2))
    slope = torch.where(both & ~excluded & (x.abs() < 1), sign, 0).sum(-1)
    return 1 - total / (n * (n - 1)), -2 * k / (n * (n - 1))[:, None] * slope


TIES = ["none", "teacher", "student", "both", "all"]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("classes", "ties"),
    [
        *itertools.product([159, 160, 161], TIES),
        *(pytest.param(1100, ties, marks=[] if ties == "both" else pytest.mark.slow) for ties in TIES),
    ],
)
def test_the_sorted_clipped_form_is_the_sum_over_pairs(classes, dtype, ties):
    """For every window, also where logits of a lattice stand exactly 1/k apart, and far from 0."""
    steepness = [1e-3, 0.25, 1.0, 8.0, 1e4, 1e30] if classes < 1000 else [1.0, 8.0]
    for offset, k in itertools.product([0.0, 1e3], steepness):
        s, t = torch.randn(2, 3, classes, dtype=torch.float64)
        t = s + t
        s = (8 * s).round() / 8 if ties in ("student", "both") else s
        t = (8 * t).round() / 8 if ties in ("teacher", "both") else t
        s, t = (s * 0, t * 0) if ties == "all" else (s, t)
        s, t = (s + offset).to(dtype), (t - offset).to(dtype)
        s[1, :40], t[1, 30:90] = -inf, -inf  # ten of them exist in neither network
        t[2, classes // 2 :] = -inf
        value, gradient = with_gradient(native, s, t, form="clip", steepness=k)
        expected, expected_gradient = clipped(s, t, k)
        budget = 1e-13 if dtype == torch.float64 else 1e-6
        assert_close(value.double(), expected, rtol=budget, atol=budget)
        assert_close(gradient.double(), expected_gradient, rtol=budget, atol=0)


@needs_native
def test_the_sorted_clipped_form_of_special_rows():
    for excluding in ("student", "teacher"):
        s, t = torch.randn(2, 1, 300)
        (s if excluding == "student" else t)[:] = -inf
        value, gradient = with_gradient(native, s, t, form="clip")
        assert value == 1
        assert (gradient == 0).all()
    largest = torch.finfo(torch.float32).max
    s = torch.randn(1, 300)
    s[0, 5], s[0, 6] = largest, -largest  # their difference overflows
    value, gradient = with_gradient(native, s, -s, form="clip", steepness=1e30)
    assert value == 2
    assert (gradient == 0).all()
    one_sided = torch.cat([torch.full((1, 299), -inf), torch.zeros(1, 1)], dim=1)
    assert native(one_sided, torch.randn(1, 300), form="clip").isfinite()


@pytest.mark.parametrize("classes", [7, 400])
def test_steep_clip_is_kendalls_tau_a_also_with_ties(rkkd, classes):
    s, t = torch.randint(-20, 20, (2, 4, classes)).double()
    concordance = [
        np.triu(np.sign(np.subtract.outer(a, a)) * np.sign(np.subtract.outer(b, b))).sum()
        for a, b in zip(s.numpy(), t.numpy(), strict=True)
    ]
    expected = 1 - tensor(concordance) / (classes * (classes - 1) / 2)
    assert_close(rkkd(s, t, form="clip", steepness=1e9), expected, rtol=1e-14, atol=0)


@needs_native
def test_a_hundred_thousand_classes_in_order_of_their_number():
    """The student swaps every two: of the pairs 1 apart, counted by half, 50,000 disagree, 49,999 agree."""
    t = torch.arange(100_000.0, dtype=torch.float64)
    s = t.reshape(-1, 2).flip(-1).flatten()
    value, gradient = with_gradient(native, s[None], t[None], form="clip", steepness=0.5)
    pairs = 100_000 * 99_999 / 2
    assert value.item() == pytest.approx((99_999 - 0.5 * 49_999 + 0.5 * 50_000) / pairs, rel=1e-12)
    # The one above disagrees and the one below agrees, or the other way round; those at the ends have one.
    inner = 0.5 / pairs * torch.tensor([-2.0, 2.0], dtype=torch.float64).repeat(50_000)
    inner[0], inner[-1] = inner[0] / 2, inner[-1] / 2
    assert_close(gradient[0].sort().values, inner.sort().values, rtol=1e-12, atol=0)


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_meet(threads):
    torch.set_num_threads(threads)
    s, t = torch.randn(2, 500, 33)
    value, gradient = with_gradient(native, s, t)
    for row in range(0, 500, 49):
        one, one_gradient = with_gradient(native, s[row : row + 1], t[row : row + 1])
        assert_close(value[row : row + 1], one, rtol=0, atol=0)
        assert_close(gradient[row : row + 1], one_gradient, rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 3)])
def test_the_operator_is_well_behaved(dtype, shape):
    s, t = torch.randn(2, *shape, dtype=dtype)
    weight = torch.rand(
        shape[:1] + shape[2:], dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    for student in (s, s.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.library.opcheck(torch.ops.luce.rkkd, (student.requires_grad_(), t, weight, 0, 1.0, True))
    torch.library.opcheck(torch.ops.luce.rkkd, (s.detach(), t, None, 3, 2.0, False))


@needs_native
def test_compiled():
    s, t = logits(4, 6)
    s.requires_grad_()

    def step(s):
        return (native(s, t, form="product") ** 2).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(compiled(s), step(s))
    assert_close(torch.autograd.grad(compiled(s), s), torch.autograd.grad(step(s), s))
