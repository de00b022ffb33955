"""LONDON: the norms against an SVD, by hand and in loops, what they promise, and the two losses on them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import luce
from luce import lipschitz_loss
from luce.losses import spectral_norm, transmitting_matrix
from luce.losses.functional.lipschitz import ITERATIONS

sqrt = math.sqrt


def tensor(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def exactly(expected):
    return pytest.approx(expected, rel=1e-12)


# By hand


FIRST, SECOND = tensor([[[[1.0, 2.0]], [[0.0, 1.0]]]]), tensor([[[[1.0, 0.0]], [[1.0, 1.0]]]])
MATRIX = tensor([[0.5, 1.5], [0.0, 0.5]])
NORM = (3 + sqrt(13)) / 4  # the singular values' squares sum to 11/4 and multiply to 1/16


def test_a_matrix_by_hand():
    matrix = transmitting_matrix(FIRST, SECOND)
    expected = [[[(1 * 1 + 2 * 0) / 2, (1 * 1 + 2 * 1) / 2], [(0 * 1 + 1 * 0) / 2, (0 * 1 + 1 * 1) / 2]]]
    assert matrix.tolist() == expected
    assert_close(matrix[0], MATRIX)
    tokens = FIRST.flatten(2).mT, SECOND.flatten(2).mT
    assert_close(transmitting_matrix(*tokens)[0], MATRIX)


def test_the_larger_map_is_pooled():
    large = torch.kron(FIRST, torch.ones(2, 2, dtype=torch.float64))
    assert_close(transmitting_matrix(large, SECOND)[0], MATRIX)
    assert_close(transmitting_matrix(FIRST, torch.kron(SECOND, large.new_ones(1, 3)))[0], MATRIX)


@pytest.mark.parametrize("algorithm", ["lanczos", "power"])
def test_a_norm_and_its_gradient_by_hand(algorithm):
    matrix = MATRIX.clone().requires_grad_()
    norm = spectral_norm(matrix, algorithm=algorithm)
    norm.backward()
    assert norm.item() == pytest.approx(1.65138782, abs=1e-8)
    assert norm.item() == exactly(NORM)
    # Both are unit vectors: M v is NORM * u, the transposed of M takes u to NORM * v.
    ratio = (NORM**2 - 0.25) / 0.75  # of v[1] to v[0]
    v = [1 / sqrt(1 + ratio**2), ratio / sqrt(1 + ratio**2)]
    u = [(0.5 * v[0] + 1.5 * v[1]) / NORM, 0.5 * v[1] / NORM]
    for c in (0, 1):
        assert matrix.grad[c].tolist() == pytest.approx([u[c] * v[0], u[c] * v[1]], rel=1e-9)
    published = tensor([[0.2773501, 0.91602515], [0.08397485, 0.2773501]])
    assert_close(matrix.grad, published, rtol=1e-6, atol=1e-7)


def test_power_iteration_again_in_loops():
    rows = normal(3, 4, 3)
    for matrix, steps in ((rows[0].tolist(), 1), (rows[1].tolist(), 2), (rows[2].tolist(), 7)):
        v = [math.cos(i * i) for i in (1, 2, 3)]
        for step in range(steps + 1):
            length = sqrt(sum(x * x for x in v))
            v = [x / length for x in v]
            image = [sum(a * b for a, b in zip(row, v, strict=True)) for row in matrix]
            if step < steps:
                v = [sum(row[j] * y for row, y in zip(matrix, image, strict=True)) for j in range(3)]
        expected = sqrt(sum(y * y for y in image))
        assert spectral_norm(tensor(matrix), iterations=steps, algorithm="power").item() == exactly(expected)


def test_the_loss_by_hand():
    """Maps of one value: a matrix of one value, whose norm is that times the root of its entries."""
    shapes = (2, 3, 4), (2, 2, 2), (5, 1, 1)

    def maps(*values):
        return [
            torch.full((2, *shape), x, dtype=torch.float64) for shape, x in zip(shapes, values, strict=True)
        ]

    s, t = maps(1.0, 3.0, -2.0), maps(2.0, 0.5, 1.0)
    first, second = sqrt(2 * 2), sqrt(2 * 5)
    squares = (first * (3 - 1)) ** 2, (second * (6 - 0.5)) ** 2
    assert lipschitz_loss(s, t).item() == exactly(squares[0] / 4 + squares[1] / 2)
    assert lipschitz_loss(s[1:], t[1:]).item() == exactly(squares[1] / 2)
    ratios = 3 / 1, 6 / 0.5
    expected = (ratios[0] - 1) ** 2 / 4 + (ratios[1] - 1) ** 2 / 2
    assert lipschitz_loss(s, t, relative=True).item() == exactly(expected)
    s[0][1] = t[0][1] = 0  # one of the two rows has no first matrix
    assert lipschitz_loss(s, t).item() == exactly(squares[0] / 2 / 4 + squares[1] / 2)


# Against an SVD


def orthogonal(*shape, seed):
    return torch.linalg.qr(normal(*shape, seed=seed, dtype=torch.float32))[0]


def spectrum(values, rows):
    size = len(values)
    return (orthogonal(rows, size, size, seed=1) * values) @ orthogonal(rows, size, size, seed=2)


def features(rows, channels, places, seed):
    return normal(rows, channels, places, seed=seed, dtype=torch.float32)


def correlated(rows, channels, seed):
    """As after a ReLU: not negative, and all channels look at the same places."""
    return (features(rows, channels, 1, seed) + features(rows, 1, 64, seed + 1) / 2).relu()


MATRICES = {
    "random 64": lambda: features(64, 64, 64, 1),
    "random 128": lambda: features(16, 128, 128, 2),
    "random 512": lambda: features(2, 512, 512, 3),
    "of random features": lambda: features(16, 192, 64, 4) @ features(16, 192, 64, 5).mT,
    "tall": lambda: features(16, 256, 48, 6),
    "wide": lambda: features(16, 48, 256, 6),
    "correlated": lambda: correlated(16, 64, 7) @ correlated(16, 128, 8).mT,
    "close together": lambda: spectrum(torch.linspace(1, 0.9, 96), 4),
    "three almost alike": lambda: spectrum(torch.tensor([1, 0.9999, 0.9995] + [0.9] * 61), 4),
    "two alike": lambda: spectrum(torch.tensor([1.0, 1.0] + [0.5] * 62), 4),
    "one above all": lambda: spectrum(torch.tensor([1.0] + [0.5] * 63), 4),
    "all alike": lambda: orthogonal(4, 64, 64, seed=3),
    "rank 1": lambda: features(64, 64, 1, 9) @ features(64, 1, 48, 10),
    "rank 2": lambda: features(64, 64, 2, 11) @ features(64, 2, 100, 12),
    "rank 7": lambda: features(256, 40, 7, 53) @ features(256, 7, 16, 54),
    "falling off": lambda: features(512, 40, 16, 20) * torch.exp(-torch.arange(16.0)),
    "few entries": lambda: features(16, 64, 64, 13) * (features(16, 64, 64, 14) > 1.6),
    "dead channels": lambda: features(16, 64, 64, 15) * (features(16, 64, 1, 16) > 1),
    "blocks": lambda: torch.block_diag(features(1, 40, 40, 17)[0], 1.1 * features(1, 40, 40, 18)[0]),
    "sums to zero": lambda: features(8, 64, 1, 19) @ torch.tensor([1.0, -1.0]).repeat(8, 1, 16),
    "signs": lambda: torch.tensor([1.0, -1.0]).repeat(1, 40, 8),
    "ones": lambda: torch.ones(1, 256, 256),
    "one entry": lambda: torch.tensor([[[-3.0]]]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_the_default_is_within_a_thousandth_of_the_svd(name):
    matrix = MATRICES[name]()
    truth = torch.linalg.svdvals(matrix.double())[..., 0]
    ratio = spectral_norm(matrix).double() / truth
    assert ratio.min() > 1 - 1e-3
    assert ratio.max() < 1 + 1e-5
    if min(matrix.shape[-2:]) <= ITERATIONS or name in (
        "rank 1",
        "rank 2",
        "correlated",
        "sums to zero",
        "ones",
    ):
        assert ratio.min() > 1 - 1e-5


def test_plain_power_iteration_is_percents_off_where_the_default_is_not():
    """What keeping the vectors buys, on random matrices; on correlated features both are exact."""
    matrix = MATRICES["random 128"]()
    truth = torch.linalg.svdvals(matrix)[..., 0]
    assert (spectral_norm(matrix, iterations=10, algorithm="power") / truth).mean() < 0.99
    assert (spectral_norm(matrix, iterations=ITERATIONS, algorithm="power") / truth).mean() < 0.999
    matrix = MATRICES["correlated"]()
    truth = torch.linalg.svdvals(matrix)[..., 0]
    assert_close(spectral_norm(matrix, iterations=5, algorithm="power"), truth, rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(-28, 28),
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_small_matrices_of_any_rank_and_scale(height, width, rank, exponent, seed, dtype):
    matrix = normal(height, rank, seed=seed) @ normal(rank, width, seed=seed + 1)
    matrix = (10.0**exponent * matrix).to(dtype).requires_grad_()
    norm = spectral_norm(matrix)
    u, s, vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    tight = 50 * torch.finfo(dtype).eps
    assert_close(norm.double(), s[0], rtol=tight, atol=0)
    assert_close(spectral_norm(matrix.mT), norm, rtol=tight, atol=0)
    norm.backward()
    assert_close(matrix.grad.norm().item(), 1.0, rtol=tight, atol=0)
    if len(s) == 1 or s[1] < 0.99 * s[0]:
        expected = torch.outer(u[:, 0], vh[0])
        assert_close(matrix.grad.double(), expected, rtol=0, atol=1e-3 if dtype is torch.float32 else 1e-6)


@pytest.mark.parametrize("size", [2, 3, 9, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_start_at_the_wrong_singular_vector(size, dtype):
    """From there alone no step leads anywhere."""
    start = torch.arange(1, size + 1, dtype=torch.float64).square().cos()
    turn, _ = torch.linalg.qr(torch.cat([start[:, None], normal(size, size - 1)], dim=1))
    values = tensor([1.0, 3.0] + [0.5] * (size - 2))
    matrix = ((turn * values) @ turn.mT).to(dtype)
    assert spectral_norm(matrix, algorithm="power", iterations=3).item() == pytest.approx(1, rel=1e-3)
    assert spectral_norm(matrix).item() == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 4), (3, 7), (2, 6, 6), (1, 1)], ids=str)
def test_the_gradient_against_finite_differences(shape):
    matrix = normal(*shape, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(spectral_norm, (matrix,))


def test_the_gradient_of_a_large_matrix_is_that_of_the_svd():
    matrix = spectrum(torch.cat([torch.tensor([1.0]), torch.linspace(0.8, 0, 199)]), 3).double()
    matrix.requires_grad_()
    spectral_norm(matrix).sum().backward()
    u, _, vh = torch.linalg.svd(matrix.detach())
    assert_close(matrix.grad, u[:, :, :1] @ vh[:, :1], rtol=0, atol=1e-4)


# Shapes, types and what is not there


def test_matrices_of_any_batch():
    matrix = normal(2, 3, 5, 4)
    norm = spectral_norm(matrix)
    assert norm.shape == (2, 3)
    assert_close(spectral_norm(matrix[1, 2]), norm[1, 2], rtol=1e-13, atol=0)
    assert spectral_norm(matrix[:0]).shape == (0, 3)


@pytest.mark.parametrize("algorithm", ["lanczos", "power"])
def test_nothing_has_the_norm_0_and_no_gradient(algorithm):
    matrix = normal(3, 4, 5)
    matrix[1] = 0
    matrix.requires_grad_()
    norm = spectral_norm(matrix, algorithm=algorithm)
    norm.sum().backward()
    assert norm[1] == 0
    assert not matrix.grad[1].any()
    assert matrix.grad[0].any()
    assert matrix.grad.isfinite().all()


@pytest.mark.parametrize("algorithm", ["lanczos", "power"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_row(bad, algorithm):
    matrix = normal(3, 4, 5)
    expected = spectral_norm(matrix, algorithm=algorithm)
    matrix[1, 2, 3] = bad
    norm = spectral_norm(matrix, algorithm=algorithm)
    assert not norm[1].isfinite()
    assert_close(norm[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_calculated_in_float32(dtype):
    matrix = (30 * normal(4, 24, 24)).to(dtype)  # whose squares sum to more than float16 holds
    assert spectral_norm(matrix).dtype == torch.float32
    assert_close(spectral_norm(matrix), spectral_norm(matrix.float()), rtol=0, atol=0)
    maps = (300 * normal(2, 3, 4, 4)).to(dtype), (300 * normal(2, 5, 4, 4, seed=1)).to(dtype)
    result = transmitting_matrix(*maps)
    assert_close(result, transmitting_matrix(*(x.float() for x in maps)), rtol=0, atol=0)
    assert result.isfinite().all()


def test_autocast_changes_nothing():
    matrix, first, second = (
        normal(*shape, dtype=torch.float32) for shape in ((4, 9, 9), FIRST.shape, SECOND.shape)
    )
    expected = spectral_norm(matrix), transmitting_matrix(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close((spectral_norm(matrix), transmitting_matrix(first, second)), expected, rtol=0, atol=0)


def test_what_is_refused():
    for wrong, error, message in (
        ([[1.0]], TypeError, "`matrix` to be a torch.Tensor, got list"),
        (torch.ones(2, 2, dtype=torch.long), TypeError, "floating dtype, got torch.int64"),
        (torch.ones(2), ValueError, r"of shape \(\.\.\., M, N\).*got \(2,\)"),
        (torch.ones(2, 0, 3), ValueError, r"not empty, got \(2, 0, 3\)"),
    ):
        with pytest.raises(error, match=message):
            spectral_norm(wrong)
    for options, message in (
        ({"iterations": 0}, "`iterations` to be an integer of at least 1 and at most 10000, got 0"),
        ({"algorithm": "svd"}, "`algorithm` to be one of 'lanczos', 'power', got 'svd'"),
    ):
        with pytest.raises(ValueError, match=message):
            spectral_norm(torch.ones(2, 2), **options)
    maps = torch.ones(2, 3, 4, 4)
    for second, message in (
        (maps[:1], "the same rows, at least one, in `first` and `second`, got 2 and 1"),
        (maps[0, :2], "both as tokens"),
        (maps[:, :, 0, 0], "expected `second` of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            transmitting_matrix(maps, second)
    with pytest.raises(ValueError, match="as many features of the student as of the teacher, got 2 and 3"):
        lipschitz_loss([maps] * 2, [maps] * 3)
    with pytest.raises(ValueError, match="expected at least 2 features of each network, got 1"):
        lipschitz_loss([maps], [maps])


# Laws


def test_what_does_not_change_a_norm():
    first, second = normal(3, 6, 4, 4), normal(3, 5, 4, 4, seed=1)
    norm = spectral_norm(transmitting_matrix(first, second))
    places, channels = torch.randperm(16, generator=generator()), torch.randperm(6, generator=generator())

    def moved(x):
        return x.flatten(2)[:, :, places].unflatten(2, (4, 4))

    for one, other in (
        (first[:, channels], second),
        (first, second.flip(1)),
        (moved(first), moved(second)),
        (second, first),
        (first, -second),
    ):
        assert_close(spectral_norm(transmitting_matrix(one, other)), norm, rtol=1e-12, atol=0)
    assert (spectral_norm(transmitting_matrix(moved(first), second)) / norm - 1).abs().max() > 0.01
    for factor in (-3.0, 0.0, 1e-3):
        scaled = spectral_norm(transmitting_matrix(factor * first, second))
        assert_close(scaled, abs(factor) * norm, rtol=1e-12, atol=0)


def two_networks():
    shapes = [(3, 8, 8), (4, 4, 4), (5, 4, 4)], [(6, 8, 8), (4, 8, 8), (7, 2, 2)]
    student, teacher = (
        [normal(3, *shape, seed=10 * i + j) for j, shape in enumerate(group)]
        for i, group in enumerate(shapes)
    )
    return student, teacher


@pytest.mark.parametrize("relative", [False, True])
def test_equal_networks_cost_nothing_and_teach_nothing(relative):
    _, teacher = two_networks()
    student = [t.clone().requires_grad_() for t in teacher]
    loss = lipschitz_loss(student, teacher, relative=relative)
    loss.backward()
    assert loss == 0
    assert not any(s.grad.any() for s in student)


@pytest.mark.parametrize("relative", [False, True])
def test_the_student_learns_from_each_stage_and_the_teacher_from_none(relative):
    """Code that finds the norms without gradients teaches nothing, and nobody would notice."""
    student, teacher = ([x.requires_grad_() for x in group] for group in two_networks())
    loss = lipschitz_loss(student, teacher, relative=relative)
    loss.backward()
    assert loss > 0
    assert all(s.grad.flatten(1).any(1).all() for s in student)
    assert all(t.grad is None for t in teacher)
    with torch.no_grad():
        stepped = [s - 1e-4 / s.grad.abs().max() * s.grad for s in student]
    assert lipschitz_loss(stepped, teacher, relative=relative) < loss


def test_a_factor_comes_out_to_the_fourth_power_or_not_at_all():
    student, teacher = two_networks()
    scaled = [3 * s for s in student], [3 * t for t in teacher]
    assert_close(lipschitz_loss(*scaled), 3**4 * lipschitz_loss(student, teacher))
    relative = lipschitz_loss(student, teacher, relative=True)
    assert_close(lipschitz_loss(*scaled, relative=True), relative)


def test_a_row_in_which_the_teacher_is_dead_counts_nothing_relatively():
    student, teacher = two_networks()
    expected = lipschitz_loss([s[1:] for s in student], [t[1:] for t in teacher], relative=True)
    for t in teacher:
        t[0] = 0
    student = [s.requires_grad_() for s in student]
    loss = lipschitz_loss(student, teacher, relative=True)
    loss.backward()
    assert_close(loss, expected * 2 / 3)
    assert not any(s.grad[0].any() for s in student)


def test_the_options_reach_the_norms():
    student, teacher = two_networks()
    norms = [
        [
            spectral_norm(transmitting_matrix(*pair), iterations=2, algorithm="power")
            for pair in pairwise(maps)
        ]
        for maps in (student, teacher)
    ]
    squares = [(s - t).square().mean() for s, t in zip(*norms, strict=True)]
    value = lipschitz_loss(student, teacher, iterations=2, algorithm="power")
    assert_close(value, squares[0] / 4 + squares[1] / 2)
    assert (value - lipschitz_loss(student, teacher)).abs() > 1e-3


# The modules


def built(module, **options):
    student, teacher = two_networks()
    torch.manual_seed(0)
    loss = module(**options)
    loss.build([s.shape[1:] for s in student], [t.shape[1:] for t in teacher])
    return loss.double(), student, teacher


@pytest.mark.parametrize(
    "options", [{}, {"relative": True}, {"iterations": 2, "algorithm": "power"}], ids=str
)
def test_the_module_is_the_function(options):
    loss, student, teacher = built(luce.LipschitzLoss, **options)
    assert not loss.learns
    assert_close(loss(student, teacher), lipschitz_loss(student, teacher, **options), rtol=0, atol=0)
    loss, student, teacher = built(luce.LipschitzLoss, connectors=True, **options)
    assert loss.learns
    projected = [layer(s) for layer, s in zip(loss.projectors, student, strict=True)]
    assert [p.shape[1] for p in projected] == [t.shape[1] for t in teacher]
    assert_close(loss(student, teacher), lipschitz_loss(projected, teacher, **options), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{"relative": True}, {"iterations": 2, "algorithm": "power"}], ids=str)
def test_london_is_ofd_and_the_lipschitz_loss_of_the_same_connectors(options):
    loss, student, teacher = built(luce.LONDONLoss, lipschitz_weight=3.0, **options)
    ofd, *_ = built(luce.OFDLoss)
    ofd.load_state_dict(loss.state_dict())
    parts = loss(student, teacher)
    assert list(parts) == ["loss", "ofd", "lipschitz"]
    assert_close(parts["ofd"], ofd(student, teacher), rtol=1e-12, atol=0)
    assert_close(parts["loss"], parts["ofd"] + 3 * parts["lipschitz"])
    for a, b in zip(loss.state_dict().values(), ofd.state_dict().values(), strict=True):
        assert_close(a, b)  # one pass through the connectors, whose statistics take it in once
    pooled = torch.nn.functional.adaptive_avg_pool2d
    sizes = (8, 4, 2)  # of the smaller map of each stage
    projected = [layer(pooled(s, n)) for layer, s, n in zip(ofd.projectors, student, sizes, strict=True)]
    expected = lipschitz_loss(
        projected, [pooled(t, n) for t, n in zip(teacher, sizes, strict=True)], **options
    )
    assert_close(parts["lipschitz"], expected, rtol=1e-10, atol=0)


def test_each_part_of_london_moves_the_student_and_the_connectors():
    loss, student, teacher = built(luce.LONDONLoss)
    student, teacher = ([x.requires_grad_() for x in group] for group in (student, teacher))
    parts = loss(student, teacher)
    weights = [projector[0].weight for projector in loss.projectors]
    for part in parts.values():
        for gradient in torch.autograd.grad(part, [*student, *weights], retain_graph=True):
            assert gradient.abs().max() > 1e-6
        assert all(
            g is None for g in torch.autograd.grad(part, teacher, retain_graph=True, allow_unused=True)
        )


@pytest.mark.parametrize("module", [luce.LipschitzLoss, luce.LONDONLoss])
def test_numbers_of_stages_are_told_when_the_loss_is_built(module):
    shape = torch.Size([3, 4, 4])
    with pytest.raises(ValueError, match=rf"at least two, of consecutive stages, .*{module.__name__}, got 1"):
        module().build([shape], [shape])
    with pytest.raises(ValueError, match="as many features of the student as of the teacher, got 3 and 2"):
        module().build([shape] * 3, [shape] * 2)


@pytest.mark.parametrize(
    ("module", "option", "wrong"),
    [
        (luce.LipschitzLoss, "iterations", 0),
        (luce.LipschitzLoss, "algorithm", "svd"),
        (luce.LONDONLoss, "lipschitz_weight", -1.0),
        (luce.LONDONLoss, "iterations", 1.5),
        (luce.LONDONLoss, "algorithm", "svd"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_when_the_module_is_made(module, option, wrong):
    with pytest.raises(ValueError, match=f"`{option}`") as caught:
        module(**{option: wrong})
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("size", [2.0**-60, 2.0**60])
def test_a_relative_term_neither_overflows_nor_vanishes(size):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        [torch.randn(3, channels, 4, 4, generator=generator) for channels in (2, 5)] for _ in range(2)
    )
    student = [part.requires_grad_() for part in student]
    scaled = [(size * part.detach()).requires_grad_() for part in student]
    expected = lipschitz_loss(student, teacher, relative=True)
    value = lipschitz_loss(scaled, [size * part for part in teacher], relative=True)
    assert torch.equal(value, expected)  # a power of two
    for gradient, other in zip(
        torch.autograd.grad(value, scaled), torch.autograd.grad(expected, student), strict=True
    ):
        assert torch.equal(size * gradient, other)
