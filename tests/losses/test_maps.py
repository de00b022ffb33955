"""Losses between maps: values by hand, a second time in plain loops, and the laws that each promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import luce
from luce.losses.modules.maps import Margin

exp, log, sqrt = math.exp, math.log, math.sqrt


def tensor(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def pair(rows=2, channels=(3, 3), size=(3, 4)):
    random = torch.Generator().manual_seed(4)
    return [torch.randn(rows, c, *size, generator=random, dtype=torch.float64) for c in channels]


def flat(feature):
    """Nested lists ``[row][channel][place]``."""
    return feature.flatten(2).tolist()


def norm(x):
    return sqrt(sum(v * v for v in x))


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def exactly(expected):
    return pytest.approx(expected, rel=1e-12)


# By hand, on maps of 2x2


def test_fitnet_by_hand():
    s, t = tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), tensor([[[[0.0, 2.0], [5.0, 1.0]]]])
    assert luce.fitnet_loss(s, t).item() == exactly((1**2 + 0 + 2**2 + 3**2) / 4)


def test_at_by_hand():
    s = tensor([[[[1.0, 2.0], [0.0, 0.0]]]])
    t = tensor([[[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, -4.0]]]])  # the channels' mean scales, no more
    q_s, q_t = [1 / sqrt(17), 4 / sqrt(17), 0, 0], [9 / sqrt(337), 0, 0, 16 / sqrt(337)]
    expected = sum((a - b) ** 2 for a, b in zip(q_s, q_t, strict=True)) / 4
    assert luce.at_loss(s, t).item() == exactly(expected)
    q_s, q_t = [1 / sqrt(5), 2 / sqrt(5), 0, 0], [3 / 5, 0, 0, 4 / 5]
    expected = sum((a - b) ** 2 for a, b in zip(q_s, q_t, strict=True)) / 4
    assert luce.at_loss(s, t, p=1).item() == exactly(expected)


def test_nst_by_hand():
    s = tensor([[[[2.0, 0.0]], [[0.0, 3.0]]]])  # channels (1, 0) and (0, 1) once normalised
    t = tensor([[[[3.0, 4.0]]]])  # (0.6, 0.8)
    assert luce.nst_loss(s, t, form="linear").item() == exactly(1 + 2 / 4 - 2 * (0.6 + 0.8) / 2)
    assert luce.nst_loss(s, t).item() == exactly(1 + 2 / 4 - 2 * (0.6**2 + 0.8**2) / 2)


def test_fsp_by_hand():
    first, second = tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]), tensor([[[[5.0, 6.0]]]])
    teacher = 0 * first, second
    flow = [(1 * 5 + 2 * 6) / 2, (3 * 5 + 4 * 6) / 2]
    assert luce.fsp_loss((first, second), teacher).item() == exactly((flow[0] ** 2 + flow[1] ** 2) / 2)


def test_cwd_by_hand():
    s, t = tensor([[[[0.0, log(3)]]]]), tensor([[[[0.0, 0.0]]]])  # (1/4, 3/4) and (1/2, 1/2)
    expected = 0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75)
    assert luce.cwd_loss(s, t).item() == exactly(expected)
    assert luce.cwd_loss(2 * s, t, temperature=2.0).item() == exactly(4 * expected)


def test_ickd_by_hand():
    s = tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])  # no channel goes with another
    t = tensor([[[[1.0, 1.0]], [[1.0, 1.0]]]])  # all do: 1 / sqrt(2) everywhere
    half = 1 / sqrt(2)
    assert luce.ickd_loss(s, t).item() == exactly(2 * ((1 - half) ** 2 + half**2) / 2)


def test_vid_by_hand():
    s, t = tensor([[[[1.0, 2.0]], [[0.0, 0.0]]]]), tensor([[[[2.0, 2.0]], [[3.0, 0.0]]]])
    expected = (1 / 4 + 2 * log(4) + 9 / 0.5 + 2 * log(0.5)) / 2 / 4
    assert luce.vid_loss(s, t, variance=tensor([4.0, 0.5])).item() == exactly(expected)


@pytest.mark.parametrize(
    ("student", "teacher", "margin", "expected"),
    [
        (-5.0, -9.0, -1.0, 0.0),  # both silent
        (-0.5, -9.0, -1.0, 0.5**2),  # not silent enough
        (-0.5, -0.2, -1.0, 0.0),  # below the teacher, who is silent
        (0.5, -0.2, -1.0, 0.7**2),
        (0.5, 2.0, -1.0, 1.5**2),
        (-3.0, 2.0, -1.0, 5.0**2),
        (3.0, 2.0, -1.0, 1.0),
        (-3.0, 0.0, 0.0, 0.0),
    ],
)
def test_ofd_by_hand(student, teacher, margin, expected):
    s, t = (torch.full((2, 1, 1, 1), x, dtype=torch.float64) for x in (student, teacher))
    assert luce.ofd_loss(s, t, margin=tensor([margin])).item() == exactly(expected)


def test_mgd_by_hand():
    s, t = tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]]), tensor([[[[1.0, 1.0]]], [[[1.0, 1.0]]]])
    value = luce.mgd_loss(s, t, generate=lambda x: 2 * x, mask_ratio=0.0)
    assert value.item() == exactly((1 + 9 + 25 + 49) / 2)  # a sum over places, a mean over rows


# In plain loops


def naive_at(s, t, p):
    total = 0.0
    for rows in zip(flat(s), flat(t), strict=True):
        maps = [[sum(abs(c[i]) ** p for c in row) for i in range(len(row[0]))] for row in rows]
        q, r = ([v / norm(x) for v in x] for x in maps)
        total += sum((a - b) ** 2 for a, b in zip(q, r, strict=True)) / len(q)
    return total / len(s)


def naive_nst(s, t, power):
    total = 0.0
    for row, other in zip(flat(s), flat(t), strict=True):
        a, b = ([[v / norm(c) for v in c] for c in x] for x in (row, other))

        def kernel(x, y):
            return sum(dot(u, v) ** power for u in x for v in y) / len(x) / len(y)

        total += kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    return total / len(s)


def naive_fsp(student, teacher):
    def flow(first, second):
        return [[dot(u, v) / len(u) for u in first for v in second]]

    total = 0.0
    for rows in zip(*map(flat, (*student, *teacher)), strict=True):
        (g,), (h,) = flow(*rows[:2]), flow(*rows[2:])
        total += sum((a - b) ** 2 for a, b in zip(g, h, strict=True)) / len(g)
    return total / len(student[0])


def naive_cwd(s, t, temperature):
    total, count = 0.0, 0
    for row, other in zip(flat(s), flat(t), strict=True):
        for x, y in zip(row, other, strict=True):
            a, b = ([exp(v / temperature) for v in z] for z in (x, y))
            q, p = ([v / sum(z) for v in z] for z in (a, b))
            total += temperature**2 * sum(v * log(v / u) for u, v in zip(q, p, strict=True))
            count += 1
    return total / count


def naive_ickd(s, t):
    total = 0.0
    for row, other in zip(flat(s), flat(t), strict=True):
        grams = [[[dot(u, v) for v in x] for u in x] for x in (row, other)]
        g, h = ([v / norm(line) for line in gram for v in line] for gram in grams)
        total += sum((a - b) ** 2 for a, b in zip(g, h, strict=True)) / len(row)
    return total / len(s)


def naive_vid(s, t, variance):
    values = [
        0.5 * ((y - x) ** 2 / v + log(v))
        for row, other in zip(flat(s), flat(t), strict=True)
        for c, d, v in zip(row, other, variance, strict=True)
        for x, y in zip(c, d, strict=True)
    ]
    return sum(values) / len(values)


def naive_ofd(s, t, margin):
    total = 0.0
    for row, other in zip(flat(s), flat(t), strict=True):
        for c, d, m in zip(row, other, margin, strict=True):
            for x, y in zip(c, d, strict=True):
                y = max(y, m)
                total += 0 if x <= y <= 0 else (x - y) ** 2
    return total / len(s)


def test_the_losses_again_in_loops():
    s, t = pair(channels=(3, 5))
    for p in (1, 2, 4):
        assert luce.at_loss(s, t, p=p).item() == pytest.approx(naive_at(s, t, p), rel=1e-10)
    for form, power in (("linear", 1), ("polynomial", 2)):
        value = luce.nst_loss(s, t, form=form).item()
        assert value == pytest.approx(naive_nst(s, t, power), rel=1e-10)
    s, t = pair(channels=(4, 4))
    for temperature in (1.0, 4.0):
        value = luce.cwd_loss(s, t, temperature=temperature).item()
        assert value == pytest.approx(naive_cwd(s, t, temperature), rel=1e-10)
    assert luce.ickd_loss(s, t).item() == pytest.approx(naive_ickd(s, t), rel=1e-10)
    variance, margin = [0.5, 1.0, 2.0, 7.0], [-0.1, -0.5, -1.0, 0.0]
    assert luce.vid_loss(s, t, variance=tensor(variance)).item() == pytest.approx(
        naive_vid(s, t, variance), rel=1e-10
    )
    assert luce.ofd_loss(s, t, margin=tensor(margin)).item() == pytest.approx(
        naive_ofd(s, t, margin), rel=1e-10
    )
    a, b = pair(channels=(4, 2))
    assert luce.fsp_loss((s, a[:, :2]), (t, b)).item() == pytest.approx(
        naive_fsp((s, a[:, :2]), (t, b)), rel=1e-10
    )


# Laws


def test_equal_features_cost_nothing_but_in_vid():
    (t,) = pair(channels=(4,))
    zero = torch.zeros(4, dtype=torch.float64)
    lowest = t.amin((0, 2, 3))  # no margin cuts
    for value in (
        luce.fitnet_loss(t, t),
        luce.at_loss(t, t),
        luce.nst_loss(t, t),
        luce.nst_loss(t, t, form="linear"),
        luce.fsp_loss((t, t), (t, t)),
        luce.cwd_loss(t, t),
        luce.ickd_loss(t, t),
        luce.ofd_loss(t, t, margin=lowest),
        luce.ofd_loss(t.relu(), t, margin=zero),
        luce.mgd_loss(t, t, generate=lambda x: x, mask_ratio=0.0),
    ):
        assert value.item() == pytest.approx(0, abs=1e-15)
    assert luce.vid_loss(t, t, variance=torch.exp(zero - 2)).item() == exactly(-1)


def test_attention_is_bounded_and_blind_to_signs_and_to_the_order_of_channels():
    s, t = pair(channels=(3, 5))
    value = luce.at_loss(s, t)
    assert 0 < value <= 2 / 12
    assert_close(luce.at_loss(-s.flip(1), t), value)
    # Maps that look at places apart reach the bound.
    left, right = torch.zeros(2, 1, 1, 2, 2, dtype=torch.float64)
    left[..., 0], right[..., 1] = 1.0, 3.0
    assert_close(luce.at_loss(left, right), tensor(2 / 4))


def test_the_order_of_channels_and_copies_of_them_do_not_matter_to_selectivity():
    s, t = pair(channels=(3, 5))
    value = luce.nst_loss(s, t)
    assert value > 0
    assert_close(luce.nst_loss(s.flip(1), t), value)
    assert_close(luce.nst_loss(torch.cat([s, s], 1), t), value)


def test_a_constant_on_a_channel_does_not_matter_to_cwd():
    s, t = pair(channels=(3, 3))
    offset = tensor([1.0, -2.0, 300.0])[:, None, None]
    assert_close(luce.cwd_loss(s + offset, t - offset), luce.cwd_loss(s, t))


def test_an_orthogonal_map_of_the_places_does_not_matter_to_ickd():
    """Nor their number, nor the scale of a channel's row in G, which is the scale of the map."""
    s, t = pair(channels=(3, 3))
    turn, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    turned = (s.flatten(2) @ turn).unflatten(2, (6, 2))
    assert_close(luce.ickd_loss(3 * turned, t), luce.ickd_loss(s, t))


