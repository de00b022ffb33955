"""CRD against its formula, its memory, and what it draws."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from luce import UNLABELLED, CRDLoss

# Rows of the data: 7 in training, one of them without a label, named by scattered numbers.
INDEX = torch.tensor([12, 3, 5, 0, 9, 7, 20])
TARGET = torch.tensor([2, 0, 2, 0, 0, 3, UNLABELLED])  # class 1 has no row


def built(**options) -> CRDLoss:
    torch.manual_seed(1)
    loss = CRDLoss(**{"width": 4, "negatives": 3, **options})
    loss.register_rows(INDEX, TARGET)
    loss.build([(5,)], [(6,)])
    return loss.double()


def features(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 5).to(dtype), torch.randn(rows, 6).to(dtype)


def call(loss: CRDLoss, student: Tensor, teacher: Tensor, at: list[int], seed: int = 3) -> Tensor:
    """On some rows of the data, with the same draw each time."""
    torch.manual_seed(seed)
    return loss([student], [teacher], target=TARGET[at], index=INDEX[at])


def embedded(layer: nn.Linear, feature: Tensor) -> Tensor:
    return nn.functional.normalize(layer(feature))


# The value --------------------------------------------------------------------------------------------------


def test_the_numbers_of_two_rows() -> None:
    """Two classes with a row each: the positive is the row itself, the only negative the other one."""
    loss = CRDLoss(width=2, negatives=5, temperature=0.5)
    loss.register_rows(torch.tensor([0, 1]), torch.tensor([0, 1]))
    loss.build([(2,)], [(2,)])
    loss.double()
    for layer in (loss.student_embedding, loss.teacher_embedding):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    loss.student_bank.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    loss.teacher_bank.copy_(torch.tensor([[0.6, 0.8], [1.0, 0.0]]))
    student, teacher = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[2.0, 0.0]]).double()
    found = loss([student], [teacher], target=torch.tensor([0]), index=torch.tensor([0]))

    # v_s = (.6, .8), v_t = (1, 0); K = 1 of M = 2 rows, so that K / M = 1/2; 1 / temperature = 2.
    def cost(positive: float, negative: float) -> float:
        h0, h1 = math.exp(2 * positive), math.exp(2 * negative)
        z = 2 * (h0 + h1) / 2  # M times the mean
        h0, h1 = h0 / z, h1 / z
        return -math.log(h0 / (h0 + 0.5)) - math.log(0.5 / (h1 + 0.5))

    student_anchor = cost(0.6 * 0.6 + 0.8 * 0.8, 0.6)  # against the teacher's bank
    teacher_anchor = cost(0.0, 1.0)  # against the student's
    assert found.item() == pytest.approx(student_anchor + teacher_anchor)

    # The banks have moved half way, back to length 1; the other row's have not.
    s = (0.3, 0.5 * 1 + 0.4)
    assert_close(loss.student_bank[0], torch.tensor(s).double() / math.hypot(*s))
    t = (0.3 + 0.5, 0.4)
    assert_close(loss.teacher_bank[0], torch.tensor(t).double() / math.hypot(*t))
    assert loss.student_bank[1].tolist() == [1, 0]
    assert loss.teacher_bank[1].tolist() == [1, 0]


@pytest.mark.parametrize("positive", ["exact", "relax"])
def test_against_a_second_implementation(positive: str) -> None:
    """With the authors' loops, over three steps: Z is settled by the first."""
    loss = built(positive=positive, momentum=0.8)  # at 0.5 the two shares could be exchanged
    drawn = []
    draw = loss._draw
    loss._draw = lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1]
    z: dict[str, float] = {}
    for step, at in enumerate(([0, 1, 4], [2, 3], [5, 0])):
        student, teacher = features(len(at))
        vs, vt = embedded(loss.student_embedding, student), embedded(loss.teacher_embedding, teacher)
        banks = {"student": loss.student_bank.clone(), "teacher": loss.teacher_bank.clone()}
        found = call(loss, student, teacher, at, seed=step)

        expected, m, k = 0.0, 6, 3
        for name, anchors, other in (("student", vs, "teacher"), ("teacher", vt, "student")):
            h = [
                [math.exp((v @ banks[other][p]).item() / 0.07) for p in places]
                for v, places in zip(anchors, drawn[-1].tolist(), strict=True)
            ]
            z.setdefault(name, m * sum(map(sum, h)) / (len(at) * (k + 1)))
            for first, *rest in h:
                expected -= math.log(first / z[name] / (first / z[name] + k / m)) / len(at)
                expected -= sum(math.log(k / m / (x / z[name] + k / m)) for x in rest) / len(at)
        assert found.item() == pytest.approx(expected)
        assert loss.student_log_z.item() == pytest.approx(math.log(z["student"]))
        for name, v in (("student", vs), ("teacher", vt)):
            places = loss.place[INDEX[at]]
            banks[name][places] = nn.functional.normalize(0.8 * banks[name][places] + 0.2 * v.detach())
            assert_close(getattr(loss, f"{name}_bank"), banks[name])


