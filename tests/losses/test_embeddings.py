"""Losses between the rows of a batch: values by hand, again in plain loops, and the laws of each."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import luce
from luce.losses import linear_cka
from luce.losses.functional import embeddings

exp, log, sqrt = math.exp, math.log, math.sqrt
laws = settings(max_examples=15, deadline=None, derandomize=True)


def tensor(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


@st.composite
def batches(draw):
    """Student's and teacher's features of one batch, of widths of their own."""
    rows, wide, wider = draw(st.integers(2, 6)), draw(st.integers(2, 5)), draw(st.integers(2, 5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return [torch.randn(rows, width, generator=random, dtype=torch.float64) for width in (wide, wider)]


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def norm(x):
    return sqrt(dot(x, x))


def cosine(x, y):
    return dot(x, y) / norm(x) / norm(y)


def minus(x, y):
    return [a - b for a, b in zip(x, y, strict=True)]


def smooth_l1(x, y):
    return abs(x - y) - 0.5 if abs(x - y) > 1 else (x - y) ** 2 / 2


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def exactly(expected):
    return pytest.approx(expected, rel=1e-12)


# By hand, on two or three rows of two numbers


def test_sp_by_hand():
    s, t = tensor([[1.0, 0.0], [1.0, 1.0]]), tensor([[2.0], [0.0]])
    # G = [[1, 1], [1, 2]] and [[4, 0], [0, 0]]; the teacher's second row has no direction.
    rows = [[1 / sqrt(2), 1 / sqrt(2)], [1 / sqrt(5), 2 / sqrt(5)]]
    expected = ((rows[0][0] - 1) ** 2 + rows[0][1] ** 2 + 1) / 4
    assert luce.sp_loss(s, t).item() == exactly(expected)


def test_pkt_by_hand():
    s, t = tensor([[1.0, 0.0], [0.0, 3.0]]), tensor([[1.0, 0.0], [-2.0, 0.0]])
    # Cosines 0 and -1: the neighbour's share is (1/2) / (3/2) in the student and 0 in the teacher.
    eps = 1e-7
    expected = log((1 + eps) / (2 / 3 + eps)) / 2  # two rows of (1, 0), over four pairs
    assert luce.pkt_loss(s, t).item() == exactly(expected)


def test_rkd_by_hand():
    """A right-angled triangle of sides 3, 4, 5 beside three points in a line at 0, 1 and 3."""
    s, t = tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]), tensor([[0.0], [1.0], [3.0]])
    # Pairs (0, 1), (0, 2), (1, 2); means 4 and 2. Each pair counts twice, of nine.
    pairs = zip((3 / 4, 4 / 4, 5 / 4), (1 / 2, 3 / 2, 2 / 2), strict=True)
    distances = 2 * sum(smooth_l1(a, b) for a, b in pairs) / 9
    value = luce.rkd_loss(s, t, distance_weight=1.0, angle_weight=0.0)
    assert value.item() == exactly(distances)
    # Cosines at the corners 0, 1, 2: 0, 3/5, 4/5 against 1, -1, 1; each twice of 27, the rest are alike.
    angles = 2 * (smooth_l1(0, 1) + smooth_l1(0.6, -1) + smooth_l1(0.8, 1)) / 27
    value = luce.rkd_loss(s, t, distance_weight=0.0, angle_weight=1.0)
    assert value.item() == exactly(angles)
    assert luce.rkd_loss(s, t).item() == exactly(25 * distances + 50 * angles)


def test_cc_by_hand():
    s, t = tensor([[1.0, 0.0], [3.0, 4.0]]), tensor([[1.0, 0.0], [0.0, 2.0]])  # cosines 0.6 and 0
    difference = exp(-0.8) * (0.8 * 0.6 + 0.8**2 / 2 * 0.6**2)
    assert luce.cc_loss(s, t).item() == exactly(2 * difference**2 / 4)
    s = tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    t = tensor([[3.0, 0.0], [-1.0, 2.0], [5.0, 2.0]])  # apart by (2, 0), (1, 0), (0, 3)
    assert luce.cc_loss(s, t, form="consecutive").item() == exactly((2 * 1 + 0 * 3) / 2)


# In plain loops


def naive_sp(s, t):
    grams = [[[dot(x, y) for y in f] for x in f] for f in (s, t)]
    g, h = ([[v / norm(line) for v in line] for line in gram] for gram in grams)
    return mean((a - b) ** 2 for x, y in zip(g, h, strict=True) for a, b in zip(x, y, strict=True))


def naive_pkt(s, t, eps):
    def probabilities(f):
        close = [[(cosine(x, y) + 1) / 2 for y in f] for x in f]
        return [[v / sum(line) for v in line] for line in close]

    q, p = probabilities(s), probabilities(t)
    return mean(
        b * log((b + eps) / (a + eps)) for x, y in zip(q, p, strict=True) for a, b in zip(x, y, strict=True)
    )


def naive_rkd(s, t, distance_weight, angle_weight):
    every = range(len(s))

    def distances(f):
        d = [[norm(minus(x, y)) for y in f] for x in f]
        typical = mean(v for line in d for v in line if v > 0)
        return [[v / typical for v in line] for line in d]

    def angle(f, i, j, k):
        if j in (i, k):
            return 0.0
        return cosine(minus(f[i], f[j]), minus(f[k], f[j]))

    d, e = distances(s), distances(t)
    return distance_weight * mean(smooth_l1(d[i][j], e[i][j]) for i in every for j in every) + (
        angle_weight
        * mean(smooth_l1(angle(s, i, j, k), angle(t, i, j, k)) for i in every for j in every for k in every)
    )


def naive_cc(s, t, gamma, order):
    def kernel(x, y):
        terms = ((2 * gamma) ** p / math.factorial(p) * cosine(x, y) ** p for p in range(order + 1))
        return exp(-2 * gamma) * sum(terms)

    every = range(len(s))
    return mean((kernel(s[i], s[j]) - kernel(t[i], t[j])) ** 2 for i in every for j in every)


def naive_consecutive(s, t):
    apart = [[abs(a - b) for a, b in zip(x, y, strict=True)] for x, y in zip(s, t, strict=True)]
    return mean(dot(apart[n], apart[n + 1]) for n in range(len(s) - 1))


@laws
@given(batches())
def test_the_losses_again_in_loops(data):
    s, t = data
    a, b = s.tolist(), t.tolist()
    close = {"rel": 1e-8, "abs": 1e-13}
    assert luce.sp_loss(s, t).item() == pytest.approx(naive_sp(a, b), **close)
    for eps in (1e-7, 1e-2):
        assert luce.pkt_loss(s, t, eps=eps).item() == pytest.approx(naive_pkt(a, b, eps), **close)
    weights = {"distance_weight": 3.0, "angle_weight": 7.0}
    assert luce.rkd_loss(s, t, **weights).item() == pytest.approx(naive_rkd(a, b, **weights), **close)
    for gamma, order in ((0.4, 2), (1.0, 1), (0.7, 5)):
        value = luce.cc_loss(s, t, gamma=gamma, order=order)
        assert value.item() == pytest.approx(naive_cc(a, b, gamma, order), **close)
    width = min(s.shape[1], t.shape[1])
    value = luce.cc_loss(s[:, :width], t[:, :width], form="consecutive")
    expected = naive_consecutive(s[:, :width].tolist(), t[:, :width].tolist())
    assert value.item() == pytest.approx(expected, **close)


# Laws


LOSSES = (luce.sp_loss, luce.pkt_loss, luce.rkd_loss, luce.cc_loss)


@laws
@given(batches(), st.integers(0, 1000))
def test_orthogonal_maps_and_one_factor_change_nothing(data, seed):
    """Of either network; RKD does not see a shift either, and more dimensions are no matter."""
    s, t = data
    random = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(8, s.shape[1], generator=random, dtype=torch.float64))
    turned = 2.5 * s @ turn.mT
    for loss in LOSSES:
        assert_close(loss(turned, t), loss(s, t), rtol=1e-7, atol=1e-11)
        assert_close(loss(t, turned), loss(t, s), rtol=1e-7, atol=1e-11)
        assert_close(loss(turned, s), tensor(0.0), rtol=0, atol=1e-11)
    shift = torch.randn(8, generator=random, dtype=torch.float64)
    assert_close(luce.rkd_loss(turned + 10 * shift, t), luce.rkd_loss(s, t), rtol=1e-7, atol=1e-10)


@laws
@given(batches())
def test_a_factor_on_each_row_does_not_matter_to_cosines(data):
    s, t = data
    factors = torch.linspace(0.5, 4.0, len(s), dtype=torch.float64)[:, None]
    for loss in (luce.pkt_loss, luce.cc_loss):
        assert_close(loss(factors * s, t), loss(s, t), rtol=1e-9, atol=1e-13)


@laws
@given(batches())
def test_none_is_negative(data):
    for loss in (*LOSSES,):
        assert loss(*data) >= -1e-7  # the eps of PKT


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_single_row_has_no_relations(loss):
    s = torch.randn(1, 4, requires_grad=True)
    value = loss(s, torch.randn(1, 3))
    assert value.item() == pytest.approx(0, abs=1e-12)
    value.backward()
    assert_close(s.grad, torch.zeros(1, 4), rtol=0, atol=1e-7)


def test_sp_flattens_maps_and_keeps_their_places():
    s, t = torch.randn(3, 2, 4, 4), torch.randn(3, 5, 2, 2)
    assert_close(luce.sp_loss(s, t), luce.sp_loss(s.flatten(1), t.flatten(1)), rtol=0, atol=0)


def test_pkt_is_the_mean_kl_divergence_of_the_neighbours():
    s, t = torch.randn(2, 6, 4, dtype=torch.float64)
    q, p = ((torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2) + 1) / 2 for x in (s, t))
    q, p = (x / x.sum(1, keepdim=True) for x in (q, p))
    expected = torch.nn.functional.kl_div(q.log(), p, reduction="batchmean") / 6
    assert_close(luce.pkt_loss(s, t, eps=1e-12), expected, rtol=1e-6, atol=0)


def test_opposite_rows_stay_probabilities():
    """In float32 a cosine of -1 comes out as -1.0000001, and the logarithm's argument below 0."""
    random = torch.Generator().manual_seed(0)
    half = torch.randn(32, 500, generator=random)
    s = torch.cat([half, -half]).requires_grad_()
    for eps in (1e-7, 1e-12):
        value = luce.pkt_loss(s, torch.randn(64, 3, generator=random), eps=eps)
        assert value.isfinite()
        assert torch.autograd.grad(value, s)[0].isfinite().all()


