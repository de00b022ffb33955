"""Wrong arguments: the type of the error, and a message that holds the name and the values."""

from __future__ import annotations

import re

import pytest
import torch

import luce
from luce.losses._reduce import Blocks, Rows

from .catalogue import LOSSES, UNLABELLED, batch

inf = torch.inf


def refuses(case, error, *words, student=None, teacher=None, target=None, **more):
    """The call must raise exactly `error`, with every word in its message."""
    s, t, y = batch(2)
    s, t, y = (b if a is None else a for a, b in ((student, s), (teacher, t), (target, y)))
    with pytest.raises(error) as caught:
        case(s, t, y, **more)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


# `Blocks.of` and `Rows.of` check this for every loss: a loss of each, with and without labels or a teacher.
REPRESENTATIVES = (
    luce.kd_loss,
    luce.pld_loss,
    luce.dkd_loss,
    luce.cross_entropy_loss,
    luce.listnet_loss,
    luce.nkd_loss,
    luce.tfkd_loss,
)
representative = pytest.mark.only(lambda case: case.loss.function in REPRESENTATIVES)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_every_loss_checks_its_arguments_in_one_place(loss, monkeypatch):
    """Before it looks at anything else: an error there is the error of the loss."""

    class Checked(Exception):
        pass

    def check(*arguments, **options):
        raise Checked

    for kind in (Blocks, Rows):
        monkeypatch.setattr(kind, "of", check)
    student, teacher, target = batch(2)
    logits = (student, teacher) if loss.module.takes_teacher else (student,)
    with pytest.raises(Checked):
        loss.function(*logits, target)


with_teacher = pytest.mark.only(lambda case: case.loss.module.takes_teacher)


@representative
@with_teacher
def test_shapes_that_differ(default):
    refuses(default, ValueError, "`teacher_logits`", "(2, 5)", "(2, 4)", teacher=torch.zeros(2, 4))
    refuses(default, ValueError, "`teacher_logits`", "(2, 5)", "(5, 2)", teacher=torch.zeros(5, 2))
    # Shapes that would broadcast are no better.
    refuses(default, ValueError, "`teacher_logits`", "(2, 5)", "(1, 5)", teacher=torch.zeros(1, 5))


@representative
def test_what_is_no_tensor(default):
    refuses(default, TypeError, "`student_logits`", "list", student=[[0.0, 1.0]])
    refuses(default, TypeError, "`target`", "list", target=[0, 1])
    refuses(default, TypeError, "`row_weight`", "list", row_weight=[1.0, 1.0])


@representative
@with_teacher
def test_a_missing_teacher(default):
    student, _, target = batch(2)
    with pytest.raises(TypeError, match=r"`teacher_logits`.*NoneType"):
        default(student, None, target)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@representative
def test_logits_that_are_not_floating(default, dtype):
    wrong = torch.zeros(2, 5, dtype=dtype)
    refuses(default, TypeError, "`student_logits`", str(dtype), student=wrong)
    if default.loss.module.takes_teacher:
        refuses(default, TypeError, "`teacher_logits`", str(dtype), teacher=wrong)


@representative
def test_logits_without_a_class_dimension(default):
    scalar = torch.tensor(1.0)
    refuses(default, ValueError, "`student_logits`", "scalar", student=scalar, teacher=scalar)


@pytest.mark.parametrize("shape", [(2, 0), (0, 0), (0,)])
@representative
def test_no_classes(default, shape):
    none = torch.zeros(shape)
    target = torch.zeros(shape[:-1], dtype=torch.long)
    refuses(default, ValueError, "at least one class", str(shape), student=none, teacher=none, target=target)


@pytest.mark.parametrize("class_dim", [2, -3, 7])
@representative
def test_a_class_dimension_that_is_not_there(default, class_dim):
    refuses(default, ValueError, "`class_dim`", "-2", "1", "(2, 5)", f"got {class_dim}", class_dim=class_dim)


def test_a_reduction_that_is_not_there(default):
    for reduction in ("average", "batchmean", "", None):
        words = ("`reduction`", "'none'", "'mean'", "'sum'", f"got {reduction!r}")
        refuses(default, ValueError, *words, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16])
@representative
def test_labels_that_are_no_indices(default, dtype):
    refuses(default, TypeError, "`target`", str(dtype), target=torch.zeros(2, dtype=dtype))


@representative
def test_one_value_per_row(default):
    refuses(
        default, ValueError, "`target`", "(2,)", "(2, 5)", "(3,)", target=torch.zeros(3, dtype=torch.long)
    )
    refuses(default, ValueError, "`target`", "(2,)", "(2, 5)", target=torch.zeros(2, 5, dtype=torch.long))
    refuses(default, ValueError, "`row_weight`", "(2,)", "(2, 1)", row_weight=torch.ones(2, 1))


@representative
def test_tensors_of_different_devices(default):
    elsewhere = torch.device("meta")
    for name, value in (("target", torch.zeros(2).long()), ("row_weight", torch.ones(2))):
        refuses(default, ValueError, f"`{name}`", "cpu", "meta", **{name: value.to(elsewhere)})
    if default.loss.module.takes_teacher:
        refuses(
            default,
            ValueError,
            "`teacher_logits`",
            "cpu",
            "meta",
            teacher=torch.zeros(2, 5, device=elsewhere),
        )


def test_a_label_that_names_no_class(default):
    for label in (5, 99, -2, -101):
        target = torch.tensor([1, label])
        if default.loss.uses_label:
            refuses(default, ValueError, "[0, 5)", f"got {label}", "`ignore_index`", target=target)
        else:  # it is only compared with `ignore_index`
            student, teacher, _ = batch(2)
            assert default(student, teacher, target) == default(student, teacher)


@pytest.mark.only(lambda case: case.loss.uses_label and case.loss.module.takes_teacher)
def test_a_label_that_names_an_impossible_class(default):
    student, teacher, _ = batch(2)
    student[1, 3] = teacher[1, 3] = -inf
    options = {"student": student, "teacher": teacher}
    refuses(default, ValueError, "classes that exist", "got 3", target=torch.tensor([1, 3]), **options)
    default(student, teacher, torch.tensor([3, 1]))  # it exists in the other row


def test_rows_without_a_label_name_no_impossible_class(default):
    student, teacher, target = batch(2)
    student[1, 0] = teacher[1, 0] = -inf
    target[:] = torch.tensor([1, UNLABELLED])
    assert default(student, teacher, target).isfinite()


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1024), (torch.float32, 128), (torch.bfloat16, 128)]
)
def test_unscaled_position_weights_that_overflow(dtype, limit):
    def value(classes):
        x = torch.randn(1, classes, dtype=dtype)
        return luce.p_listmle_loss(x, x, normalize=False)

    with pytest.raises(ValueError, match=re.escape(f"at most {limit} classes")) as caught:
        value(limit + 1)
    assert f"got {limit + 1}" in str(caught.value)
    assert "`normalize=True`" in str(caught.value)
    value(limit)


def test_unscaled_position_weights_that_do_not_overflow():
    """What is not refused is finite: each class but the last costs at most log(C) nats of an even student."""
    even = torch.zeros(1, 120)
    weights = [2.0 ** (120 - k) - 1 for k in range(1, 121)]
    costs = [torch.tensor(120.0 - k).log().item() for k in range(120)]
    expected = sum(a * cost for a, cost in zip(weights, costs, strict=True))
    assert luce.p_listmle_loss(even, even, normalize=False).item() == pytest.approx(expected, rel=1e-5)