def test_vid_is_least_at_the_mean_squared_errors():
    s, t = pair(channels=(3, 3))
    best = (s - t).square().mean((0, 2, 3))
    value = luce.vid_loss(s, t, variance=best)
    assert_close(value, 0.5 * (1 + best.log()).mean())
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert luce.vid_loss(s, t, variance=factor * best) > value


def test_ofd_pulls_only_what_counts():
    s, t = pair(channels=(3, 3))
    s.requires_grad_()
    luce.ofd_loss(s, t, margin=tensor([-0.5] * 3)).backward()
    goal = t.clamp(min=-0.5)
    idle = (s <= goal) & (goal <= 0)
    assert idle.any()
    assert not s.grad[idle].any()
    assert s.grad[~idle].all()


# What the modules learn


@pytest.mark.parametrize(
    ("student", "teacher", "layer"),
    [
        ((3, 8, 8), (5, 4, 4), nn.Conv2d(3, 5, 3, stride=2, padding=1)),
        ((3, 4, 4), (5, 8, 8), nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1)),
        ((3, 6, 7), (5, 4, 4), nn.Conv2d(3, 5, (3, 4))),
        ((3, 4, 4), (5, 4, 4), nn.Conv2d(3, 5, 1)),
        ((8, 3), (8, 5), nn.Conv2d(3, 5, 1)),
    ],
    ids=str,
)
def test_the_regressor_of_fitnet(student, teacher, layer):
    for relu in (True, False):
        loss = luce.FitNetLoss(relu=relu)
        loss.build([student], [teacher])
        assert repr(loss.regressors[0][0]) == repr(layer)
        assert isinstance(loss.regressors[0][-1], nn.ReLU) is relu
        predicted = loss.regressors[0](torch.randn(2, *((3, 8, 1) if len(student) == 2 else student)))
        assert (predicted.min() >= 0) == relu


