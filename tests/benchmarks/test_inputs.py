"""Random logits are what their names say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.inputs import MOST, POOL_BYTES, Inputs, make, pool

WITH_ORDER = ("student", "teacher", "target", "order")


def inputs(shape: tuple[int, int], logits: str = "normal", **options) -> Inputs:
    case = Case("toy", shape, "PLD", logits=logits, **options)
    return make(case, shape, torch.Generator().manual_seed(0))


def test_the_top_of_a_language_model_holds_nearly_everything() -> None:
    teacher = inputs((32, 32000), "language").teacher
    mass = teacher.softmax(-1).topk(128).values.sum(-1).mean()
    assert mass == pytest.approx(0.986, abs=2e-3)


def test_an_image_classifier_is_sure_of_one_class() -> None:
    teacher = inputs((2000, 100), "image").teacher
    top, next_best = teacher.topk(2).values.T
    assert top.mean() == pytest.approx(9, abs=0.15)
    assert next_best.mean() == pytest.approx(1.5 * 2.5, abs=0.2)  # the largest of 99 normal numbers: 2.5


def test_normal_logits_are_standard() -> None:
    assert inputs((2000, 100)).teacher.std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("logits", ["image", "language"])
def test_networks_agree_and_labels_are_mostly_right(logits: str) -> None:
    drawn = inputs((2000, 100), logits)
    top = drawn.teacher.argmax(-1)
    assert (drawn.student.argmax(-1) == top).float().mean() > 0.7
    assert not torch.equal(drawn.student, drawn.teacher)
    share = 0.9 if logits == "image" else 0.6
    right = (drawn.target == top).float().mean()
    assert share * 0.7 < right < 0.75


def test_only_what_is_asked_for_is_made() -> None:
    drawn = inputs((3, 5), inputs=("student",), backward=False)
    assert [id(tensor) for tensor in drawn.tensors()] == [id(drawn.student)]
    assert not drawn.student.requires_grad
    assert len(inputs((3, 5), inputs=WITH_ORDER).tensors()) == 4


def test_the_order_is_the_teachers_with_ties_by_index() -> None:
    drawn = inputs((16, 1000), dtype="bfloat16", inputs=WITH_ORDER)
    rows = drawn.teacher.tolist()
    for row, order in zip(rows, drawn.order.tolist(), strict=True):
        assert order == sorted(range(1000), key=lambda c: (-row[c], c))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_rows_of_a_pool_differ_and_come_again(dtype: str, size: int) -> None:
    case = Case("toy", (4, 8), "PLD", dtype=dtype)
    drawn = pool(case)
    assert len(drawn) == MOST
    assert len({tuple(i.student.flatten().tolist()) for i in drawn}) == MOST
    assert torch.equal(drawn[-1].teacher, pool(case)[-1].teacher)
    assert drawn[0].student.dtype == getattr(torch, dtype)
    assert case.array_bytes == drawn[0].student.nbytes == 4 * 8 * size


def test_a_pool_of_large_inputs_stays_small() -> None:
    case = Case("toy", (1, 2**21), "softmax auto", inputs=("student",), backward=False)
    assert len(pool(case)) == POOL_BYTES // 2**23