def test_gradients_against_finite_differences() -> None:
    loss, at = built(temperature=0.5), [0, 1, 4]
    call(loss, *features(3), at)  # settles Z
    loss.eval()  # the banks stay
    student, teacher = features(3)
    names = [name for name, _ in loss.named_parameters()]

    def value(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(3)
        told = {"target": TARGET[at], "index": INDEX[at]}
        replaced = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(loss, replaced, ([x], [teacher]), told)

    inputs = [x.detach().clone().requires_grad_() for x in (student, *loss.parameters())]
    assert torch.autograd.gradcheck(value, inputs)


def test_both_embeddings_learn_and_the_teacher_does_not() -> None:
    loss, (student, teacher) = built(), features(3)
    call(loss, student.requires_grad_(), teacher.requires_grad_(), [0, 1, 2]).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())
    assert len(list(loss.parameters())) == 4


def test_training_brings_the_two_networks_together() -> None:
    torch.manual_seed(0)
    rows, classes = 40, 4
    target = torch.arange(rows) % classes
    teacher = torch.randn(rows, 6)
    loss = CRDLoss(width=8, negatives=10, temperature=0.2)
    loss.register_rows(torch.arange(rows), target)
    loss.build([(5,)], [(6,)])
    student = torch.randn(rows, 5, requires_grad=True)
    optimizer = torch.optim.Adam([student, *loss.parameters()], lr=0.02)

    def told_apart() -> float:
        """How often a student's embedding is nearest to that of its own row."""
        s, t = embedded(loss.student_embedding, student), embedded(loss.teacher_embedding, teacher)
        return ((s @ t.T).argmax(1) == torch.arange(rows)).float().mean().item()

    before = told_apart()
    for _ in range(150):
        for at in torch.randperm(rows).split(10):
            optimizer.zero_grad()
            loss([student[at]], [teacher[at]], target=target[at], index=at).backward()
            optimizer.step()
    assert told_apart() > max(0.5, 3 * before)


# What is drawn ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", ["exact", "relax"])
def test_negatives_are_all_rows_of_other_classes_and_none_else(positive: str) -> None:
    loss = built(negatives=2, positive=positive)
    by_place = {int(loss.place[index]): int(label) for index, label in zip(INDEX, TARGET, strict=True)}
    del by_place[-1]
    assert sorted(by_place) == list(range(6))
    at = torch.tensor([0, 1, 5]).repeat(400)
    chosen = loss._draw(loss.place[INDEX[at]], TARGET[at])
    assert chosen.shape == (1200, 3)
    for label, own in ((2, 0), (0, 1), (3, 5)):
        rows = chosen[TARGET[at] == label]
        others = {place for place, other in by_place.items() if other != label}
        assert set(rows[:, 1:].flatten().tolist()) == others
        share = rows[:, 1:].flatten().bincount(minlength=6)[sorted(others)] / rows[:, 1:].numel()
        assert_close(share, torch.full_like(share, 1 / len(others)), rtol=0, atol=0.07)
        same = {place for place, other in by_place.items() if other == label}
        exact = {int(loss.place[INDEX[own]])}
        assert set(rows[:, 0].tolist()) == (exact if positive == "exact" else same)


def test_there_are_no_more_negatives_than_rows_outside_the_largest_class() -> None:
    assert built(negatives=16384).drawn == 3
    assert built(negatives=2).drawn == 2
    assert CRDLoss().negatives == 16384


def test_rows_without_a_label_or_unknown_count_for_nothing() -> None:
    student, teacher = features(4)
    at = [0, 1, 6]
    one, other = built(), built()
    torch.manual_seed(3)
    index = torch.cat([INDEX[at], torch.tensor([500])])
    with_more = one([student], [teacher], target=torch.tensor([2, 0, UNLABELLED, 2]), index=index)
    assert_close(with_more, call(other, student[:2], teacher[:2], [0, 1]))
    # Close, not equal: matrix products of four rows and of two round differently on processors with AVX-512.
    assert_close(one.state_dict(), other.state_dict())


