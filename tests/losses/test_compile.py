"""`torch.compile(fullgraph=True)`: the same numbers as eager, whatever is passed."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import luce

from .catalogue import CASES, DEFAULTS, IGNORED, UNLABELLED, batch


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch.compiler.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def value_and_gradient(function, student, *others):
    student = student.clone().requires_grad_()
    value = function(student, *others)
    return value, torch.autograd.grad(value, student)[0]


# One loss of each way through the code: fused operators with and without labels, their limit, a cut ranking,
# rows in plain PyTorch, rows that couple, a product with a derivative of its own, pairs, and draws.
PATHS = {
    "cross_entropy_loss",
    "kd_loss",
    "kd_loss[temperature=inf]",
    "dkd_loss",
    "pld_loss",
    "pld_loss[top_k=1]",
    "nkd_loss",
    "mlld_loss",
    "rkkd_loss",
    "rankdistil_loss[seed=0]",
}
# Numbers make no other graph; these options do.
OPTIONS = {"label_smoothing", "normalize", "top_k", "center", "seed"}
GRAPHS = [
    pytest.param(case, id=str(case), marks=() if str(case) in PATHS else pytest.mark.slow)
    for case in CASES
    if not case.options or case.limit or case.options.keys() & OPTIONS
]


def test_every_way_is_compiled():
    assert {param.id for param in GRAPHS if not param.marks} == PATHS


@pytest.mark.parametrize("graph", GRAPHS)
def test_compiled_is_eager(graph):
    student, teacher, target = batch(6, dtype=torch.float32)
    target[0], target[1] = IGNORED, UNLABELLED
    weight = torch.tensor([1.0, 1.0, 2.0, 0.0, 0.5, 1.0])
    module = graph.loss.module(**graph.options)
    arguments = teacher, target, weight
    expected = value_and_gradient(module, student, *arguments)
    assert_close(value_and_gradient(compiled(module), student, *arguments), expected)


@pytest.mark.slow
def test_pld_with_inductor():
    student, teacher, target = batch(6, dtype=torch.float32)
    target[0], target[1] = IGNORED, UNLABELLED
    expected = value_and_gradient(luce.pld_loss, student, teacher, target)
    assert_close(value_and_gradient(compiled(luce.pld_loss, "inductor"), student, teacher, target), expected)


LABELLED = [
    pytest.param(
        case,
        id=str(case),
        marks=() if case.loss.function in (luce.pld_loss, luce.dkd_loss, luce.nkd_loss) else pytest.mark.slow,
    )
    for case in DEFAULTS
    if case.loss.uses_label
]


@pytest.mark.parametrize("labelled", LABELLED)
def test_a_wrong_label_makes_its_row_nan_where_asking_would_stall(labelled):
    """Also on a GPU; an index out of range there would end the process."""
    student, teacher, target = batch(3, dtype=torch.float32)
    function = compiled(labelled.loss.module(reduction="none"))
    for label in (5, 99, -7):
        wrong = target.clone()
        wrong[1] = label
        values = function(student, teacher, wrong)
        assert values.isnan().tolist() == [False, True, False]
        assert_close(values[[0, 2]], labelled(student, teacher, target, reduction="none")[[0, 2]])


def test_batches_of_any_size():
    function = compiled(luce.pld_loss)
    for rows in (2, 3, 5, 8):
        student, teacher, target = batch(rows)
        assert_close(function(student, teacher, target), luce.pld_loss(student, teacher, target))


def test_a_temperature_that_changes_while_training():
    student, teacher, _ = batch(3)
    function = compiled(luce.kd_loss)
    for temperature in (1.0, 2.0, 3.0):
        expected = luce.kd_loss(student, teacher, temperature=temperature)
        assert_close(function(student, teacher, temperature=temperature), expected)


def test_a_weighted_sum_under_compile():
    student, teacher, target = batch(4)
    loss = luce.WeightedSum(
        {"task": (0.1, luce.CrossEntropyLoss()), "kd": (0.9, luce.KDLoss(temperature=4.0))}
    )
    assert_close(compiled(loss)(student, teacher, target), loss(student, teacher, target))
