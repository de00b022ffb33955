"""ReviewKD against its formula, a second implementation and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from luce import ReviewKDLoss
from luce.losses.modules.reviewkd import Fusion, hierarchical_context_loss

STUDENT = ((3, 8, 8), (5, 4, 4), (6, 4, 4), (6,))
TEACHER = ((4, 8, 8), (4, 6, 6), (7, 2, 2), (7,))  # another size in the second and third stage


def built(**options) -> ReviewKDLoss:
    loss = ReviewKDLoss(**options).double()
    loss.build(STUDENT, TEACHER)
    return loss.double()


def batch(rows: int = 3, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    return tuple([torch.randn(rows, *shape).to(dtype) for shape in shapes] for shapes in (STUDENT, TEACHER))


# The hierarchical context loss ------------------------------------------------------------------------------


def test_levels_not_smaller_than_the_map_are_left_out() -> None:
    a = torch.arange(64.0).view(1, 1, 8, 8)
    for size, levels in ((1, []), (2, [1]), (3, [2, 1]), (4, [2, 1]), (5, [4, 2, 1]), (8, [4, 2, 1])):
        s = a[:, :, :size, :size].contiguous()
        expected, weights = s.square().mean(), 1.0
        for k, level in enumerate(levels, start=1):
            expected = expected + F.adaptive_avg_pool2d(s, level).square().mean() / 2**k
            weights += 1 / 2**k
        assert_close(hierarchical_context_loss(s, torch.zeros_like(s)), expected / weights)


def test_the_numbers_of_a_small_map() -> None:
    student = torch.tensor([[1.0, 3.0], [5.0, 7.0]]).view(1, 1, 2, 2)
    whole, mean = (1 + 9 + 25 + 49) / 4, ((1 + 3 + 5 + 7) / 4) ** 2
    found = hierarchical_context_loss(student, torch.zeros(1, 1, 2, 2))
    assert found.item() == pytest.approx((whole + mean / 2) / 1.5)


def test_a_map_that_is_not_square_has_the_levels_of_its_shorter_side() -> None:
    s = torch.randn(2, 3, 2, 9)
    expected = (s.square().mean() + s.mean((2, 3)).square().mean() / 2) / 1.5
    assert_close(hierarchical_context_loss(s, torch.zeros_like(s)), expected)


# The fusion -------------------------------------------------------------------------------------------------


def second_implementation(loss: ReviewKDLoss, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """By the paper's figure, from the deepest stage up, with the weights of `loss`."""

    def normalised(x: Tensor, layer) -> Tensor:
        y = F.conv2d(x, layer[0].weight, padding=layer[0].weight.shape[-1] // 2)
        if y.numel() == y.shape[1]:
            mean, variance = layer[1].running_mean, layer[1].running_var
        else:
            mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
        y = (y - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return y * layer[1].weight[:, None, None] + layer[1].bias[:, None, None]

    def enlarged(x: Tensor, size) -> Tensor:
        rows, columns = (torch.arange(n) * m // n for n, m in zip(size, x.shape[2:], strict=True))
        return x[:, :, rows][:, :, :, columns]

    total, below = 0.0, None
    for fusion, s, t in reversed(list(zip(loss.fusions, student, teacher, strict=True))):
        s, t = (x.view(len(x), x.shape[1], *(x.shape[2:] or (1, 1))) for x in (s, t))
        x = normalised(s, fusion.narrow)
        if below is not None:
            below = enlarged(below, x.shape[2:])
            both = torch.cat([x, below], 1)
            weights = fusion.attention[0].weight[:, :, 0, 0]
            maps = torch.einsum("kc,nchw->nkhw", weights, both) + fusion.attention[0].bias[:, None, None]
            own, other = (1 / (1 + (-maps).exp())).unbind(1)
            x = x * own[:, None] + below * other[:, None]
        below = enlarged(x, t.shape[2:])
        total = total + hierarchical_context_loss(normalised(below, fusion.widen), t)
    return total


def test_against_a_second_implementation() -> None:
    loss = built()
    for fusion in loss.fusions:  # weights and biases that do something
        for name, parameter in fusion.named_parameters():
            if name.endswith(("1.weight", "1.bias", "0.bias")):
                torch.nn.init.normal_(parameter)
    student, teacher = batch()
    expected = second_implementation(loss, student, teacher)
    assert_close(loss(student, teacher), expected)


def test_the_width_in_the_middle_is_that_of_the_deepest_feature_at_most() -> None:
    assert built().fusions[0].narrow[0].out_channels == 6
    assert built(middle=2).fusions[0].narrow[0].out_channels == 2
    assert [fusion.attention is None for fusion in built().fusions] == [False, False, False, True]


def test_convolutions_start_as_in_the_authors_code() -> None:
    torch.manual_seed(0)
    fusion = Fusion(64, 128, 32, deepest=True)
    for convolution, fan_in in ((fusion.narrow[0], 64), (fusion.widen[0], 9 * 128)):
        bound = (3 / fan_in) ** 0.5  # Kaiming's with a = 1
        assert convolution.weight.abs().max() <= bound
        assert convolution.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert convolution.bias is None


def test_every_part_learns_and_the_teacher_does_not() -> None:
    loss, (student, teacher) = built(), batch()
    for x in (*student, *teacher):
        x.requires_grad_()
    loss(student, teacher).backward()
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(x.grad is None for x in teacher)
    assert all(parameter.grad is not None for parameter in loss.parameters())


def test_gradients_against_finite_differences() -> None:
    loss, (student, teacher) = built(), batch()
    inputs = [x.requires_grad_() for x in student]
    assert torch.autograd.gradcheck(lambda *features: loss(features, teacher), inputs)


def test_deeper_stages_teach_the_earlier_ones_but_not_the_other_way() -> None:
    loss, (student, teacher) = built().eval(), batch()
    changed = [*student[:3], student[3] + 1]
    assert not torch.equal(loss(student, teacher), loss(changed, teacher))
    _, passed = loss.fusions[3](student[3][:, :, None, None], None, torch.Size([1, 1]))
    assert passed.shape == (3, 6, 1, 1)
    student[3].requires_grad_()
    fused, _ = loss.fusions[2](student[2], passed, torch.Size([2, 2]))
    assert fused.shape == (3, 7, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    loss = ReviewKDLoss()
    loss.build(STUDENT, TEACHER)
    student, teacher = batch(dtype=dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    wide = loss([x.float() for x in student], [x.float() for x in teacher])
    assert_close(value, wide)


def test_a_batch_of_one_row_does_not_stop_a_training() -> None:
    """Its pooled vector has one value per channel, which batch normalisation refuses."""
    loss, (student, teacher) = built(), batch(rows=1)
    value = loss(student, teacher)
    assert_close(value, second_implementation(loss, student, teacher))
    value.backward()


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            [(3, 4)],
            [(3, 4, 4)],
            r"\(C', H, W\) or \(D,\) without the batch for ReviewKDLoss, got \(3, 4\)",
        ),
        ([(3, 4, 4)], [(3, 4, 4), (3,)], "as many features of the student as of the teacher, got 1 and 2"),
        ([], [], "expected at least one as features for ReviewKDLoss"),
        ([(3, 0, 4)], [(3, 4, 4)], "to be non-empty"),
    ],
)
def test_shapes_that_are_refused(student, teacher, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReviewKDLoss().build(student, teacher)


def test_options_that_are_refused() -> None:
    with pytest.raises(ValueError, match="`middle`"):
        ReviewKDLoss(middle=0)
    with pytest.raises(RuntimeError, match=r"ReviewKDLoss\.build"):
        ReviewKDLoss()(*batch())