@pytest.mark.parametrize("teacher", [(5, 9, 9), (5, 4, 8), (5, 12, 12)])
def test_a_map_that_is_too_small_for_the_regressor(teacher):
    with pytest.raises(ValueError, match=r"larger, or half as large, got \(3, 4, 4\) for \(5, .*less deep"):
        luce.FitNetLoss().build([(3, 4, 4)], [teacher])


def test_a_perfect_regressor_leaves_no_loss():
    loss = luce.FitNetLoss().double().eval()
    loss.build([(2, 3, 3)], [(2, 3, 3)])
    loss.double()
    convolution, normalisation, _ = loss.regressors[0]
    nn.init.dirac_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    normalisation.eps = 0.0
    student = torch.rand(2, 2, 3, 3, dtype=torch.float64)
    assert loss([student], [student]) == 0
    assert loss([student], [student + 1]).item() == exactly(1.0)


def test_the_variances_of_vid_start_where_told_and_are_trained():
    for start in (1e-3, 0.5, 5.0, 1000.0):
        loss = luce.VIDLoss(initial_variance=start)
        loss.build([(3, 2, 2)], [(4, 2, 2)])
        assert_close(loss.variance(0), torch.full((4,), start), rtol=1e-4, atol=0)
    loss = luce.VIDLoss()
    loss.build([(3, 2, 2)], [(2, 2, 2)])
    assert {name for name, _ in loss.named_parameters()} == {
        "raw_variances.0",
        *(f"regressors.0.{layer}.weight" for layer in (0, 2, 4)),
    }
    # A teacher of which nothing can be predicted: the variances become its own.
    random = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 2, 2, 2, generator=random) * torch.tensor([0.5, 3.0])[:, None, None]
    optimizer = torch.optim.Adam([loss.raw_variances[0]], lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        loss([torch.zeros(64, 3, 2, 2)], [teacher]).backward()
        optimizer.step()
    expected = teacher.square().mean((0, 2, 3))
    assert_close(loss.variance(0), expected, rtol=1e-2, atol=0)


def test_fsp_and_cwd_project_only_channels_that_differ():
    loss = luce.FSPLoss()
    loss.build([(3, 4, 4), (4, 2, 2)], [(3, 4, 4), (5, 2, 2)])
    assert list(map(repr, loss.projectors)) == [repr(nn.Identity()), repr(nn.Conv2d(4, 5, 1))]
    loss = luce.CWDLoss()
    loss.build([(3, 4, 4)], [(3, 2, 2)])
    assert not list(loss.parameters())


def test_fsp_takes_the_stages_in_turn():
    loss = luce.FSPLoss()
    shapes = [(3, 4, 4), (4, 2, 2), (4, 2, 2), (2, 2, 2)]
    loss.build(shapes, shapes)
    random = torch.Generator().manual_seed(0)
    s, t = ([torch.randn(2, *shape, generator=random) for shape in shapes] for _ in range(2))
    expected = luce.fsp_loss((s[0], s[1]), (t[0], t[1])) + luce.fsp_loss((s[2], s[3]), (t[2], t[3]))
    assert_close(loss(s, t), expected)
    pooled = nn.functional.adaptive_avg_pool2d(s[0], 2)
    assert_close(luce.fsp_loss((pooled, s[1]), (t[0], t[1])), luce.fsp_loss((s[0], s[1]), (t[0], t[1])))
    with pytest.raises(ValueError, match="input and output of each stage in turn"):
        luce.FSPLoss().build(shapes[:3], shapes[:3])


def test_fsp_wants_two_features_of_each_network():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(TypeError, match=r"`student_features` to be \(input, output\).*got Tensor"):
        luce.fsp_loss(x, (x, x))
    with pytest.raises(ValueError, match=r"`teacher_features` to be \(input, output\).*got 3 features"):
        luce.fsp_loss((x, x), (x, x, x))


def test_the_margin_is_the_mean_of_the_negative_values():
    margin = Margin(3)
    first = torch.tensor([[-1.0, 2.0], [-4.0, -2.0], [1.0, 0.0]])[None, ..., None]
    assert_close(margin(first), torch.tensor([-1.0, -3.0, 0.0]))
    second = torch.tensor([[-2.0, -6.0], [1.0, 1.0], [5.0, 3.0]])[None, ..., None]
    assert_close(margin(second), torch.tensor([-3.0, -3.0, 0.0]))  # of all that was seen
    margin.eval()
    assert_close(margin(100 * first), torch.tensor([-3.0, -3.0, 0.0]))
    assert margin.batches == 2


def test_the_counted_margin_is_the_one_worked_out_for_a_normal_channel():
    """-s phi(b/s) / Phi(-b/s) + b, as the paper has it from the batch normalisation before the ReLU."""
    random = torch.Generator().manual_seed(0)
    scale, bias = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([0.3, -1.0, 0.0])
    margin = Margin(3)
    for _ in range(5):
        x = torch.randn(100, 3, 20, 20, generator=random)
        found = margin(x * scale[:, None, None] + bias[:, None, None])
    ratio = bias / scale
    density = torch.exp(-(ratio**2) / 2) / sqrt(2 * math.pi)
    assert_close(found, bias - scale * density / torch.special.ndtr(-ratio), rtol=0.02, atol=0)


def test_ofd_counts_its_margins_on_the_teachers_own_map_and_halves_earlier_stages():
    shapes = [(2, 2, 2)] * 3
    loss = luce.OFDLoss()
    loss.build(shapes, [(3, 4, 4)] * 3)
    random = torch.Generator().manual_seed(0)
    student = torch.randn(2, 2, 2, 2, generator=random)
    teacher = torch.randn(2, 3, 4, 4, generator=random)
    total = loss([student] * 3, [teacher] * 3)
    negative = teacher.clamp(max=0).sum((0, 2, 3)) / (teacher < 0).sum((0, 2, 3))
    pooled = nn.functional.adaptive_avg_pool2d(teacher, 2)
    expected = sum(
        luce.ofd_loss(layer(student), pooled, margin=negative) / part
        for layer, part in zip(loss.projectors, (4, 2, 1), strict=True)
    )
    assert_close(total, expected)
    assert {name.split(".")[0] for name, _ in loss.named_parameters()} == {"projectors"}
    assert any(name.startswith("margins") for name in loss.state_dict())


@pytest.mark.parametrize(("masked", "dims"), [("channels", (2, 3)), ("places", (1,))])
def test_the_mask_of_mgd(masked, dims):
    """Whole channels or whole places, each row by itself, a share of `mask_ratio` of them, anew each time."""
    features = torch.ones(40, 30, 5, 6)
    seen = []

    def generate(masked):
        seen.append(masked)
        return masked

    for _ in range(2):
        luce.mgd_loss(features, features, generate=generate, masked=masked, mask_ratio=0.3)
    first, second = seen
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert_close(first.mean(dims, keepdim=True).expand_as(first), first, rtol=0, atol=0)
    assert first.mean().item() == pytest.approx(0.7, abs=0.05)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_mgd_says_what_the_generator_did_wrong():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"`generate\(student_features\)` of shape \(2, 3, 4, 4\), got"):
        luce.mgd_loss(x, x, generate=lambda masked: masked[..., :2])


@pytest.mark.parametrize(
    ("function", "name"), [(luce.vid_loss, "variance"), (luce.ofd_loss, "margin")], ids=["vid", "ofd"]
)
def test_one_value_per_channel(function, name):
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=rf"`{name}` of shape \(3,\), got \(4,\)"):
        function(x, x, **{name: torch.ones(4)})