def test_a_batch_without_any_label_is_worth_nothing_and_settles_nothing() -> None:
    loss, (student, teacher) = built(), features(1)
    before = copy.deepcopy(loss.state_dict())
    value = call(loss, student.requires_grad_(), teacher, [6])
    assert value.item() == 0
    value.backward()
    assert not student.grad.any()
    assert_close(loss.state_dict(), before, equal_nan=True)


# The memory -------------------------------------------------------------------------------------------------


def test_a_row_that_is_in_a_batch_twice_moves_the_banks_by_the_mean() -> None:
    loss, (student, teacher) = built(), features(3)
    before = loss.student_bank.clone()
    call(loss, student, teacher, [0, 1, 0])
    v = embedded(loss.student_embedding, student)
    for at, mean in ((0, (v[0] + v[2]) / 2), (1, v[1])):
        place = loss.place[INDEX[at]]
        assert_close(loss.student_bank[place], nn.functional.normalize(before[place] + mean, dim=0))


def test_only_training_moves_the_banks() -> None:
    loss = built().eval()
    before = loss.student_bank.clone()
    first = call(loss, *features(2), [0, 1])
    assert torch.equal(loss.student_bank, before)
    assert first.isfinite()


def test_what_it_remembers_is_what_it_goes_on_with() -> None:
    one = built()
    call(one, *features(3), [0, 1, 2])
    other = built()
    torch.nn.init.zeros_(other.student_bank)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    student, teacher = features(2)
    for loss in (one, other):
        loss.zero_grad()
        call(loss, student, teacher, [3, 4]).backward()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert {"student_bank", "teacher_bank", "student_log_z", "teacher_log_z"} <= one.state_dict().keys()


def test_banks_start_as_in_the_authors_code() -> None:
    loss = CRDLoss(width=48, negatives=5)
    loss.register_rows(torch.arange(2000), torch.arange(2000) % 2)
    loss.build([(3,)], [(3,)])
    for bank in (loss.student_bank, loss.teacher_bank):
        assert bank.shape == (2000, 48)
        assert bank.abs().max() <= 0.25  # 1 / sqrt(48 / 3)
        assert bank.square().sum(1).mean().item() == pytest.approx(1, rel=0.01)
    assert not torch.equal(loss.student_bank, loss.teacher_bank)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    one, other = built().float(), built().float()
    student, teacher = features(3, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(one, student, teacher, [0, 1, 2])
    assert found.dtype == torch.float32
    assert torch.equal(found, call(other, student.float(), teacher.float(), [0, 1, 2]))


def test_features_of_any_size_stay_finite() -> None:
    for scale in (0.0, 1e-30, 1e30):
        loss = built().float()
        student, teacher = (scale * x.float() for x in features(3))
        value = call(loss, student.requires_grad_(), teacher, [0, 1, 2])
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()
        assert loss.student_bank.isfinite().all()


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "`width`"),
        ({"negatives": 0}, "`negatives`"),
        ({"negatives": 1.5}, "`negatives`"),
        ({"temperature": 0.0}, "`temperature`"),
        ({"momentum": -0.1}, "`momentum`"),
        ({"momentum": 1.0}, "`momentum` below 1"),
        ({"positive": "close"}, "`positive`.*'exact', 'relax', got 'close'"),
    ],
)
def test_options_that_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRDLoss(**options)


def test_banks_are_of_the_rows_that_they_were_built_for() -> None:
    loss = CRDLoss(width=4, negatives=2)
    loss.register_rows(INDEX, TARGET)
    loss.build([(3,)], [(5,)])
    bank = loss.student_bank.clone()
    loss.register_rows(INDEX, TARGET)
    assert torch.equal(loss.student_bank, bank)
    more = torch.arange(300)
    for index, target in ((more, more % 3), (INDEX, 1 - TARGET.clamp(max=1))):
        with pytest.raises(ValueError, match="expected the rows that this CRDLoss was built for"):
            loss.register_rows(index, target)


def test_rows_and_shapes_that_are_refused() -> None:
    with pytest.raises(ValueError, match="`register_rows` to be called before `build`"):
        CRDLoss().build([(3,)], [(3,)])
    for target in ([1, 1, 1], [2, UNLABELLED, 2], [UNLABELLED] * 3):
        with pytest.raises(ValueError, match="labelled rows of at least two classes"):
            CRDLoss().register_rows(torch.arange(3), torch.tensor(target))
    loss = CRDLoss()
    loss.register_rows(INDEX, TARGET)
    with pytest.raises(ValueError, match="pool the map or flatten it"):
        loss.build([(3, 4, 4)], [(3,)])
    with pytest.raises(RuntimeError, match=r"CRDLoss\.build"):
        call(loss, *features(2), [0, 1])