@pytest.mark.parametrize("part", [1, 40, 100, 2**24])
def test_the_angles_part_by_part_are_the_angles(part, monkeypatch):
    s, t = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), torch.randn(7, 4, dtype=torch.float64)
    expected = luce.rkd_loss(s, t)
    slope = torch.autograd.grad(expected, s)[0]
    monkeypatch.setattr(embeddings, "PART", part)
    value = luce.rkd_loss(s, t)
    assert_close(value, expected, rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(value, s)[0], slope, rtol=1e-10, atol=1e-13)


def test_the_angles_of_many_rows_keep_little_for_the_backward_pass(monkeypatch):
    """Of 48 rows of 8 numbers: 48 * 48 * 48 = 110,592 cosines, of which a part holds a twelfth."""
    s, t = torch.randn(48, 8, requires_grad=True), torch.randn(48, 8)
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel()
        return x

    for part in (2**24, 48 * 48 * 4):
        monkeypatch.setattr(embeddings, "PART", part)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            luce.rkd_loss(s, t, distance_weight=0.0)
        if part == 2**24:
            assert max(kept.values()) >= 48**3
        else:
            assert sum(kept.values()) < 48**3 / 12


def test_short_distances_are_not_lost_beside_a_large_offset():
    """By products, x x + y y - 2 x y, float32 has no digit left of these."""
    random = torch.Generator().manual_seed(0)
    near = torch.randint(-8, 9, (6, 4), generator=random) / 16
    t = torch.randn(6, 3, generator=random)
    assert_close(luce.rkd_loss(near + 4096.0, t), luce.rkd_loss(near, t), rtol=1e-5, atol=0)


