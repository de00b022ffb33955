"""KD at temperatures that are tensors, and the temperature that is learned against the student."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import luce
from luce import CTKDLoss, WeightedSum
from luce.losses import tempered_kd
from luce.losses.modules.curriculum import reversed_gradient
from luce.methods import LogitMethod
from luce.signals import DenseSignal

from .catalogue import IGNORED, UNLABELLED, batch

inf, nan = math.inf, math.nan


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# A temperature per row


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_temperature_for_all_is_kd(reduction, dtype):
    student, teacher, target = batch(6, dtype=dtype)
    target[1], target[2] = IGNORED, UNLABELLED
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0, 1.0, 3.0])
    options = {"target": target, "row_weight": weight, "reduction": reduction}
    expected = luce.kd_loss(student, teacher, temperature=3.0, backend="reference", **options)
    for temperature in (torch.tensor(3.0), torch.full((6,), 3.0)):
        assert_close(tempered_kd(student, teacher, temperature=temperature, **options), expected)


def test_a_temperature_per_row_is_kd_row_by_row():
    student, teacher, _ = batch(3)
    temperature = double(0.5, 1.0, 4.0)
    values = tempered_kd(student, teacher, temperature=temperature, reduction="none")
    for i, expected in enumerate(temperature.tolist()):
        row = luce.kd_loss(student[i], teacher[i], temperature=expected)
        assert_close(values[i], row)


@pytest.mark.parametrize(("rows", "class_dim"), [((2, 3, 2), 1), ((2, 3, 2), 0), ((2, 3), -1)])
def test_temperatures_have_the_shape_of_the_rows(rows, class_dim):
    student, teacher, target = batch(*rows)
    temperature = 0.5 + torch.rand(rows, dtype=torch.float64)
    flat = (x.flatten(0, -2) for x in (student, teacher))
    expected = tempered_kd(*flat, temperature=temperature.flatten(), reduction="none")
    moved = (x.movedim(-1, class_dim) for x in (student, teacher))
    values = tempered_kd(*moved, target, temperature=temperature, class_dim=class_dim, reduction="none")
    assert values.shape == rows
    assert_close(values.flatten(), expected)


def test_gradcheck_towards_student_and_temperature():
    student, teacher, target = batch(4)
    target[1] = IGNORED
    weight = double(1.0, 2.0, 0.5, 3.0)
    for temperature in (double(0.7, 1.0, 2.0, 5.0), torch.tensor(2.0, dtype=torch.float64)):
        torch.autograd.gradcheck(
            lambda s, t: tempered_kd(s, teacher, target, temperature=t, row_weight=weight),
            (student.clone().requires_grad_(), temperature.requires_grad_()),
        )


def test_the_temperature_of_a_row_that_does_not_count_does_not_matter():
    student, teacher, target = batch(3)
    target[1] = IGNORED
    temperature = double(1.0, nan, 2.0).requires_grad_()
    student[1] = nan
    value = tempered_kd(student, teacher, target, temperature=temperature)
    assert value.isfinite()
    (result,) = torch.autograd.grad(value, temperature)
    assert result.isfinite().all()
    assert result[1] == 0


def test_temperatures_that_cannot_be():
    student, teacher, _ = batch(3)
    with pytest.raises(TypeError, match=r"`temperature`.*float"):
        tempered_kd(student, teacher, temperature=4.0)
    with pytest.raises(ValueError, match=r"`temperature` of shape \(3,\).*got \(2,\)"):
        tempered_kd(student, teacher, temperature=torch.ones(2))


# A temperature that is learned against the student


def modules(**options):
    return CTKDLoss(**options), CTKDLoss(classes=5, **options)


def test_the_temperature_at_the_start():
    student, teacher, _ = batch(3)
    for loss, shape in zip(modules(), ((), (3,)), strict=True):
        expected = torch.full(shape, 1 + 20 / (1 + math.exp(-1.0)))
        assert_close(loss.temperatures(student, teacher).detach(), expected)
    loss = CTKDLoss(lowest_temperature=2.0, temperature_range=4.0)
    assert loss.temperatures(student, teacher).item() == pytest.approx(2 + 4 / (1 + math.exp(-1.0)))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("instance_wise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_kd_at_its_temperature_whatever_it_is_given(reduction, instance_wise, dtype):
    """So what holds for KD in the battery holds here: masks, weights, shapes, dtypes, impossible classes."""
    student, teacher, target = batch(2, 3, dtype=dtype)
    target[0, 1], target[1, 0] = IGNORED, UNLABELLED
    student[0, 1], teacher[0, 1] = nan, inf
    student[1, :, 2] = teacher[1, :, 2] = -inf
    weight = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.0, 1.0]])
    loss = CTKDLoss(classes=5 if instance_wise else None, class_dim=-1, reduction=reduction)
    temperature = 1 + 20 / (1 + math.exp(-1.0))
    results = []
    for function in (
        loss,
        lambda *x: luce.kd_loss(
            *x[:3],
            temperature=temperature,
            class_dim=-1,
            row_weight=x[3],
            reduction=reduction,
            backend="reference",
        ),
    ):
        s = student.clone().requires_grad_()
        value = function(s, teacher, target, weight)
        results.append((value, torch.autograd.grad(value.sum(), s)[0]))
    assert results[0][0].dtype == results[1][0].dtype
    assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_single_row_and_the_class_dimension():
    student, teacher, target = batch(4, 3)
    for loss in modules():
        expected = loss(student.movedim(-1, 1), teacher.movedim(-1, 1), target)
        last = copy.deepcopy(loss)
        last.class_dim = -1
        assert_close(last(student, teacher, target), expected)
        assert loss(student[0, 0], teacher[0, 0]).shape == ()
        assert loss(student[:0, 0], teacher[:0, 0]) == 0


@pytest.mark.parametrize("epoch", [1, 4, 10, 25, None])
def test_the_temperature_s_gradient_is_reversed(epoch):
    """Against central differences of the loss in each parameter."""
    student, teacher, target = batch(4)
    target[1] = IGNORED
    student[1] = nan
    for loss in modules(strength=0.5):
        loss.double()
        if epoch is not None:
            loss.set_epoch(epoch)
        if loss.classes:  # at first, its last layer lets nothing through to the one before
            nn.init.normal_(loss.theta_of[-1].weight, generator=torch.Generator().manual_seed(0))
        grown = 1 if epoch is None else (1 - math.cos(math.pi * min(epoch / 10, 1))) / 2
        loss(student, teacher, target).backward()
        for parameter in loss.parameters():
            flat, found = parameter.data.view(-1), parameter.grad.view(-1)
            for i in range(min(len(flat), 12)):
                h, kept = 1e-5, flat[i].item()
                sides = []
                for moved in (kept + h, kept - h):
                    flat[i] = moved
                    with torch.no_grad():
                        sides.append(loss(student, teacher, target).item())
                flat[i] = kept
                slope = (sides[0] - sides[1]) / (2 * h)
                assert found[i].item() == pytest.approx(-0.5 * grown * slope, rel=1e-5, abs=1e-9)
        assert any(p.grad.abs().max() > 1e-4 for p in loss.parameters())


def test_the_curriculum():
    loss = CTKDLoss(strength=2.0, curriculum_epochs=4)
    assert loss.reversal() == 2.0
    strengths = []
    for epoch in (1, 2, 3, 4, 5, 100):
        loss.set_epoch(epoch)
        strengths.append(loss.reversal())
    half = math.sqrt(0.5)
    assert strengths == pytest.approx([1 - half, 1.0, 1 + half, 2.0, 2.0, 2.0])
    without = CTKDLoss(curriculum_epochs=0)
    without.set_epoch(1)
    assert without.reversal() == 1.0


def test_the_student_gets_no_gradient_through_the_temperature():
    student, teacher, target = batch(4)
    loss = CTKDLoss(classes=5)
    nn.init.normal_(loss.theta_of[-1].weight)
    temperature = loss.temperatures(student, teacher).detach()
    assert len(set(temperature.tolist())) == 4
    results = []
    for function in (loss, lambda s, t, y: tempered_kd(s, t, y, temperature=temperature)):
        s = student.clone().requires_grad_()
        results.append(torch.autograd.grad(function(s, teacher, target), s)[0])
    assert_close(results[0], results[1])


def test_an_adversary_that_learns_makes_the_loss_larger_and_stays_in_its_range():
    student, teacher, target = batch(16)
    for loss in modules(lowest_temperature=0.5, temperature_range=5.0):
        before = loss(student, teacher, target).item()
        optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
        for _ in range(20):
            optimizer.zero_grad()
            loss(student, teacher, target).backward()
            optimizer.step()
        assert loss(student, teacher, target).item() > before
        temperature = loss.temperatures(student, teacher)
        assert ((temperature > 0.5) & (temperature < 5.5)).all()


def test_a_reversed_gradient_leaves_the_value_alone():
    x = torch.randn(100, requires_grad=True)
    y = reversed_gradient(x, 0.3)
    assert torch.equal(y, x)
    assert_close(torch.autograd.grad(y.square().sum(), x)[0], -0.3 * 2 * x.detach())


def test_its_parameters_are_trained_saved_and_loaded():
    student, teacher, target = batch(4, dtype=torch.float32)
    for loss in modules():
        method = LogitMethod(WeightedSum({"task": (0.1, luce.CrossEntropyLoss()), "ctkd": (0.9, loss)}))
        assert len(list(method.parameters())) == len(list(loss.parameters())) > 0
        with torch.no_grad():
            for parameter in loss.parameters():
                parameter.add_(torch.randn_like(parameter))
        other = copy.deepcopy(method)
        fresh = CTKDLoss(classes=loss.classes)
        assert loss(student, teacher, target) != fresh(student, teacher, target)
        fresh.load_state_dict(loss.state_dict())
        expected = loss(student, teacher, target)
        for twin in (fresh, other.loss.losses["ctkd"], pickle.loads(pickle.dumps(loss))):
            assert_close(twin(student, teacher, target), expected, rtol=0, atol=0)
        method.set_epoch(2)
        assert loss.epoch == 2
        network = nn.Linear(3, 5)
        terms = method.step(network, {"input": torch.randn(4, 3), "target": target}, DenseSignal(teacher))
        terms["loss"].backward()
        assert all(parameter.grad is not None for parameter in (*loss.parameters(), *network.parameters()))


def test_it_is_the_same_at_every_start_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    first = CTKDLoss(classes=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert_close(CTKDLoss(classes=5).state_dict(), first, rtol=0, atol=0)


@pytest.mark.parametrize("instance_wise", [False, True])
def test_under_compile(instance_wise):
    torch.compiler.reset()
    student, teacher, target = batch(6, dtype=torch.float32)
    loss = CTKDLoss(classes=5 if instance_wise else None)
    loss.set_epoch(3)
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        s = student.clone().requires_grad_()
        value = function(s, teacher, target)
        results.append((value, torch.autograd.grad(value, [s, *loss.parameters()])))
    assert_close(results[1], results[0])


def test_its_text_names_its_options():
    assert repr(CTKDLoss(strength=0.5)) == "CTKDLoss(strength=0.5)"
    assert "classes=5" in repr(CTKDLoss(classes=5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lowest_temperature": 0.0}, "`lowest_temperature`.*above 0"),
        ({"temperature_range": -1.0}, "`temperature_range`.*above 0"),
        ({"strength": -0.5}, "`strength`.*at least 0"),
        ({"curriculum_epochs": nan}, "`curriculum_epochs`.*at least 0"),
        ({"classes": 0}, "`classes`.*integer of at least 1 and .*, got 0"),
        ({"classes": 2.0}, "`classes`.*integer of at least 1 and .*, got 2.0"),
        ({"reduction": "average"}, "`reduction`.*'none', 'mean', 'sum'.*'average'"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        CTKDLoss(**options)


def test_what_it_refuses():
    student, teacher, target = batch(3)
    for loss in modules():
        with pytest.raises(TypeError, match=r"`teacher_logits`.*NoneType"):
            loss(student, None, target)
        with pytest.raises(ValueError, match="`teacher_logits`"):
            loss(student, teacher[:2], target)
        with pytest.raises(TypeError, match="`student_logits`"):
            loss([[1.0] * 5] * 3, teacher, target)
    with pytest.raises(ValueError, match=r"`classes=4`.*got 5"):
        CTKDLoss(classes=4)(student, teacher, target)