def test_rows_that_coincide_in_rkd():
    t = torch.randn(4, 3, dtype=torch.float64)
    s = torch.randn(4, 2, dtype=torch.float64)
    s[1] = s[0]
    s.requires_grad_()
    value = luce.rkd_loss(s, t)
    # Their distance is 0 and counts in the mean; they are no sides of a triangle.
    a, b = s.tolist(), t.tolist()
    d, e = ([[norm(minus(x, y)) for y in f] for x in f] for f in (a, b))
    typical, other = sum(map(sum, d)) / 12, sum(map(sum, e)) / 12
    distances = mean(smooth_l1(d[i][j] / typical, e[i][j] / other) for i in range(4) for j in range(4))
    only = luce.rkd_loss(s, t, angle_weight=0.0)
    assert only.item() == exactly(25 * distances)
    assert torch.autograd.grad(value, s)[0].isfinite().all()


def test_many_terms_make_the_kernel_of_cc_gaussian():
    s, t = torch.randn(2, 5, 3, dtype=torch.float64)
    gamma = 0.4
    a, b = (torch.nn.functional.normalize(x) for x in (s, t))
    kernels = [torch.exp(-gamma * torch.cdist(x, x).square()) for x in (a, b)]
    expected = (kernels[0] - kernels[1]).square().mean()
    assert_close(luce.cc_loss(s, t, gamma=gamma, order=20), expected, rtol=1e-8, atol=0)
    assert (luce.cc_loss(s, t, gamma=gamma, order=2) - expected).abs() < 0.2 * expected


def test_what_the_consecutive_form_of_cc_does_not_see():
    """A matching row between two that do not match hides both pairs; another order, and they count."""
    t = torch.zeros(3, 2)
    s = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    assert luce.cc_loss(s, t, form="consecutive") == 0
    assert luce.cc_loss(s[[1, 0, 2]], t, form="consecutive") == 1
    assert luce.cc_loss(s[:1], t[:1], form="consecutive") == 0
    with pytest.raises(ValueError, match=r"`student_features` of shape \(3, 2\), got \(3, 5\).*CCLoss"):
        luce.cc_loss(torch.zeros(3, 5), t, form="consecutive")


def test_both_embeddings_of_cc_are_learnt():
    loss = luce.CCLoss(form="consecutive", dim=3)
    loss.build([(4,)], [(5,)])
    assert (loss.embed_student.weight.shape, loss.embed_teacher.weight.shape) == ((3, 4), (3, 5))
    s, t = torch.randn(6, 4), torch.randn(6, 5)
    value = loss([s], [t])
    expected = luce.cc_loss(loss.embed_student(s), loss.embed_teacher(t), form="consecutive")
    assert_close(value, expected, rtol=0, atol=0)
    value.backward()
    assert all(parameter.grad.any() for parameter in loss.parameters())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_row_of_zeros_is_a_value_and_gets_a_finite_gradient(loss):
    s, t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    s[1], t[2] = 0, 0
    s.requires_grad_()
    value = loss(s, t)
    (slope,) = torch.autograd.grad(value, s)
    assert value > 0
    assert slope.isfinite().all()
    if loss in (luce.pkt_loss, luce.cc_loss):  # these compare directions
        assert not slope[1].any()
        tiny = s.detach().clone()
        tiny[1] = 1e-9
        assert not torch.isclose(loss(tiny, t), value)  # a direction, however short, is one


# Linear CKA, which is no loss


def hsic(k, other):
    """By the definition, with the matrix that takes off means."""
    rows = len(k)
    centre = torch.eye(rows, dtype=torch.float64) - torch.full((rows, rows), 1 / rows, dtype=torch.float64)
    return torch.trace(k @ centre @ other @ centre)


def test_linear_cka_by_hand():
    s = tensor([[1], [0], [-1]])  # centred; K_s has the entries 1, 0, -1 and their products
    t = tensor([[1, 0], [0, 2], [-1, -2]])
    gram_t = [[1, 0, -1], [0, 4, -4], [-1, -4, 5]]
    product = gram_t[0][0] - gram_t[0][2] - gram_t[2][0] + gram_t[2][2]
    size = sqrt(sum(x * x for row in gram_t for x in row))
    assert linear_cka(s, t).item() == exactly(product / (2 * size))


@laws
@given(batches())
def test_linear_cka_is_that_of_kernels_and_that_of_features(batch):
    s, t = batch
    value = linear_cka(s, t)
    k, other = s @ s.mT, t @ t.mT
    assert_close(value, hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt())
    s, t = s - s.mean(0), t - t.mean(0)
    assert_close(value, (s.mT @ t).norm() ** 2 / (s.mT @ s).norm() / (t.mT @ t).norm())
    assert 0 <= value <= 1 + 1e-12
    assert_close(linear_cka(t, s), value)


@laws
@given(batches())
def test_what_linear_cka_does_not_see(batch):
    s, t = batch
    value = linear_cka(s, t)
    turn, _ = torch.linalg.qr(torch.randn(s.shape[1], s.shape[1], dtype=torch.float64))
    assert_close(linear_cka(7 * s @ turn + 3, t), value)
    assert_close(linear_cka(s.flip(0), t.flip(0)), value)
    assert linear_cka(-s @ turn, s).item() == pytest.approx(1)


def test_linear_cka_of_rows_that_are_all_alike_is_0():
    """Exactly, though the mean of seven times 0.1 is not 0.1 in float32: such errors would correlate."""
    alike, features = torch.full((7, 4), 0.1), torch.randn(7, 4)
    assert (alike.mean(0) != alike[0]).all()
    for s, t in ((alike, features), (features, alike), (alike, alike), (features[:1], features[:1])):
        s = s.clone().requires_grad_()
        value = linear_cka(s, t)
        assert value == 0
        assert not torch.autograd.grad(value, s)[0].any()


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_linear_cka_of_small_and_large_features(scale):
    """In float32, where fourth powers of these are no numbers."""
    s, t = torch.randn(5, 3), torch.randn(5, 4)
    assert_close(linear_cka(scale * s, t), linear_cka(s, t), rtol=1e-4, atol=1e-5)


def test_linear_cka_of_maps_and_16_bits():
    s, t = torch.randn(4, 3, 2, 2).bfloat16(), torch.randn(4, 5, 3).bfloat16()
    value = linear_cka(s, t)
    assert value.dtype == torch.float32
    assert_close(
        value.double(),
        linear_cka(s.double().flatten(1), t.double().flatten(1)),
        rtol=1e-5,
        atol=0,
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(linear_cka(s.float(), t.float()), value, rtol=0, atol=0)
    with pytest.raises(ValueError, match="the same rows"):
        linear_cka(s, t[:2])


def test_gradients_of_linear_cka_against_finite_differences():
    s, t = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: linear_cka(s, t.requires_grad_()), s)
    linear_cka(s, t).backward()
    assert t.grad is None
